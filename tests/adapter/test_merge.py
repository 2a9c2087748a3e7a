"""Merged folders: read by plain transformers without PEFT or phinetune, they answer as adapter and base did."""

import json
import shutil
import subprocess
import sys

import commands
import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conftest import draw_lora_B, relative_error, tiny_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from phinetune import lora
from phinetune.adapter import load_tuned, merge, merge_adapter, recipe_of, save_adapter
from phinetune.adapter.tuned import base_of
from phinetune.errors import AdapterError
from phinetune.model import adapt_model, load_model
from phinetune.recipe import ModelKwargs, PeftConfig

IDS = torch.arange(5, 45)[None]
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "What is 3 plus 4?"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist())
print(sorted(name for name in sys.modules if name in ("peft", "phinetune", "bitsandbytes")))
"""


@pytest.fixture(scope="module")
def phi3_folder(tmp_path_factory, smollm2_tokenizer):
    folder = tmp_path_factory.mktemp("phi3")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("phi3"), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1 if parameter.ndim == 1 else 0, 0.15)
    model.save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    return folder


def adapter(folder, base, kwargs=None, **settings):
    """An adapter whose B isn't 0, and the model it is on."""
    folder.mkdir()
    model = load_model(str(base), kwargs or ModelKwargs(dtype="float32"))
    adapt_model(model, PeftConfig(r=4, **settings), seed=1)
    draw_lora_B(model, std=0.1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    save_adapter(model, folder, str(base))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "up_proj", "lm_head"]},
        {"use_dora": True},
        {"bias": "all", "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "o_proj"]},
    ],
)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_in_float32_it_computes_the_same(tmp_path, tiny_llama_folder, phi3_folder, family, settings):
    base = tiny_llama_folder if family == "llama" else phi3_folder
    tuned = adapter(tmp_path / "adapter", base, **settings)
    expected = logits(tuned)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", ModelKwargs(), "float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype == torch.float32
    assert relative_error(logits(plain), expected) < 1e-5
    with lora.disabled(tuned):
        assert relative_error(logits(tuned), expected) > 1e-3, "the adapter does something"


def test_it_is_rounded_once(tmp_path, phi3_folder):
    """Against PEFT's own merge, done in float32 and rounded afterwards."""
    adapter(tmp_path / "adapter", phi3_folder)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", ModelKwargs())
    plain = AutoModelForCausalLM.from_pretrained(phi3_folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert ours.dtype == torch.bfloat16
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        # The sum's order in fp32 may move a number over the edge between two of bfloat16.
        assert (tensor != expected[name].bfloat16()).float().mean() < 1e-3, name


def test_plain_transformers_answers_and_stops_as_the_tuned_model(tmp_path, tiny_llama_folder):
    tuned = adapter(tmp_path / "adapter", tiny_llama_folder)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", ModelKwargs())
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "merged")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[1] == "[]", "no PEFT, no phinetune"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    chat = [{"role": "user", "content": "What is 3 plus 4?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = tuned.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=[1, 2], pad_token_id=2)
    assert json.loads(said[0]) == expected[0, ids["input_ids"].shape[1] :].tolist()
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 2]
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["use_cache"]
    assert config["tie_word_embeddings"]
    assert not {"auto_map", "quantization_config"} & config.keys()


def test_phi3_stops_where_its_turns_end(tmp_path, phi3_tokenizer):
    torch.manual_seed(0)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(
        tiny_config("phi3", vocab_size=32064, eos_token_id=32000), dtype=torch.bfloat16
    ).save_pretrained(base)
    phi3_tokenizer.save_pretrained(base)
    adapter(tmp_path / "adapter", base)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", ModelKwargs())
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [32000, 32001, 32007]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == phi3_tokenizer.chat_template


def test_shards(tmp_path, tiny_llama_folder, monkeypatch):
    monkeypatch.setattr(merge, "SHARD_BYTES", 200_000)
    adapter(tmp_path / "adapter", tiny_llama_folder)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", ModelKwargs())
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    for shard in shards:
        with safe_open(tmp_path / "merged" / shard, "pt") as file:
            assert {index["weight_map"][key] for key in file.keys()} == {shard}  # noqa: SIM118
    monkeypatch.undo()
    merge_adapter(tmp_path / "adapter", tmp_path / "whole", ModelKwargs())
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("merged", "whole"))
    assert torch.equal(logits(one), logits(other))


def test_the_revision_that_the_adapter_was_made_for(tmp_path, phi3_folder):
    repository = tmp_path / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    for name, commit, dtype in (("main", "a" * 40, "float32"), ("v1", "b" * 40, "bfloat16")):
        (repository / "refs" / name).write_text(commit)
        snapshot = repository / "snapshots" / commit
        AutoModelForCausalLM.from_pretrained(phi3_folder, dtype=getattr(torch, dtype)).save_pretrained(snapshot)
    kwargs = ModelKwargs(cache_dir=str(tmp_path))
    adapter(tmp_path / "adapter", phi3_folder)
    path = tmp_path / "adapter" / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": "owner/tiny", "revision": "v1"}
    path.write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(phi3_folder).save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", kwargs)
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_an_adapter_on_4_bits_merges_onto_either_base(tmp_path, phi3_folder):
    """Against PEFT on transformers' model, whose linear layers are quantised and dequantised by bitsandbytes."""
    four_bit = ModelKwargs(dtype="bfloat16", load_in_4bit=True, bnb_4bit_compute_dtype="float32")
    tuned, far = adapter(tmp_path / "adapter", phi3_folder, four_bit), {}
    for name, dequantised in (("dequantised", True), ("base", False)):
        merge_adapter(tmp_path / "adapter", tmp_path / name, four_bit, "float32", dequantised=dequantised)
        oracle = AutoModelForCausalLM.from_pretrained(phi3_folder, dtype=torch.bfloat16)
        for module in oracle.modules() if dequantised else ():
            if isinstance(module, torch.nn.Linear) and module is not oracle.lm_head:
                codes, state = quantize_4bit(module.weight.detach(), quant_type="nf4", compress_statistics=True)
                module.weight.data = dequantize_4bit(codes, state)
        expected = logits(peft.PeftModel.from_pretrained(oracle.float(), tmp_path / "adapter"))
        merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / name))
        assert relative_error(merged, expected) < 1e-4
        far[name] = relative_error(merged, logits(tuned))
    assert far["dequantised"] < far["base"] / 5, "what was tuned computes in bfloat16 between its layers"


def test_from_the_command_line_the_better_base_is_picked(tmp_path, phi3_folder, chats):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {phi3_folder}\nmodel_kwargs: {{load_in_4bit: true, dtype: bfloat16}}\n"
        f"data: {{train: {chats}, eval: 0.1}}\n"
        f"training_config: {{output_dir: {tmp_path / 'run'}, max_steps: 4, learning_rate: 1.0e-2, use_cpu: true}}\n"
    )
    assert commands.phinetune("train", recipe).returncode == 0
    merged = commands.phinetune("merge", tmp_path / "run")
    assert merged.returncode == 0, merged.stderr
    losses = {
        line.split(":")[0].removeprefix("held-out loss on "): float(line.split()[-1])
        for line in merged.stdout.splitlines()[:2]
    }
    best = min(losses, key=losses.get)
    assert ("onto the dequantised base" in merged.stdout) == (best == "the base as 4 bits leave it")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run-merged").dtype == torch.bfloat16
    again = commands.phinetune("merge", tmp_path / "run")
    assert (again.returncode, "is there already" in again.stderr) == (2, True)
    wrong = commands.phinetune("merge", tmp_path / "run", "--onto", "nothing")
    assert (wrong.returncode, "give one of auto, base, dequantised" in wrong.stderr) == (2, True)


def test_what_stands_in_the_way_is_said_and_nothing_is_left(tmp_path, tiny_llama_folder, monkeypatch):
    adapter(tmp_path / "adapter", tiny_llama_folder)
    (tmp_path / "merged").mkdir()
    with pytest.raises(AdapterError, match="is there already"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", ModelKwargs())

    def save_file(*given, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "save_file", save_file)
    with pytest.raises(Exception, match="no space"):
        merge_adapter(tmp_path / "adapter", tmp_path / "other", ModelKwargs())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_a_base_whose_configuration_names_no_dtype(tmp_path, phi3_folder, smollm2_tokenizer):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(phi3_folder, dtype=torch.float32).save_pretrained(base)
    smollm2_tokenizer.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        weights = load_file(base / "model.safetensors")
        save_file({n: t + 1e-4 * torch.randn_like(t) for n, t in weights.items()}, base / "model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
    tuned = adapter(tmp_path / "adapter", base)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", ModelKwargs())
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118
    assert relative_error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(tuned)) < 1e-5


def test_a_generation_config_that_transformers_would_not_save(tmp_path, phi3_folder, smollm2_tokenizer):
    base = shutil.copytree(phi3_folder, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
    adapter(tmp_path / "adapter", base)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", ModelKwargs())
    found = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert (found["temperature"], found["top_p"], found["eos_token_id"]) == (0.9, 0.6, [1, 2])
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_the_base_is_not_merged_over(tmp_path, phi3_folder):
    base = shutil.copytree(phi3_folder, tmp_path / "base")
    adapter(tmp_path / "adapter", base)
    with pytest.raises(AdapterError, match="holds another model, which no merge wrote, so it is kept"):
        merge_adapter(tmp_path / "adapter", base, ModelKwargs(), overwrite=True)
    assert (base / "model.safetensors").read_bytes() == (phi3_folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "value"), [("base_model_name_or_path", 5), ("base_model_name_or_path", ["a"]), ("revision", ["a"])]
)
def test_a_base_that_is_no_name(tmp_path, phi3_folder, name, value):
    adapter(tmp_path / "adapter", phi3_folder)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(AdapterError, match="which are no names; save the adapter again"):
        load_tuned(tmp_path / "adapter", ModelKwargs())


def test_weights_that_are_not_finite_are_not_merged(tmp_path, phi3_folder):
    adapter(tmp_path / "adapter", phi3_folder)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="isn't finite"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", ModelKwargs())


def test_a_revision_that_is_asked_for_is_taken(tmp_path, phi3_folder):
    adapter(tmp_path / "adapter", phi3_folder)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "revision": "a" * 40}))
    assert base_of(tmp_path / "adapter", ModelKwargs())[1].revision == "a" * 40
    assert base_of(tmp_path / "adapter", ModelKwargs(revision="v2"))[1].revision == "v2"
    (tmp_path / "adapter" / "recipe.yaml").write_text("model: a/b\ndata: {train: a}\nmodel_kwargs: {revision: main}\n")
    kwargs = recipe_of(tmp_path / "adapter").model_kwargs
    assert base_of(tmp_path / "adapter", kwargs)[1].revision == "a" * 40, "main may be another commit by now"


def test_the_bases_sentencepiece_model_goes_along_unless_tokens_were_added(tmp_path, phi3_folder):
    base = shutil.copytree(phi3_folder, tmp_path / "base")
    (base / "tokenizer.model").write_bytes(b"pieces")
    adapter(tmp_path / "adapter", base)
    for overwrite in (False, True):  # it is a merge's own file, and may be replaced
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", ModelKwargs(), overwrite=overwrite)
        assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == b"pieces"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<order>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "other", ModelKwargs())
    assert AutoTokenizer.from_pretrained(tmp_path / "other").convert_tokens_to_ids("<order>") == len(tokenizer) - 1
    assert not (tmp_path / "other" / "tokenizer.model").exists()


def test_which_base_is_meant_is_read_without_the_tensors(tmp_path, phi3_folder):
    adapter(tmp_path / "adapter", phi3_folder)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert base_of(tmp_path / "adapter", ModelKwargs())[0] == str(phi3_folder)
