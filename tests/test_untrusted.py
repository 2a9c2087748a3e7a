"""Files from strangers: read as data, inside their folder, with an end. The scoreboard has the whole attacks."""

import contextlib
import gc
import json
import os
import re
import shutil
import threading
import time

import jinja2.sandbox
import pytest
import torch
from conftest import tiny_config
from safetensors.torch import save_file

from phinetune.errors import AdapterError, ModelError, RecipeError
from phinetune.model import load_model, load_tokenizer
from phinetune.model.files import check_sizes
from phinetune.recipe import ModelKwargs, dump_recipe, load_recipe, make_recipe
from phinetune.untrusted import Untrusted, bounded, check_folder, plain_name, read_json

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def render(source):
    jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(source).render()


@pytest.mark.parametrize(
    ("work", "error"),
    [
        (lambda: render(LOOPS), TimeoutError),
        (lambda: re.match(r"(a|b|ab)*X", "ab" * 40), TimeoutError),
        (lambda: render("{{ 'a' * 10 ** 11 }}"), MemoryError),
    ],
)
def test_a_block_ends(work, error):
    begin = time.perf_counter()
    with pytest.raises(error), bounded(0.2, 1 << 28):
        work()
    assert time.perf_counter() - begin < 5
    assert len(bytearray(1 << 29)) == 1 << 29, "behind it the limits are gone"
    time.sleep(0.001)


def test_where_nothing_says_what_memory_is_used_it_is_not_bounded(monkeypatch):
    def read_bytes(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr("phinetune.untrusted.Path.read_bytes", read_bytes)
    with bounded(1.0, 1 << 20):
        assert len(bytearray(1 << 28)) == 1 << 28
    with pytest.raises(TimeoutError), bounded(0.2, 1 << 20):
        render(LOOPS)


def test_garbage_of_the_process_takes_none_of_its_time():
    for error in (None, KeyError):
        with contextlib.suppress(KeyError), bounded(1.0, 1 << 28):
            assert not gc.isenabled()
            if error:
                raise error
        assert gc.isenabled()


def test_a_block_in_another_thread_runs_without_an_end():
    done = []

    def work():
        with bounded(0.01, 1 << 20):
            done.append(sum(range(1_000_000)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


@pytest.mark.parametrize(
    ("text", "said"),
    [("[" * 100_000, "nested too deeply"), ("{", "not valid JSON"), ("\udc80", "not valid JSON")],
)
def test_json_that_is_none(tmp_path, text, said):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(Untrusted, match=said):
        read_json(tmp_path / "config.json")


def test_a_huge_file_is_not_read(tmp_path):
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 1 << 33)
    with pytest.raises(Untrusted, match="more than any configuration"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "a/b", "a\\b", "C:x", "a\0", None, 3])
def test_names_of_other_places(name):
    assert not plain_name(name)
    assert plain_name("model-00001-of-00002.safetensors")


def test_links(tmp_path):
    inside, outside = tmp_path / "model", tmp_path / "secret.json"
    inside.mkdir()
    outside.write_text("{}")
    (inside / "real.json").write_text("{}")
    (inside / "config.json").symlink_to("real.json")
    check_folder(inside)
    (inside / "other.json").symlink_to(outside)
    with pytest.raises(Untrusted, match=r"other\.json is a link out of the folder"):
        check_folder(inside)
    (inside / "other.json").unlink()
    (inside / "additional_chat_templates").symlink_to(tmp_path)
    with pytest.raises(Untrusted, match="additional_chat_templates"):
        check_folder(inside)


def test_the_hub_caches_links_to_its_blobs(tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    check_folder(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "tokenizer.json").symlink_to("../../refs/main")
    with pytest.raises(Untrusted):
        check_folder(snapshot)


def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_pickled_weights_are_refused_unread(tiny_llama_folder, tmp_path):
    folder = copy(tiny_llama_folder, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin alone: a pickle can run code"):
        load_model(str(folder), ModelKwargs())


def test_weights_that_are_missing_are_not_drawn_at_random(tiny_llama_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy(tiny_llama_folder, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its files lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(folder), ModelKwargs())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1,000,000,000, which no model has"),
        ({"num_hidden_layers": 900}, "describes 900 layers"),
        ({"vocab_size": 9_000_000}, "describes .* parameters, and its files have"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}, "runs no code that comes with a model"),
    ],
)
def test_configurations_of_what_the_files_do_not_hold(tiny_llama_folder, tmp_path, changes, said):
    folder = copy(tiny_llama_folder, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError, match=said):
        load_model(str(folder), ModelKwargs())


def test_an_adapter_beside_a_model_is_not_put_on_it_unasked(tiny_llama_folder, tmp_path):
    folder = copy(tiny_llama_folder, tmp_path)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(ModelError, match="holds an adapter beside the model"):
        load_model(str(folder), ModelKwargs())


def test_a_snapshot_in_the_hubs_cache(tiny_llama_folder, tmp_path):
    repository = tmp_path / "models--owner--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("a" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for path in tiny_llama_folder.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    kwargs = ModelKwargs(cache_dir=str(tmp_path))
    assert load_tokenizer("owner/tiny", kwargs).chat_template
    assert load_model("owner/tiny", kwargs).config.model_type == "llama"
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tiny_llama_folder / "config.json")
    with pytest.raises(ModelError, match=r"config\.json is a link out of the folder"):
        load_model("owner/tiny", kwargs)


def test_a_template_that_loops(tiny_llama_folder, tmp_path):
    from phinetune.data import Renderer

    folder = copy(tiny_llama_folder, tmp_path)
    path = folder / "chat_template.jinja"
    path.write_text(LOOPS + path.read_text())
    with pytest.raises(ModelError, match="chat template: takes too long"):
        Renderer.of(load_tokenizer(str(folder), ModelKwargs())).prompt_ids([{"role": "user", "content": "Hello"}])


def test_recipes_have_no_aliases(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("a: &a [x, x]\nb: [*a, *a]\n")
    with pytest.raises(RecipeError, match=r"\*a in line 2 is an alias"):
        load_recipe(path)
    shared = ["q_proj"]
    recipe, _ = make_recipe(
        {
            "model": "smollm2",
            "data": {"train": "x"},
            "peft_config": {"target_modules": shared, "modules_to_save": shared},
        }
    )
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path)[0] == recipe


def test_kernels_of_the_hub_are_code():
    with pytest.raises(RecipeError, match="whose code would be run"):
        make_recipe({"model": "x", "data": {"train": "x"}, "model_kwargs": {"attn_implementation": "owner/kernel"}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha_pattern": {r"((a|b|ab|[a-z._0-9]*)*X)": 4}}, "takes too long"),
        ({"alpha_pattern": {"(": 1}}, "unterminated"),
        ({"lora_alpha": "many"}, "could not convert"),
    ],
)
def test_configurations_of_adapters(tmp_path, changes, said):
    from conftest import tiny_model

    from phinetune import lora
    from phinetune.adapter import load_adapter, save_adapter

    model = tiny_model("llama")
    lora.adapt(model, r=2, target_modules=["q_proj"])
    save_adapter(model, tmp_path, "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(AdapterError, match=said):
        load_adapter(tiny_model("llama"), tmp_path)


def test_weights_beside_a_gguf_are_not_its_own(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    config = tiny_config("phi3", num_hidden_layers=900)
    check_sizes("model x.gguf", None, config)
    with pytest.raises(ModelError, match="describes 900 layers"):
        check_sizes("model x", str(tmp_path), config)
