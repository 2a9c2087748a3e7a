"""What ends a verb: SIGTERM also what it has started, with what was written for that; SIGINT a run that imports."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def children(pid):
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are looked up in /proc")
@pytest.mark.parametrize("verb", ["plan", "verify-resume"])
def test_nothing_is_left_of_what_it_started(tmp_path, tiny_llama_folder, chats, verb):
    recipe, temporary = tmp_path / "recipe.yaml", tmp_path / "temporary"
    temporary.mkdir()
    recipe.write_text(
        f"model: {tiny_llama_folder}\ndata: {{train: {chats}}}\n"
        f"training_config: {{output_dir: {tmp_path / 'run'}, use_cpu: true}}\n"
    )
    command = [sys.executable, "-m", "phinetune", verb, str(recipe)]
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        started = []
        while not (started and [*temporary.glob(f"phinetune-{verb.partition('-')[0]}-*")]):
            assert process.poll() is None, process.stderr.read()
            started = children(process.pid)
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert said.splitlines()[-1] == "stopped by SIGTERM"
    assert [*temporary.glob("phinetune-*")] == []
    for pid in started:
        until = time.monotonic() + 60
        while is_alive(pid) and time.monotonic() < until:
            time.sleep(0.05)
        assert not is_alive(pid)


INTERRUPTED_IN_A_CALLBACK = """
import os, signal, sys, weakref

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            watched = type("Watched", (), {})()
            reference = weakref.ref(watched, lambda _: os.kill(os.getpid(), signal.SIGINT))
            del watched

sys.meta_path.insert(0, Finder())
from phinetune.cli import main
sys.argv = ["phinetune", "train", sys.argv[1]]
main()
"""


def test_a_signal_during_imports_is_not_lost(tmp_path, tiny_llama_folder, chats):
    """Where Python prints and forgets what a signal's handler raises."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_llama_folder}\ndata: {{train: {chats}}}\n"
        f"training_config: {{output_dir: {tmp_path / 'run'}, use_cpu: true, max_steps: 1}}\n"
    )
    command = [sys.executable, "-c", INTERRUPTED_IN_A_CALLBACK, str(recipe)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGINT, ended.stderr
    assert not ended.stderr and not (tmp_path / "run").exists()
