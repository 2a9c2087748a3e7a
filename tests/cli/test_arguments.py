"""Names, words and terminals that aren't plain."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import phinetune

from phinetune.cli import demo
from phinetune.measure import verify
from phinetune.recipe import load_recipe


@pytest.fixture
def recipe(tmp_path, tiny_llama_folder, chats):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_llama_folder}\n"
        "model_kwargs: {dtype: float32}\n"
        f"data: {{train: {chats}, eval: 0.1}}\n"
        f"training_config: {{output_dir: {tmp_path / 'run'}, max_steps: 2, use_cpu: true}}\n"
        "evaluation: {metrics: [exact_match], max_new_tokens: 2}\n"
    )
    return path


def terminal(*arguments, given=b"", **environment):
    """A process of its own, whose streams are as the environment says."""
    command = [sys.executable, "-m", "phinetune", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, input=given, capture_output=True, check=False, env=environment)


def refused(ran, *parts):
    said = ran.stderr if isinstance(ran.stderr, str) else ran.stderr.decode()
    assert ran.returncode == 2, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1, "one line, no traceback"
    for part in parts:
        assert part in said


def test_signs_that_a_terminal_lacks_are_spelt_out(chats):
    ran = terminal("data", "check", str(chats), PYTHONIOENCODING="ascii")
    assert ran.returncode == 0, ran.stderr
    assert b"\\u2588" in ran.stdout, "a histogram's bar"


def test_bytes_that_are_no_text_are_not_asked(tiny_llama_folder):
    for option in ("--prompt", "--system"):
        refused(terminal("chat", str(tiny_llama_folder), option, b"caf\xe9"), f"{option}: is not UTF-8")
    asked = terminal("chat", str(tiny_llama_folder), given=b"caf\xe9\n", LC_ALL="C")
    refused(asked, "stdin: is not UTF-8")


def test_a_run_that_is_not_there_is_not_measured(tmp_path):
    refused(phinetune("evaluate", tmp_path / "typo"), f"{tmp_path / 'typo'}: no such folder")
    refused(phinetune("evaluate", tmp_path), f"{tmp_path}: holds no adapter")


def test_a_checkpoint_whose_path_has_an_equals_sign(recipe, tmp_path):
    run = tmp_path / "lr=1e-4"
    settings = [f"output_dir={run}", "save_strategy=steps", "save_steps=1", "evaluation.metrics=[exact_match]"]
    ran = phinetune("train", recipe, *settings)
    assert ran.returncode == 0, ran.stderr
    ran = phinetune("train", recipe, *settings, "--resume", run / "checkpoint-1")
    assert ran.returncode == 0, ran.stderr
    assert "step 2/2" in ran.stderr
    assert "step 1/2" not in ran.stderr
    refused(phinetune("train", recipe, run / "checkpoint-1"), "lr=1e-4/checkpoint-1", "unknown")
    no_setting = "override 'learning_rate': has no `=`; write key=value, such as learning_rate=1e-4"
    refused(phinetune("train", recipe, "learning_rate"), no_setting)
    refused(phinetune("train", recipe, "--resume", tmp_path / "checkpoint-9"), "no such checkpoint")

    saved = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(saved.replace("- exact_match", "- exact_match\n  - score.py:f1"))
    ran = phinetune("evaluate", run, "--json")
    assert ran.returncode == 0, ran.stderr
    assert "score.py:f1 isn't run from a recipe: --metric score.py:f1\n" in ran.stderr
    assert "exact_match" in json.loads(ran.stdout)["tuned"]
    assert "isn't run" not in phinetune("evaluate", run, "--no-answers").stderr, "it wasn't asked for"


def test_a_setting_may_be_longer_than_any_file_name(chats):
    ran = phinetune("data", "check", chats, f"chat_template_kwargs={{word: {'x' * 5000}}}")
    assert ran.returncode == 0, ran.stderr
    refused(phinetune("train", "nowhere.yaml", "--resume", f"data.train={'x' * 5000}"), "nowhere.yaml: no such recipe")


def test_a_page_that_could_not_be_written_is_said_first(tmp_path):
    page = tmp_path / "pages" / "page.html"
    refused(phinetune("data", "preview", "nowhere.jsonl", "--html", page), f"{page}: the folder {page.parent} isn't")


def test_a_model_whose_name_is_no_plain_yaml(recipe, tmp_path):
    model = tmp_path / "model #1: a"
    refused(phinetune("data", "check", recipe, "--model", model), f"model {model}: no such folder")


@pytest.mark.parametrize("name", ["try #1", "a: b", "[x]", "ñ '\" \\", "1e-4", "null", "😀"])
def test_a_folder_whose_name_is_no_plain_yaml(tmp_path, monkeypatch, recipe, name):
    folder = tmp_path / name
    asked = []

    def train(recipe, **options):
        asked.append(recipe.training_config.output_dir)
        raise KeyboardInterrupt

    monkeypatch.setattr("phinetune.train.train", train)
    monkeypatch.setattr("phinetune.cli.quiet.quiet_libraries", lambda: None)  # it would last
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(folder, None, False)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(Path(name), 1, False)
    assert asked == [str(folder), name]

    class Process:
        def __init__(self, command, **options):
            self.overrides = command[command.index(str(recipe)) + 1 :]

        def kill(self):
            pass

        wait = kill

    monkeypatch.setattr(verify.subprocess, "Popen", Process)
    folder.mkdir()
    with verify._started(recipe, [], folder / "whole") as process:
        assert load_recipe(recipe, process.overrides)[0].training_config.output_dir == str(folder / "whole")


def test_the_demo_is_talked_to_as_it_was_trained():
    shipped = Path(demo.__file__).parents[1] / "data" / "shipped" / "orders.train.jsonl"
    systems = {json.loads(line)["messages"][0]["content"] for line in shipped.read_text().splitlines()}
    command = shlex.split(demo._chat(Path("runs/demo"), load_recipe(demo._demo_recipe())[0]))
    assert command[:4] == ["phinetune", "chat", "runs/demo", "--compare"]
    assert command[-2] == "--system"
    assert systems == {command[-1]}
