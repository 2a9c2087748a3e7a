"""The rehearsal before the first step: it finds what would fail later, and leaves nothing behind."""

import json
import re

import pytest
import torch

import phinetune
from phinetune.errors import PhinetuneError, RunError
from phinetune.train import rehearsal
from phinetune.train.rehearsal import longest_rows

COMPARED = ["adapter_model.safetensors", "checkpoint-4/parameters.safetensors", "checkpoint-4/optimizer.safetensors"]


def run(folder, model, rows, rehearsal=True, **sections):
    training = {
        "output_dir": str(folder), "max_steps": 4, "use_cpu": True, "disable_tqdm": True, "learning_rate": 2e-3,
        "weight_decay": 0.1, "save_strategy": "steps", "save_steps": 2, **sections.pop("training_config", {}),
    }  # fmt: skip
    return phinetune.finetune(
        model=str(model), train=rows, training_config=training, rehearsal=rehearsal,
        peft_config={"r": 4, "lora_dropout": 0.1}, **sections,
    )  # fmt: skip


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_rehearsed_run_ends_in_the_same_bytes(tmp_path, tiny_llama_folder, chats, optim):
    ends = []
    for rehearsed in (True, False):
        folder = tmp_path / str(rehearsed)
        run(folder, tiny_llama_folder, str(chats), rehearsed, eval=0.1, training_config={"optim": optim},
            evaluation={"metrics": ["exact_match"], "max_new_tokens": 4})  # fmt: skip
        log = (folder / "train.log").read_text()
        assert ("rehearsal: step, evaluation, answers, checkpoint, merge" in log) == rehearsed
        assert not list(folder.glob(".tmp-*"))
        ends.append([(folder / name).read_bytes() for name in COMPARED])
    assert ends[0] == ends[1]


def test_a_resumed_run_is_rehearsed_and_ends_in_the_same_bytes(tmp_path, tiny_llama_folder, chats):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, tiny_llama_folder, str(chats), rehearsal=False)
    run(cut, tiny_llama_folder, str(chats), rehearsal=False)
    for path in (cut / "checkpoint-4").iterdir():
        path.unlink()
    (cut / "checkpoint-4").rmdir()
    run(cut, tiny_llama_folder, str(chats), resume=True)
    log = (cut / "train.log").read_text()
    assert log.rindex("resuming behind step 2") < log.rindex("rehearsal: ")
    for name in COMPARED:
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


def chat(words):
    return {"messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": " one" * words}]}


def test_the_longest_rows_are_tried():
    class Rows:
        lengths = torch.tensor([3, 9, 4, 9, 2])

        def __getitem__(self, place):
            return place

    assert longest_rows(Rows(), 22) == [1, 3, 2]
    assert longest_rows(Rows(), 5) == [1], "the longest in any case"


def test_no_more_is_tried_than_a_step_has(tmp_path, tiny_llama_folder):
    rows = [chat(words) for words in (10, 20, 30, 40)]
    run(tmp_path / "one", tiny_llama_folder, rows, training_config={"per_device_train_batch_size": 1})
    run(tmp_path / "all", tiny_llama_folder, rows, training_config={"per_device_train_batch_size": 4})
    said = [re.search(r"longest rows \(.* tokens in (\d)\)", (tmp_path / name / "train.log").read_text())[1]
            for name in ("one", "all")]  # fmt: skip
    assert said == ["1", "4"]


def test_a_row_that_would_fail_in_the_last_step_fails_in_the_rehearsal(tmp_path, tiny_llama_folder, monkeypatch):
    from phinetune.train import loop

    real = loop.loss_sum

    def loss_sum(model, batch):
        if batch.ids.numel() > 200:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, batch)

    monkeypatch.setattr(loop, "loss_sum", loss_sum)
    rows = [chat(10)] * 15 + [chat(300)]
    with pytest.raises(RunError, match=r"step 1: a row of 3\d\d tokens doesn't fit into memory"):
        run(tmp_path / "run", tiny_llama_folder, rows)
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "no step was made"


def test_a_checkpoint_that_cannot_be_written_is_known_before_the_first_step(
    tmp_path, tiny_llama_folder, chats, monkeypatch
):
    def save_checkpoint(*given):
        raise RunError("disk", "no space", "make room")

    monkeypatch.setattr(rehearsal, "save_checkpoint", save_checkpoint)
    with pytest.raises(PhinetuneError, match="no space"):
        run(tmp_path / "run", tiny_llama_folder, str(chats))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_no_rehearsal_from_the_command_line(tmp_path, tiny_llama_folder, chats):
    from typer.testing import CliRunner

    from phinetune.cli.app import app

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({
            "model": str(tiny_llama_folder), "data": {"train": str(chats)},
            "training_config": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "use_cpu": True},
        })
    )  # fmt: skip
    ran = CliRunner().invoke(app, ["train", str(recipe), "--no-rehearsal"])
    assert ran.exit_code == 0, ran.output
    assert " rehearsal: " not in (tmp_path / "run" / "train.log").read_text()
