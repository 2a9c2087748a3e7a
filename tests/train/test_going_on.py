"""What a run goes on from, and what may have changed meanwhile; what it goes on without."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
from conftest import tiny_model

import phinetune
from phinetune import lora
from phinetune.data import Example
from phinetune.errors import CheckpointError, RecipeError, RunError
from phinetune.model import adapt_model
from phinetune.recipe import PeftConfig, TrainingConfig, make_recipe
from phinetune.train.checkpoint import Base, checkpoint_bytes, save_checkpoint
from phinetune.train.loop import OutOfMemory
from phinetune.train.optimiser import learning_rates, make_optimizer
from phinetune.train.rehearsal import longest_rows

TINY = {
    "use_cpu": True, "disable_tqdm": True, "learning_rate": 2e-3, "save_strategy": "steps", "save_steps": 2,
    "max_steps": 4, "save_total_limit": 9,
}  # fmt: skip


def run(folder, model, chats, *, config=None, rehearsal=False, **given):
    return phinetune.finetune(
        model=str(model), train=str(chats), training_config={**TINY, "output_dir": str(folder), **(config or {})},
        peft_config={"r": 4}, rehearsal=rehearsal, **given,
    )  # fmt: skip


def cut_back(folder, step):
    """As if it had been killed behind a step."""
    for path in folder.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)


def test_losses_of_other_held_out_rows_are_not_compared(tmp_path, tiny_llama_folder, chats, caplog):
    lines = chats.read_text().splitlines(keepends=True)
    held = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    held[0].write_text("".join(lines[:4]))
    held[1].write_text("".join(lines[4:8]))
    config = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run(
        tmp_path / "run", tiny_llama_folder, chats, config=config, eval=str(held[0]), data={"held_out_in_train": "keep"}
    )
    cut_back(tmp_path / "run", 2)
    state = tmp_path / "run" / "checkpoint-2" / "state.json"
    assert json.loads(state.read_text())["best"]["step"] == 2
    run(tmp_path / "run", tiny_llama_folder, chats, config=config, eval=str(held[1]),
        data={"held_out_in_train": "keep"}, resume=True)  # fmt: skip
    assert "what evaluated best is looked for anew" in caplog.text
    evaluated = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluated if "eval_loss" in line] == [2, 4], "and taken again behind step 2"


def test_flat_batches_may_grow_again_unless_memory_was_refused(tmp_path, tiny_llama_folder, chats, caplog):
    run(tmp_path / "run", tiny_llama_folder, chats, data={"max_batch_tokens": 64})
    for refused, expected in ((False, 512), (True, 64)):
        cut_back(tmp_path / "run", 2)
        path = tmp_path / "run" / "checkpoint-2"
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**state, "memory_was_refused": refused}))
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["sha256"]["state.json"] = phinetune.files.sha256_of(path / "state.json")
        (path / "manifest.json").write_text(json.dumps(manifest))
        run(tmp_path / "run", tiny_llama_folder, chats, data={"max_batch_tokens": 512}, resume=True)
        after = json.loads((tmp_path / "run" / "checkpoint-4" / "state.json").read_text())
        assert (after["max_batch_tokens"], after["memory_was_refused"]) == (expected, refused)
        assert ("flat batches of 512 tokens, 64 before" in caplog.text) is not refused
        caplog.clear()


def test_a_model_is_known_by_what_it_is_and_not_by_where(tmp_path, tiny_llama_folder, chats):
    run(tmp_path / "run", tiny_llama_folder, chats)
    cut_back(tmp_path / "run", 2)
    moved = shutil.copytree(tiny_llama_folder, tmp_path / "moved")
    assert run(tmp_path / "run", moved, chats, resume=True).summary["steps"] == 4
    cut_back(tmp_path / "run", 2)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match=r"belongs to another run .*version of the model"):
        run(tmp_path / "run", moved, chats, resume=True)


def test_an_earlier_checkpoint_gives_up_what_came_later_before_the_first_step(tmp_path, tiny_llama_folder, chats):
    run(tmp_path / "run", tiny_llama_folder, chats)
    folder, seen = tmp_path / "run", []

    def look(*given, **named):
        seen.append(sorted(path.name for path in folder.iterdir() if path.name in ("checkpoint-4", "summary.json")))
        raise OutOfMemory("enough seen")

    with pytest.MonkeyPatch.context() as patched, pytest.raises(RunError, match="enough seen"):
        patched.setattr("phinetune.train.loop.training_step", look)
        run(
            folder,
            tiny_llama_folder,
            chats,
            resume=folder / "checkpoint-2",
            data={"max_batch_tokens": 1},
        )
    assert seen == [[]]


def test_settings_that_peft_writes_as_sets_are_the_same_in_every_process(tmp_path):
    given = peft.LoraConfig(target_modules=["q_proj", "v_proj", "k_proj", "o_proj", "up_proj"], r=4).to_dict()
    assert isinstance(given["target_modules"], set)
    recipe, _ = make_recipe({"model": "a", "data": {"train": "a"}, "peft_config": given})
    assert recipe.peft_config.target_modules == ["k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_a_home_folder_is_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = {"output_dir": "~/runs/mine", "logging_dir": "~/logs"}
    recipe, _ = make_recipe({"model": "a", "data": {"train": "a"}, "training_config": config})
    assert recipe.training_config.output_dir == str(tmp_path / "runs" / "mine")
    assert recipe.training_config.logging_dir == str(tmp_path / "logs")


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_checkpoint_takes_what_is_said_before_it_is_written(tmp_path, family):
    model = tiny_model(family, hidden_size=256, intermediate_size=1024)
    parts = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapt_model(model, PeftConfig(r=32, target_modules=parts), seed=1)
    optimizer = make_optimizer(model, TrainingConfig(), PeftConfig())
    sum(p.square().sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()
    path = save_checkpoint(tmp_path, 1, model, optimizer, {}, Base("tiny", None), keep=None)
    taken = sum(file.stat().st_size for file in path.iterdir())
    assert taken <= checkpoint_bytes(model) < 1.02 * taken + (1 << 20)
    if family == "phi3":  # three A beside one another, and a B of all rows for each
        assert any(
            isinstance(layer, lora.Linear) and len(layer.factors().lora_A) == 96 for _, layer in lora.lora_layers(model)
        )


class Rows(list):
    @property
    def lengths(self):
        return [len(row.ids) for row in self]


@pytest.mark.parametrize(
    ("lengths", "tokens", "expected"),
    [
        ([520, 510, 505, 500], 1024, [520, 500]),  # as best fit lays them
        ([1, 3, 2], 5, [3, 2]),
        ([9, 3], 5, [9]),
        ([4, 4, 4], 8, [4, 4]),
    ],
)
def test_the_longest_rows_fill_a_flat_batch(lengths, tokens, expected):
    rows = Rows(Example("a", list(range(length)), [True] * length) for length in lengths)
    assert [len(row.ids) for row in longest_rows(rows, tokens)] == expected


def test_memory_refused_to_a_model_that_takes_a_row_at_a_time(tmp_path, smollm2_tokenizer, chats, monkeypatch, caplog):
    from transformers import AutoModelForCausalLM, GPT2Config

    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=49152, n_embd=16, n_layer=1, n_head=2, n_positions=256)
    )
    model.save_pretrained(tmp_path / "gpt2")
    smollm2_tokenizer.save_pretrained(tmp_path / "gpt2")

    def refuse(model, batch):
        raise MemoryError("none left")

    monkeypatch.setattr("phinetune.train.loop.loss_sum", refuse)
    with pytest.raises(RunError, match=r"a row of .* doesn't fit into memory \(none left\)"):
        run(tmp_path / "run", tmp_path / "gpt2", chats)
    assert "memory was refused for a flat batch" not in caplog.text


def test_what_is_asked_of_rows_that_are_not_held_out_is_said(tmp_path, tiny_llama_folder, chats, caplog):
    config = {"eval_strategy": "epoch", "max_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 2}
    run(tmp_path / "run", tiny_llama_folder, chats, config=config, evaluation={"metrics": ["exact_match"]})
    assert "no rows are held out, so evaluation.metrics and training_config.eval_strategy do nothing" in caplog.text
    assert "constant has no warmup" in caplog.text
    rates = learning_rates(TrainingConfig(lr_scheduler_type="constant_with_warmup", warmup_steps=2), 4)
    assert [rates(0) < rates(1), rates(2) == rates(3)] == [True, True]


def test_a_function_that_isnt_there_is_missed_before_the_model_is_loaded(tmp_path, chats, monkeypatch):
    monkeypatch.setattr("phinetune.train.finetune.load_model", lambda *given: pytest.fail("the model was loaded"))
    with pytest.raises(RecipeError, match=r"score.py is no Python file"):
        run(tmp_path / "run", "smollm2", chats, eval=0.1, evaluation={"metrics": [f"{tmp_path}/score.py:f1"]})


def test_a_row_that_isnt_text_and_a_name_that_isnt_utf8_dont_end_a_run(tmp_path, tiny_llama_folder, chats):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    odd.write_bytes(chats.read_bytes() + b'{"\\ud83d": 1}\n')
    run(tmp_path / "run", tiny_llama_folder, odd, config={"max_steps": 1}, data={"max_rejected": 0.1})
    log = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    assert "caf\\udce9.jsonl:41: has no" in log and "it has \\ud83d" in log


def test_the_first_row_may_be_anything(tmp_path, tiny_llama_folder, chats):
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    for first in (None, {}):
        done = phinetune.finetune(
            model=str(tiny_llama_folder), train=[first, *rows], data={"max_rejected": 0.1},
            training_config={**TINY, "max_steps": 1, "output_dir": str(tmp_path / str(first))},
        )  # fmt: skip
        rejected = [json.loads(line) for line in (done.folder / "rejected.jsonl").read_text().splitlines()]
        assert [row["where"] for row in rejected] == ["row:1"] and done.summary["rows"] == len(rows)


RECIPE = """
model: {model}
model_kwargs: {{dtype: float32}}
data: {{train: {chats}}}
training_config: {{output_dir: {run}, max_steps: 5000, logging_steps: 1, learning_rate: 1.0e-5, use_cpu: true}}
peft_config: {{r: 4}}
"""


def test_a_run_goes_on_without_its_screen(tmp_path, tiny_llama_folder, chats):
    """As behind `2>&1 | tee log`, where Ctrl-C ends `tee` first."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_llama_folder, chats=chats, run=tmp_path / "run"))
    read, write = os.pipe()
    command = [sys.executable, "-m", "phinetune", "train", str(recipe), "--no-rehearsal"]
    process = subprocess.Popen(command, stderr=write, stdout=write, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(write)
    screen = b""
    while b"step 2/" not in screen:
        screen += os.read(read, 1 << 16)
    os.close(read)
    log = tmp_path / "run" / "train.log"
    lines = len(log.read_text().splitlines())
    while len(log.read_text().splitlines()) < lines + 20:  # it goes on
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert list((tmp_path / "run").glob("checkpoint-*/manifest.json"))


def test_a_run_that_ended_while_it_began_can_be_overwritten(tmp_path, tiny_llama_folder, chats):
    run(tmp_path / "run", tiny_llama_folder, chats, config={"max_steps": 1})
    for name in ("train.log", "ledger.json"):
        (tmp_path / "run" / name).unlink()
    run(tmp_path / "run", tiny_llama_folder, chats, config={"max_steps": 1}, overwrite=True)
    (tmp_path / "run" / "run.json").write_text('{"of": "another tool"}')
    (tmp_path / "run" / "train.log").unlink()
    with pytest.raises(RecipeError, match="holds no run of phinetune's"):
        run(tmp_path / "run", tiny_llama_folder, chats, config={"max_steps": 1}, overwrite=True)
