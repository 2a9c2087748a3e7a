"""`phinetune.load` and `phinetune.merge`: what Python users get of a run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import phinetune as command
from transformers import AutoModelForCausalLM, pipeline

import phinetune
from phinetune.adapter import files_to_publish, recipe_of
from phinetune.errors import AdapterError, ModelError, RecipeError
from phinetune.lora import lora_layers
from phinetune.model import quantised_layers
from phinetune.model.smollm2 import smollm2_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama_folder):
    folder = tmp_path_factory.mktemp("run") / "sums"
    rows = [
        {"messages": [{"role": "user", "content": f"{i} and 1?"}, {"role": "assistant", "content": f"{i + 1}."}]}
        for i in range(12)
    ]
    phinetune.finetune(
        model=str(tiny_llama_folder),
        train=rows,
        model_kwargs={"dtype": "float32"},
        training_config={"output_dir": str(folder), "max_steps": 3, "learning_rate": 1e-2, "disable_tqdm": True},
    )
    return folder


def test_a_loaded_run_answers_in_transformers_pipeline(run, tiny_llama_folder):
    model, tokenizer = phinetune.load(run)
    assert not model.training
    assert model.dtype == torch.float32, "as it was tuned"
    assert len(list(lora_layers(model))) == 14
    # SmolLM2's turns end at <|im_end|>, 2, and its text at <|endoftext|>
    assert 2 in model.generation_config.eos_token_id
    assert model.generation_config.use_cache
    said = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        [{"role": "user", "content": "3 and 1?"}], max_new_tokens=3, do_sample=False
    )
    assert said[0]["generated_text"][-1]["role"] == "assistant"
    base, _ = phinetune.load(tiny_llama_folder, dtype="bfloat16")
    assert base.dtype == torch.bfloat16
    assert list(lora_layers(base)) == []


def test_settings_of_the_model_go_over_the_runs_own(run):
    model, _ = phinetune.load(run, torch_dtype="bfloat16", load_in_4bit=True)
    assert model.dtype == torch.bfloat16
    assert len(quantised_layers(model).names) == 14
    with pytest.raises(RecipeError, match="did you mean load_in_4bit"):
        phinetune.load(run, load_in_4bits=True)
    with pytest.raises(ModelError, match="no such folder"):
        phinetune.load("./nowhere")


def test_a_run_that_stayed_off_the_gpu_is_loaded_off_it(run, tmp_path, monkeypatch):
    from phinetune.adapter import tuned

    asked = []
    monkeypatch.setattr(tuned, "pick_device", lambda use_cpu: asked.append(use_cpu) or torch.device("cpu"))
    phinetune.load(run)
    other = shutil.copytree(run, tmp_path / "other")
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("use_cpu: false", "use_cpu: true"))
    phinetune.load(other)
    assert asked == [False, True]


def test_a_merged_model_is_replaced_if_that_is_asked_and_nothing_else_is(run, tmp_path):
    told = []
    merged = phinetune.merge(run, tmp_path / "merged", dtype="bfloat16", say=told.append)
    assert told == [f"wrote {merged}, onto the base"]
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16
    with pytest.raises(AdapterError, match="is there already"):
        phinetune.merge(run, merged)
    phinetune.merge(run, merged, dtype="float16", overwrite=True)
    assert json.loads((merged / "config.json").read_text())["dtype"] == "float16"
    (merged / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"holds notes\.txt, which no merge wrote"):
        phinetune.merge(run, merged, overwrite=True)
    assert (merged / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="holds no model"):
        phinetune.merge(run, tmp_path / "empty", overwrite=True)
    base = smollm2_folder()
    plain = shutil.copytree(base, tmp_path / "plain")
    with pytest.raises(AdapterError, match="holds another model, which no merge wrote"):
        phinetune.merge(run, plain, overwrite=True)
    assert {path.name for path in plain.iterdir()} == {path.name for path in base.iterdir()}
    for wrong in ({"onto": "top"}, {"dtype": "int8"}, {"onto": "dequantised"}):
        with pytest.raises(RecipeError):
            phinetune.merge(run, tmp_path / "other", **wrong)


def test_all_templates_of_a_tokenizer_are_merged_and_pushed(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    (other / "additional_chat_templates").mkdir()
    template = other / "additional_chat_templates" / "tool_use.jinja"
    template.write_text((other / "chat_template.jinja").read_text() + "{# with tools #}")
    assert files_to_publish(other)["additional_chat_templates/tool_use.jinja"] == template
    for overwrite in (False, True):  # what is replaced was written by merge
        merged = phinetune.merge(other, tmp_path / "merged", allow_template_mismatch=True, overwrite=overwrite)
        assert "additional_chat_templates/tool_use.jinja" in files_to_publish(merged, merged=True)


def test_a_run_by_the_name_of_dot(run, tmp_path, monkeypatch):
    other = shutil.copytree(run, tmp_path / "other")
    monkeypatch.chdir(other)
    assert phinetune.merge(".") == tmp_path / "other-merged"
    monkeypatch.chdir(other / "checkpoint-3")
    assert recipe_of(Path()) is not None


def test_rows_that_were_objects_are_no_held_out_rows(run, tmp_path):
    (tmp_path / "run").mkdir()
    for file in run.glob("*"):
        if file.is_file():
            (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    recipe = (run / "recipe.yaml").read_text()
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.replace("eval: null", "eval: 0.2"))
    said = command("evaluate", tmp_path / "run")
    assert said.returncode == 2
    assert "its rows (12 rows from Python) can't be read again" in said.stderr
    assert "--data" in said.stderr


def test_the_card_of_a_run(run):
    card = phinetune.model_card(run, "me/sums")
    assert card.startswith("---\n")
    assert "# sums" in card
