"""The guide's samples: the notebooks are the scripts, executed; each script runs on a small Phi-3, one on the embedded
model (`make examples` runs all of them there)."""

import ast
import contextlib
import io
import json
import os

import jupytext
import nbformat
import peft
import pytest
import torch
from commands import forked, run_code
from conftest import ROOT, tiny_model
from transformers import AutoModelForCausalLM, Phi3Config

SCRIPTS = sorted((ROOT / "examples" / "guide").glob("*.py"))
SAMPLE = ("sample_finetune", "phi3_finetune_lora")  # of those that run in `make test`
SEVEN = ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]


def script(name):
    return ROOT / "examples" / "guide" / f"{name}.py"


def run(file, folder, **environment):
    environment = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", **environment}
    said = forked(run_code, file, cwd=folder, env=environment)
    assert said.returncode == 0, said.stdout + said.stderr
    return said.stdout


@pytest.fixture
def small(tmp_path, smollm2_tokenizer):
    """A small random Phi-3 and some chats: what a sample is given in place of the Hub's."""
    tiny_model("phi3", "sdpa").save_pretrained(tmp_path / "phi3")
    smollm2_tokenizer.save_pretrained(tmp_path / "phi3")
    rows = [{"instruction": "Add 1.", "input": str(i), "output": f"That is {i + 1}."} for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return {"MODEL": str(tmp_path / "phi3"), "DATA": str(tmp_path / "rows.json")}


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_the_notebook_is_the_script_executed(file):
    notebook, own = nbformat.read(file.with_suffix(".ipynb"), as_version=4), jupytext.read(file)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in own.cells]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    said = "".join(output.get("text", "") for output in outputs)
    assert said
    for private in (str(ROOT), os.path.expanduser("~"), "/tmp/", "Traceback"):  # noqa: PTH111
        assert private not in said


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=() if f.stem in SAMPLE else pytest.mark.slow, id=f.stem) for f in SCRIPTS],
)
def test_each_runs_on_a_small_phi3(file, tmp_path, small):
    said = run(file, tmp_path, **small)
    assert "held-out loss" in said or "eval_loss" in said or "the same answers again: True" in said


def test_the_walk_through_on_the_embedded_model(tmp_path):
    said = run(script("loralib_walkthrough"), tmp_path, MODEL="smollm2")
    assert "921,600 of 135,436,608 parameters train" in said
    assert "the same answers as before it was saved: True" in said
    assert "the same answers again: True" in said


def test_the_lora_sample_adapts_what_its_list_names_on_phi3():
    """Seven projections of 32 layers at r 16, where PEFT finds two of them."""
    counted = script("phi3_finetune_lora").read_text(encoding="utf-8").split("# ## Training")[0]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(counted, "phi3_finetune_lora", "exec"), {})
    assert said.getvalue().startswith("29,884,416 trainable parameters in 128 layers: model.layers.0.self_attn")
    widths = [(3072, 3072)] * 4 + [(3072, 8192)] * 2 + [(8192, 3072)]
    assert 32 * sum(16 * (wide + out) for wide, out in widths) == 29_884_416
    notebook = nbformat.read(script("phi3_finetune_lora").with_suffix(".ipynb"), as_version=4)
    assert "29,884,416 trainable parameters" in str(notebook)

    with torch.device("meta"):
        phi3 = AutoModelForCausalLM.from_config(Phi3Config())
    theirs = peft.get_peft_model(phi3, peft.LoraConfig(r=16, target_modules=SEVEN, task_type="CAUSAL_LM"))
    assert theirs.get_nb_trainable_parameters()[0] == 8_912_896


def test_the_model_cards_dictionaries_are_unchanged():
    tree = ast.parse(script("sample_finetune").read_text(encoding="utf-8"))
    given = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    }
    assert given == {
        "training_config": {
            "bf16": True, "do_eval": False, "learning_rate": 5.0e-06, "log_level": "info", "logging_steps": 20,
            "logging_strategy": "steps", "lr_scheduler_type": "cosine", "num_train_epochs": 1, "max_steps": -1,
            "output_dir": "./checkpoint_dir", "overwrite_output_dir": True, "per_device_eval_batch_size": 4,
            "per_device_train_batch_size": 4, "remove_unused_columns": True, "save_steps": 100, "save_total_limit": 1,
            "seed": 0, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "gradient_accumulation_steps": 1, "warmup_ratio": 0.2,
        },
        "peft_config": {
            "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none", "task_type": "CAUSAL_LM",
            "target_modules": "all-linear", "modules_to_save": None,
        },
    }  # fmt: skip
