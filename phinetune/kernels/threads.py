"""How many threads torch computes with on a CPU.

torch takes as many as the machine has cores. In a container that may use a few of them, those threads wait for each
other's turn and everything takes several times as long, so the number is held to what this process may use.
"""

import math
import os

import torch

from phinetune.machine.control_groups import control_groups

# What a container may use, by both versions of control groups: "quota period" in one file, or in two.
QUOTAS = [["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]]


def settle_threads() -> str:
    """Lowers torch's number of threads where this process may use fewer cores; returns the number and why, in words."""
    threads = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if os.environ.get(name):
            return f"{threads} threads ({name} says so)"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed, why = min((cores, "of the cores that this process may use"), (_quota(), "of its container's share"))
    if allowed < threads:
        torch.set_num_threads(allowed)
        return f"{allowed} threads ({why}; torch would have taken {threads})"
    return f"{threads} threads (of {cores} cores)"


def _quota() -> int:
    """Cores that a container may use, rounded up; a large number where there is no limit."""
    cores = [1 << 30]
    for group in control_groups("cpu"):
        for files in QUOTAS:
            try:
                quota, period = map(int, " ".join((group / file).read_text(encoding="utf-8") for file in files).split())
            except (OSError, ValueError):  # no such group, or "max"
                continue
            if quota > 0:
                cores.append(max(1, math.ceil(quota / period)))
    return min(cores)
