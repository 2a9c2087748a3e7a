"""What a container may use of the machine's memory."""

import pytest

from phinetune.machine import control_groups, memory
from phinetune.machine.memory import memory_free, memory_total

GB = 10**9


def containers(monkeypatch, folder, own, groups):
    """A tree of control groups, in which this process is where `own` says."""
    monkeypatch.setattr(control_groups, "CGROUPS", folder / "cgroup")
    monkeypatch.setattr(control_groups, "OWN_CGROUPS", folder / "own")
    (folder / "own").write_text(own)
    for name, content in groups.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


def machine(monkeypatch, total, available):
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": total}
    monkeypatch.setattr(memory.os, "sysconf", pages.__getitem__)
    read = memory._read
    meminfo = f"MemTotal: {total // 1024} kB\nMemAvailable: {available // 1024} kB\n"
    monkeypatch.setattr(memory, "_read", lambda path: meminfo if str(path) == "/proc/meminfo" else read(path))


def test_the_narrowest_of_all_groups_above_counts(monkeypatch, tmp_path):
    machine(monkeypatch, 64 * GB, 50 * GB)
    groups = {
        "user/memory.max": 8 * GB,
        "user/memory.current": 7 * GB,
        "user/memory.stat": f"anon {3 * GB}\nactive_file {GB}\ninactive_file {2 * GB}\nslab_reclaimable 0",
        "user/own/memory.max": 6 * GB,
        "user/own/memory.current": GB,
        "user/own/memory.stat": "anon 0",
        "user/other/memory.max": GB,
        "user/own/below/memory.max": "max",
    }
    containers(monkeypatch, tmp_path, "0::/user/own/below\n", groups)
    assert memory_total() == 6 * GB
    assert memory_free() == 4 * GB, "of 8 GB others take 4, the page cache aside, and of 6 GB 1"


def test_version_1_of_control_groups(monkeypatch, tmp_path):
    machine(monkeypatch, 64 * GB, 50 * GB)
    groups = {
        "memory/job/memory.limit_in_bytes": 4 * GB,
        "memory/job/memory.usage_in_bytes": 3 * GB,
        "memory/job/memory.stat": f"active_file 5\ntotal_active_file {GB}\ntotal_inactive_file {GB}",
        "memory/other/memory.limit_in_bytes": GB,
        "memory/other/memory.usage_in_bytes": GB,
    }
    containers(monkeypatch, tmp_path, "5:cpu:/other\n4:memory:/job\n", groups)
    assert (memory_total(), memory_free()) == (4 * GB, 3 * GB)


@pytest.mark.parametrize("own", ["0::/\n", "4:memory:/not/mounted\n0::/\n", "nonsense\n"])
def test_without_a_limit_it_is_the_machine(monkeypatch, tmp_path, own):
    machine(monkeypatch, 64 * GB, 50 * GB)
    containers(monkeypatch, tmp_path, own, {"memory.current": GB})
    assert memory_total() == 64 * GB
    assert memory_free() == pytest.approx(50 * GB, rel=1e-6)
