"""`phinetune doctor`: what it says is what is there."""

import json
import os

import pytest
import torch
from commands import phinetune

from phinetune.cli import doctor as cli
from phinetune.kernels import native, threads


def doctor(*arguments, **environment):
    ran = phinetune("doctor", *arguments, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_one_json_object_with_rates_and_the_share_training_reaches():
    found = json.loads(doctor("--json"))
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["gflops"]) == {"float32", "bfloat16", "int8"}
    assert all(rate > 1 for rate in found["gflops"].values())
    for dtype, names in found["kernels"].items():
        assert names == [name for name in native.KERNELS if native.library(name, getattr(torch, dtype)) is not None]
    assert found["kernels_in"] in (*native.INSTRUCTIONS, None)
    training = found["training"]
    assert 0.1 < training["share_of_rate"] < 1.2
    assert training["gflops"] / training["gflops_of_its_products"] == pytest.approx(training["share_of_rate"], abs=0.01)
    assert 0.5 < training["peak_gb"] < 4


def test_in_words_and_without_kernels(capsys):
    said = doctor("--no-training", PHINETUNE_COMPILE="0", OMP_NUM_THREADS="1")
    assert "1 threads (OMP_NUM_THREADS says so)" in said
    assert "C++ kernels   none: " in said
    assert "training" not in said
    found = json.loads(doctor("--no-training", "--json"))
    assert "\n".join(cli._lines(found)).count("\n") == 5


@pytest.mark.parametrize(
    ("affinity", "quota", "before", "expected"),
    [
        (64, "max 100000", 64, 64),
        (64, "200000 100000", 64, 2),
        (64, "150000 100000", 64, 2),
        (3, "max 100000", 64, 3),
        (64, "800000 100000", 4, 4),  # never more than torch takes
        (64, None, 8, 8),
    ],
)
def test_threads_are_what_this_process_may_use(monkeypatch, tmp_path, affinity, quota, before, expected):
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota)
    monkeypatch.setattr(threads, "QUOTAS", [[str(file)]])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    set_to = [before]
    monkeypatch.setattr(torch, "get_num_threads", lambda: set_to[-1])
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    words = threads.settle_threads()
    assert set_to[-1] == expected
    assert words.startswith(f"{expected} threads")
    assert ("torch would have taken" in words) == (expected < before)
