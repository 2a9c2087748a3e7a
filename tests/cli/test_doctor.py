"""`phinetune doctor`: what it says is what is there."""

import json
import os

import pytest
import torch
from commands import phinetune

from phinetune.cli import doctor as cli
from phinetune.kernels import native, threads
from phinetune.machine import control_groups, cores


def doctor(*arguments, **environment):
    ran = phinetune("doctor", *arguments, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_one_json_object_with_rates():
    check_json(json.loads(doctor("--no-training", "--json")))


@pytest.mark.slow
def test_the_share_that_training_reaches():
    found = json.loads(doctor("--json"))
    check_json(found)
    training = found["training"]
    assert 0.1 < training["share_of_rate"] < 1.2
    assert training["gflops"] / training["gflops_of_its_products"] == pytest.approx(training["share_of_rate"], abs=0.01)
    assert 0.5 < training["peak_gb"] < 4


def check_json(found):
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["gflops"]) == {"float32", "bfloat16", "int8"}
    assert all(rate > 1 for rate in found["gflops"].values())
    for dtype, names in found["kernels"].items():
        assert names == [name for name in native.KERNELS if native.library(name, getattr(torch, dtype)) is not None]
    assert found["kernels_in"] in (*native.INSTRUCTIONS, None)


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
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cores, "control_groups", lambda controller: [tmp_path])
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


@pytest.mark.parametrize(
    ("own", "written", "expected"),
    [
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a/b\n", {"cpu.max": "900000 100000", "a/cpu.max": "500000 100000", "a/b/cpu.max": "400000 100000"}, 4),
        ("0::/a\n", {"b/cpu.max": "100000 100000"}, 1 << 30),
        (
            "4:cpu,cpuacct:/a\n3:memory:/b\n0::/\n",
            {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000", "cpu/b/cpu.cfs_quota_us": "1"},
            3,
        ),
        (
            "4:cpu,cpuacct:/host/path\n",
            {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"},
            2,
        ),
        (None, {"cpu.max": "200000 100000"}, 2),
    ],
)
def test_the_share_of_a_container_is_the_least_of_its_groups_and_those_above(
    monkeypatch, tmp_path, own, written, expected
):
    monkeypatch.setattr(control_groups, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(control_groups, "OWN_CGROUPS", tmp_path / "own")
    if own is not None:
        (tmp_path / "own").write_text(own)
    for name, content in written.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert cores.share_of_container() == expected


def test_a_compiler_is_asked_for_only_where_it_would_help():
    found = {"device": "cpu", "compiler": None, "kernels_in": None}
    assert "which this processor hasn't" in cli._why_no_kernels(found)
    assert "install g++" in cli._why_no_kernels({**found, "kernels_in": "avx2"})
    assert "couldn't be compiled" in cli._why_no_kernels({**found, "kernels_in": "avx2", "compiler": "g++"})
