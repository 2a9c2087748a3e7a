"""Real processes, really killed: a resumed run ends in the same bytes as one that was never stopped."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from commands import Forked, command_line, forked, phinetune


def killed_at_loss(number, *arguments):
    """The command line, whose process kills itself at the N-th loss of the run, between two flat batches."""
    import phinetune.train.loop as loop

    real, calls = loop.loss_sum, 0

    def loss_sum(model, batch):
        nonlocal calls
        calls += 1
        if calls == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(model, batch)

    loop.loss_sum = loss_sum
    command_line(*arguments)


@pytest.fixture
def recipe(request, tmp_path, tiny_llama_folder, chats):
    """40 rows, 8 a step in several flat batches, dropout: 10 steps of some 4 batches, a checkpoint every 2."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
model: {tiny_llama_folder}
model_kwargs: {{dtype: {getattr(request, "param", "float32")}}}
data: {{train: {chats}, eval: 0.1, max_batch_tokens: 96}}
training_config:
  output_dir: {tmp_path / "run"}
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  num_train_epochs: 2
  learning_rate: 1.0e-3
  lr_scheduler_type: cosine
  warmup_steps: 2
  logging_steps: 3
  save_strategy: steps
  save_steps: 2
  use_cpu: true
peft_config: {{r: 4, lora_alpha: 8, lora_dropout: 0.1}}
"""
    )
    return path


def run(recipe, *arguments, kill_at=None):
    if kill_at is None:
        return phinetune("train", recipe, *arguments)
    return forked(killed_at_loss, kill_at, "phinetune", "train", recipe, *arguments)


def digest(folder):
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["loss"], line["grad_norm"], line["supervised_tokens"]) for line in lines if "loss" in line
    ]


@pytest.fixture(scope="module")
def wholes():
    return {}


@pytest.fixture
def whole(request, recipe, wholes, tmp_path_factory):
    """The run that nobody touched, made once a data type."""
    dtype = request.node.callspec.params["recipe"] if hasattr(request.node, "callspec") else "float32"
    if dtype not in wholes:
        folder = tmp_path_factory.mktemp("whole") / "run"
        finished = run(recipe, f"output_dir={folder}")
        assert finished.returncode == 0, finished.stderr
        wholes[dtype] = folder
    return wholes[dtype]


@pytest.mark.parametrize("recipe", ["float32", "bfloat16"], indirect=True)
def test_killed_in_mid_accumulation_and_resumed_gives_the_same_bytes(recipe, tmp_path, whole):
    folder = tmp_path / "run"
    # Some 4 flat batches a step, 5 steps an epoch: the kills are in the first epoch, and in the second.
    assert run(recipe, kill_at=14).returncode == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    killed_behind = sorted(p.name for p in folder.glob("checkpoint-*"))
    assert killed_behind == ["checkpoint-2"]
    again = run(recipe, "--resume", kill_at=17)
    assert again.returncode == -signal.SIGKILL
    assert "resuming behind step 2" in again.stderr
    assert "checkpoint-6" in {p.name for p in folder.glob("checkpoint-*")}
    last = run(recipe, "--resume")
    assert last.returncode == 0, last.stderr
    assert "resuming behind step 6" in last.stderr
    assert digest(folder) == digest(whole)
    assert losses(folder) == losses(whole)


@pytest.mark.slow
def test_verify_resume_proves_it_on_any_recipe(recipe):
    watched = ["eval_strategy=epoch", "load_best_model_at_end=true", "early_stopping_patience=2"]
    command = [sys.executable, "-m", "phinetune", "verify-resume", str(recipe), *watched, "--seed", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["equal"]
    assert found["resumed_behind"] <= found["killed_behind"] < 6
    assert [step["step"] for step in found["steps"]] == [1, 2, 3, 4, 5, 6]
    assert all(step["equal"] and step["loss"] == step["resumed_loss"] for step in found["steps"])
    assert all(whole == cut and len(whole) == 64 for whole, cut in (found["batches"], *found["files"].values()))


@pytest.mark.slow
def test_the_seed_decides_the_bytes(recipe, tmp_path, whole):
    assert run(recipe, f"output_dir={tmp_path / 'same'}").returncode == 0
    assert digest(tmp_path / "same") == digest(whole)
    assert run(recipe, f"output_dir={tmp_path / 'other'}", "seed=1").returncode == 0
    assert digest(tmp_path / "other") != digest(whole)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(recipe, tmp_path, whole):
    folder = tmp_path / "run"
    assert run(recipe, kill_at=30).returncode == -signal.SIGKILL
    newest = max(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    file = newest / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    resumed = run(recipe, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"{newest} is damaged (optimizer.safetensors has changed)" in resumed.stderr
    assert digest(folder) == digest(whole)
    shutil.copytree(max(folder.glob("checkpoint-*")), folder / "checkpoint-1")
    (folder / "checkpoint-1" / "state.json").write_text("{}")
    named = run(recipe, "--resume", str(folder / "checkpoint-1"))
    assert named.returncode == 2
    assert "checkpoint-1: can't be resumed: state.json has changed; give an earlier checkpoint" in named.stderr


def test_another_recipe_does_not_resume_it(recipe, tmp_path, whole):
    changed = run(recipe, f"output_dir={whole}", "learning_rate=5e-4", "--resume")
    assert changed.returncode == 2
    assert "learning_rate was 0.001, is 0.0005" in changed.stderr
    assert "Traceback" not in changed.stderr


def test_after_a_kill_for_memory_a_run_goes_on_with_smaller_batches(recipe, tmp_path):
    assert run(recipe, kill_at=30).returncode == -signal.SIGKILL
    resumed = run(recipe, "--resume", "data.max_batch_tokens=64")
    assert resumed.returncode == 0, resumed.stderr
    assert "flat batches of 64 tokens, 96 before: the same updates but for rounding" in resumed.stderr


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_and_says_so(recipe, tmp_path, sent, status):
    settings = ["num_train_epochs=400", "logging_steps=1", "save_strategy=no"]
    process = Forked(command_line, "phinetune", "train", recipe, *settings)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None, process.wait().stderr
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, sent)
    ended = process.wait(60)
    assert ended.returncode == status
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert f"stopped by {sent.name} behind {checkpoint.name}; go on with --resume" in ended.stderr
    assert "Traceback" not in ended.stderr
