"""How many of the machine's cores this process may use."""

import math
import os

from phinetune.machine.control_groups import control_groups

# What a container may use, by both versions of control groups: "quota period" in one file, or in two.
QUOTAS = [["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]]


def cores() -> int:
    """As many as it may run on, and its container may use."""
    return min(cores_to_run_on(), share_of_container())


def cores_to_run_on() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_container() -> int:
    """Cores that a container may use, rounded up; a large number where there is no limit."""
    found = [1 << 30]
    for group in control_groups("cpu"):
        for files in QUOTAS:
            try:
                quota, period = map(int, " ".join((group / file).read_text(encoding="utf-8") for file in files).split())
            except (OSError, ValueError):  # no such group, or "max"
                continue
            if quota > 0:
                found.append(max(1, math.ceil(quota / period)))
    return min(found)
