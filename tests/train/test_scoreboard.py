"""A sample of the scoreboard (benchmarks/reliability; `make scoreboard` runs it in full): real runs, really ended."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, signals and mounts of Linux")


RELIABILITY = ROOT / "benchmarks" / "reliability"
TRL = ROOT / ".venv-trl"


def score(tmp_path, *sections, within=(), every=30):
    results = tmp_path / "results.json"
    few = ["--kills", "4", "--signals", "3", "--truncations", "3", "--flips", "6", "--every", str(every)]
    options = [*few, "--model", "small", "--results", str(results)]
    said = run([*within, sys.executable, str(RELIABILITY), *sections, *options])
    return json.loads(results.read_text()), said


def run(command):
    # Whether elementwise passes are compiled has nothing to do with what is lost, and takes a third of such short runs.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PHINETUNE_COMPILE": "0"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_killed_signalled_and_damaged(tmp_path):
    found, said = score(tmp_path, "kills", "signals", "corruption")
    assert (found["kills"], found["kills_lost"]) == (4, 0), said
    assert found["kills_most_steps_lost"] <= 3, "no more than lie between two saves"
    assert (found["signals"], found["signals_late"], found["signals_faults"]) == (3, 0, 0), said
    assert found["corruptions"] == 7 * 11
    assert (found["corruptions_missed"], found["corruptions_resumed_wrong"]) == (0, 0), said


def test_hostile_artefacts(tmp_path):
    found, said = score(tmp_path, "hostile", every=12)
    assert found["hostile"] > 12
    assert (found["hostile_run"], found["hostile_not_refused"]) == (0, 0), said


def test_killed_and_refused_in_a_save(tmp_path):
    unshare = ["unshare", "-rm"]
    if not shutil.which("strace") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("needs strace and user namespaces")
    found, said = score(tmp_path, "calls", "disk", within=unshare)
    assert found["call_kills"] >= 4
    assert (found["call_kills_lost"], found["order_files"], found["order_faults"]) == (0, 7, 0), said
    assert found["disk_full_points"] >= 3
    assert found["disk_full_lost"] == 0, said


@pytest.mark.slow
@pytest.mark.skipif(not (TRL / "installed").exists(), reason="make scoreboard-full installs TRL")
def test_trl_is_killed_in_the_same_way(tmp_path):
    model, results = tmp_path / "small-phi3", tmp_path / "results.json"
    run([sys.executable, str(RELIABILITY / "small_phi3.py"), str(model)])
    options = ["kills", "--kills", "4", "--results", str(results)]
    run([str(TRL / "bin" / "python"), str(RELIABILITY / "beside_trl.py"), str(model), *options])
    found = json.loads(results.read_text())
    assert found["trl_kills"] == 4
    died_of = {"FileNotFoundError", "ValueError", "JSONDecodeError"}  # docs/reliability.md: half a checkpoint
    assert set(found["trl_kills_reasons"]) <= died_of, "what else is lost is a fault of these trials"
