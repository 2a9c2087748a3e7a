"""`phinetune init`: a recipe that fits the machine and says of the data what a run will."""

import json
import re
from pathlib import Path

import pytest
import torch
from commands import phinetune

from phinetune.cli import init
from phinetune.data import prepare
from phinetune.recipe import load_recipe


def proposed(data, tmp_path, model=None):
    path = tmp_path / "recipe.yaml"
    init.write_recipe(data, path, model, overwrite=True)
    return load_recipe(path)[0], path.read_text()


@pytest.mark.parametrize(
    ("gigabytes", "hub", "model", "dtype"),
    [
        (14.0, True, "microsoft/Phi-3-mini-4k-instruct", "bfloat16"),
        (13.9, True, "smollm2", "auto"),
        (64.0, False, "smollm2", "auto"),
    ],
)
def test_the_model_goes_by_memory_and_by_what_can_be_had(chats, tmp_path, monkeypatch, gigabytes, hub, model, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("phinetune.machine.memory.memory_total", lambda: int(gigabytes * 1e9))
    monkeypatch.setattr("phinetune.hub.hub_answers", lambda: hub)
    recipe, _ = proposed(chats, tmp_path)
    assert (recipe.model, recipe.model_kwargs.dtype) == (model, dtype)


def test_it_counts_the_chats_that_a_run_can_use(tmp_path, capsys, smollm2_tokenizer):
    user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    rows = [
        *([[user, assistant]] * 5),
        [assistant, user],
        [user, user, assistant],
        [user, {"role": "assistant", "content": " "}],
        [user],
    ]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    recipe, _ = proposed(data, tmp_path, "smollm2")
    used = prepare(recipe.data.model_copy(update={"max_rejected": 1.0}), smollm2_tokenizer, 0).ledgers["train"].used
    assert used == 5
    said = capsys.readouterr().out
    assert f"{data}: {used} chats can be used, {len(rows) - used} can't" in said
    assert f"left out {data}:6: " in said


@pytest.mark.parametrize(
    ("data", "output"),
    [
        ("chats.jsonl", "runs/chats"),
        ("my.chats", "runs/my.chats"),
        (".", "runs/here"),
        ("my.chats/..", "runs/here"),
        ("my.chats/*.jsonl", "runs/my.chats"),
        ("*.jsonl", "runs/here"),
        ("m*s/*.jsonl", "runs/here"),
        ("phinetune:orders/train", "runs/train"),
    ],
)
def test_a_run_is_called_as_its_data(chats, tmp_path, monkeypatch, data, output):
    here = tmp_path / "here"
    (here / "my.chats").mkdir(parents=True)
    for name in ("chats.jsonl", "my.chats/more.jsonl"):
        (here / name).write_bytes(chats.read_bytes())
    monkeypatch.chdir(here)
    recipe, _ = proposed(Path(data), tmp_path, "smollm2")
    assert recipe.training_config.output_dir == output


def test_standard_input_has_no_name(chats, tmp_path):
    written = phinetune("init", "-", "-o", tmp_path / "recipe.yaml", "--model", "smollm2", input=chats.read_text())
    assert written.returncode == 0, written.stderr
    assert load_recipe(tmp_path / "recipe.yaml")[0].training_config.output_dir == "runs/mine"


@pytest.mark.parametrize(("rows", "share", "strategy"), [(40, 0.05, "epoch"), (39, 0, "no")])
def test_nothing_is_evaluated_where_nothing_is_held_out(chats, tmp_path, rows, share, strategy):
    chats.write_text("".join(chats.read_text().splitlines(keepends=True)[:rows]))
    recipe, text = proposed(chats, tmp_path, "smollm2")
    assert (recipe.data.eval, recipe.training_config.eval_strategy) == (share, strategy)
    assert ("eval_strategy" in text) == bool(share)


@pytest.mark.parametrize(("path", "what"), [("new/recipe.yaml", "the folder .* isn't there"), ("", "is a folder")])
def test_a_recipe_that_could_not_be_written_is_said_before_the_data_is_read(tmp_path, path, what):
    output = tmp_path / path
    refused = phinetune("init", tmp_path / "no.jsonl", "-o", output)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(rf"error: {re.escape(str(output))}: {what}; .*\n", refused.stderr)
