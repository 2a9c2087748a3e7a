"""The demo itself, from an installed wheel too: minutes long, so `make test-slow`."""

import json
import os
import re
import subprocess
import sys
import venv

import pytest
from conftest import ROOT

from phinetune.model.smollm2 import smollm2_folder


def check(folder):
    summary = json.loads((folder / "summary.json").read_text())
    base, tuned = summary["base"], summary["tuned"]
    assert tuned["exact_match"] >= 0.80
    assert tuned["exact_match"] >= base["exact_match"] + 0.60
    assert tuned["eval_loss"] < base["eval_loss"]
    assert summary["eval_rows"] >= 100
    assert summary["peak_gb"] < 4
    assert summary["seconds"] < 360


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 1, 2])
def test_three_seeds(tmp_path, seed):
    command = [sys.executable, "-m", "phinetune", "demo", "--seed", str(seed), "--output-dir", str(tmp_path / "run")]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    check(tmp_path / "run")
    said = re.search(r"expected: \d+ s, ([\d.]+) GB", (tmp_path / "run" / "train.log").read_text())
    assert 0.6 < float(said[1]) / json.loads((tmp_path / "run" / "summary.json").read_text())["peak_gb"] < 1.4
    assert shown.count("customer  ") == 3
    assert "phinetune init chats.jsonl" in shown


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_built_wheel_runs_the_demo_elsewhere(tmp_path):
    def run(*command, **options):
        return subprocess.run([str(part) for part in command], check=True, **options)

    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("phinetune-*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    fresh = {**os.environ, "PHINETUNE_CACHE": str(tmp_path / "cache")}  # the embedded model is downloaded, too
    run(tmp_path / "env" / "bin" / "phinetune", "demo", cwd=tmp_path, env=fresh)
    check(tmp_path / "runs" / "demo")


def test_the_embedded_model_is_cached_whole():
    folder = smollm2_folder()
    assert (folder / "model.safetensors").stat().st_size > 500_000_000
    assert (folder / "tokenizer.json").is_file()
