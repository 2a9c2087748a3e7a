"""A run's folder: one run's at a time, and true to all of its lives."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import Forked, command_line, forked, phinetune
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from phinetune import data as phinetune_data
from phinetune.model import revision_of, version_of
from phinetune.model.files import digest_of
from phinetune.recipe import ModelKwargs, TrainingConfig
from phinetune.train import folder as folder_of_run
from phinetune.train.best import Best
from phinetune.train.schedule import Schedule


@pytest.fixture
def recipe(tmp_path, tiny_llama_folder, chats):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_llama_folder}\nmodel_kwargs: {{dtype: float32}}\ndata: {{train: {chats}}}\n"
        f"training_config: {{output_dir: {tmp_path / 'deep' / 'run'}, max_steps: 6, save_steps: 2, use_cpu: true}}\n"
        "peft_config: {r: 4}\n"
    )
    return path


def stopping_at_loss(number, sent, *arguments):
    """The command line, which sends itself a signal at the N-th loss, and says that it took 1000 s and 50 GB so far."""
    import phinetune.train.loop as loop
    from phinetune.train.usage import Usage

    real, calls = loop.loss_sum, 0

    def loss_sum(model, batch):
        nonlocal calls
        calls += 1
        if calls == int(number):
            os.kill(os.getpid(), int(sent))
        return real(model, batch)

    loop.loss_sum = loss_sum
    Usage.so_far = lambda self: {"seconds": 1000.0, "peak_gb": 50.0}
    command_line(*arguments)


def is_stopped(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T")


def killed(recipe, loss=6):
    """A run that was killed behind its second step."""
    ended = forked(stopping_at_loss, loss, int(signal.SIGKILL), "phinetune", "train", recipe)
    assert ended.returncode == -signal.SIGKILL
    return recipe.parent / "deep" / "run"


@pytest.mark.parametrize("how", ["--resume", "--overwrite"])
def test_a_folder_is_one_runs_at_a_time(recipe, how):
    running = Forked(stopping_at_loss, 6, int(signal.SIGSTOP), "phinetune", "train", recipe)
    folder, deadline = recipe.parent / "deep" / "run", time.monotonic() + 120
    try:
        while not is_stopped(running.pid):
            assert running.poll() is None, running.wait().stderr
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert (folder / "checkpoint-2").is_dir()
        before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
        second = phinetune("train", recipe, how)
        assert second.returncode == 2
        assert second.stderr.startswith(f"error: output_dir {folder}: another run goes on in it; wait for it")
        assert before == sorted(path.relative_to(folder) for path in folder.rglob("*"))
    finally:
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    assert phinetune("train", recipe, how).returncode == 0


def test_bad_input_leaves_no_folder(recipe):
    failed = phinetune("train", recipe, "data.train=nowhere.jsonl")
    assert failed.returncode == 2
    assert not (recipe.parent / "deep").exists()


def test_what_a_resumed_run_took_counts_its_earlier_lives(recipe):
    folder = killed(recipe)
    assert json.loads((folder / "checkpoint-2" / "state.json").read_text())["usage"]["seconds"] == 1000.0
    assert phinetune("train", recipe, "--resume").returncode == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert 1000 < summary["seconds"] < 1300
    assert summary["peak_gb"] == 50.0


def test_what_earlier_lives_were_made_with_is_kept_and_said(recipe):
    folder = killed(recipe)
    about = json.loads((folder / "run.json").read_text())
    assert about["earlier"] == []
    other = {**about, "versions": {**about["versions"], "torch": "2.0.1"}, "device": "a card"}
    (folder / "run.json").write_text(json.dumps(other))
    resumed = phinetune("train", recipe, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "earlier updates of this run were made with torch 2.0.1, device a card" in " ".join(resumed.stderr.split())
    found = json.loads((folder / "run.json").read_text())
    assert found["begun"] == about["begun"]
    assert found["versions"] == about["versions"]
    assert [(e["torch"], e["python"]) for e in found["earlier"]] == [("2.0.1", about["python"])]
    assert "torch 2.0.1" in (folder / "report.html").read_text()


def test_a_damaged_run_json_is_no_reason_not_to_go_on(recipe, tmp_path):
    for number, damage in enumerate(["{", "[]", '{"versions": 3}', '{"versions": {}, "earlier": [3]}']):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "run.json").write_text(damage)
        assert folder_of_run._read_about(tmp_path / f"{number}") == {}
    folder = killed(recipe)
    (folder / "run.json").write_text("{")
    assert phinetune("train", recipe, "--resume").returncode == 0
    assert json.loads((folder / "run.json").read_text())["earlier"] == []


def test_another_model_under_the_same_name_does_not_resume_it(recipe, tmp_path, tiny_llama_folder):
    base = tmp_path / "base"
    for part in (AutoModelForCausalLM, AutoTokenizer):
        part.from_pretrained(tiny_llama_folder).save_pretrained(base)
    recipe.write_text(recipe.read_text().replace(str(tiny_llama_folder), str(base)))
    folder = killed(recipe)
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name] = weights[name] + 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    resumed = phinetune("train", recipe, "--resume")
    assert resumed.returncode == 2
    assert "belongs to another run (version of the model was" in resumed.stderr
    assert (folder / "checkpoint-2").is_dir()


def test_the_digest_of_large_files_sees_what_training_does(tmp_path):
    tensors = {f"layer.{n}": torch.randn(300_000) for n in range(20)}  # 24 MB

    def digest(changed):
        save_file({n: t + changed.get(n, 0) for n, t in tensors.items()}, tmp_path / "model.safetensors")
        return digest_of(str(tmp_path), {})

    (tmp_path / "config.json").write_text("{}")
    whole = digest({})
    assert digest(dict.fromkeys(tensors, 1e-6)) != whole
    assert digest({name: 1e-6 for name in tensors if not int(name[6:]) % 4}) != whole
    assert digest({}) == whole
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    assert digest({}) != whole
    (tmp_path / "x.gguf").write_bytes(b"GGUF" * 100)
    of_gguf = digest_of(str(tmp_path), {"gguf_file": "x.gguf"})
    (tmp_path / "config.json").write_text("{}")
    assert digest_of(str(tmp_path), {"gguf_file": "x.gguf"}) == of_gguf, "what lies beside it isn't its own"


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, tiny_llama_folder):
    repository = tmp_path / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    for name, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        (repository / "refs" / name).write_text(commit)
        AutoModelForCausalLM.from_pretrained(tiny_llama_folder).save_pretrained(repository / "snapshots" / commit)
    for revision, commit in ((None, "a" * 40), ("main", "a" * 40), ("v1", "b" * 40), ("b" * 40, "b" * 40)):
        kwargs = ModelKwargs(cache_dir=str(tmp_path), revision=revision)
        assert revision_of("owner/tiny", kwargs) == commit
        assert version_of("owner/tiny", kwargs) == commit
    assert revision_of(str(tiny_llama_folder), ModelKwargs()) is None


def test_a_run_on_a_branch_that_has_moved_goes_on_with_its_own_commit(recipe, tmp_path, tiny_llama_folder):
    repository = tmp_path / "hub" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
        if commit.startswith("b"):
            model.model.layers[0].mlp.up_proj.weight.data.mul_(1.1)
        for part in (model, AutoTokenizer.from_pretrained(tiny_llama_folder)):
            part.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs" / "main").write_text("a" * 40)
    at = f"owner/tiny\nmodel_kwargs: {{cache_dir: {tmp_path / 'hub'}, dtype: float32}}"
    text = recipe.read_text().replace("model_kwargs: {dtype: float32}\n", "")
    recipe.write_text(text.replace(str(tiny_llama_folder), at))
    folder = killed(recipe)
    (repository / "refs" / "main").write_text("b" * 40)
    resumed = phinetune("train", recipe, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] == "a" * 40
    named = phinetune("train", recipe, "model_kwargs.revision=main", "--resume")
    assert named.returncode == 2
    assert f"version of the model was '{'a' * 40}', is '{'b' * 40}'" in named.stderr


def test_steps_are_due_as_the_strategies_say(recipe):
    plan = phinetune_data.Plan([10] * 40, 0, TrainingConfig(num_train_epochs=2, per_device_train_batch_size=4), 512)
    assert len(plan) == 20

    def schedule(**config):
        return Schedule.of(TrainingConfig(**config), plan)

    by_steps = schedule(save_strategy="steps", save_steps=8, eval_strategy="steps", eval_steps=0.3, logging_steps=7)
    assert by_steps.save == {8, 16, 20}
    assert by_steps.evaluate == {6, 12, 18}
    assert by_steps.log == {1, 7, 14, 20}
    assert schedule(logging_first_step=False, logging_steps=10).log == {10, 20}
    assert schedule(save_strategy="epoch", eval_strategy="epoch").save == {10, 20}
    never = schedule(logging_strategy="no", save_strategy="no", eval_strategy="no")
    assert (never.log, never.evaluate, never.save) == (set(), set(), set())
    for settings, saves in (
        ({}, 2),
        ({"load_best_model_at_end": True}, 4),
        ({"early_stopping_patience": 1}, 3),
    ):
        assert by_steps.saves_behind(8, Best.of(TrainingConfig(**settings))) == saves
