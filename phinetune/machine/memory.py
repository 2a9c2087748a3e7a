"""Memory as phinetune counts it: the peak of anonymous plus shared memory over the process tree.

Mapped files (a model's weights read from the page cache) don't count: the system can drop them at will.  Of a run on a
GPU it is the GPU's memory that torch has given out to tensors.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phinetune.machine.control_groups import control_groups

INTERVAL = 0.05  # seconds
# Limit and use of a container in bytes, and what of its use would be given up, by both versions of control groups.
CGROUP_FILES = [
    ("memory.max", "memory.current", ("active_file", "inactive_file", "slab_reclaimable")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
]


class MemoryPeak:
    """Samples while a `with` block runs; `gb` is the peak so far, in units of 10⁹ bytes.

    A child counts from the second sample on that it is in: where it has just been forked, to start a compiler, say,
    what it seems to take is its parent's.
    """

    def __init__(self, device: Any = None) -> None:
        self._device = device
        self._peak = 0
        self._counted: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-peak", daemon=True)

    def __enter__(self) -> "MemoryPeak":
        if _is_gpu(self._device):
            import torch

            if torch.cuda.is_initialized():  # else nothing was allocated, and asking would start CUDA
                torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def gb(self) -> float:
        if _is_gpu(self._device):
            import torch

            return torch.cuda.max_memory_allocated(self._device) / 1e9
        self._look()
        return self._peak / 1e9

    def _watch(self) -> None:
        before: set[int] = set()
        while not self._stop.wait(INTERVAL):
            children = set(_children())
            self._counted, before = children & before, children
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, _in_use([os.getpid(), *self._counted]))


def memory_in_use(device: Any = None) -> int:
    """RssAnon + RssShmem of this process and its children, in bytes; the peak resident size off Linux. Of a GPU, what
    tensors of this process take."""
    if _is_gpu(device):
        import torch

        return torch.cuda.memory_allocated(device)
    return _in_use([os.getpid(), *_children()])


def memory_free(device: Any = None) -> int:
    """Bytes that can still be had: of a GPU's memory, else of this machine's, or of what a container may use of it."""
    if _is_gpu(device):
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = _read(Path("/proc/meminfo"))
    free = [int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:")]
    free += [limit - used for limit, used in _containers()]
    return min(free, default=max(0, memory_total() - memory_in_use()))  # off Linux what this process leaves


def memory_total() -> int:
    """Bytes of this machine's memory, or of what a container may use of it."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([there, *(limit for limit, _ in _containers())])


def _containers() -> Iterator[tuple[int, int]]:
    """(limit, use) in bytes of each control group that this process is in."""
    for group in control_groups("memory"):
        for limit, used, given_up in CGROUP_FILES:
            bounds = _read(group / limit).strip(), _read(group / used).strip()
            if all(bound.isdigit() for bound in bounds):
                stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
                yield int(bounds[0]), int(bounds[1]) - sum(int(stat.get(name, 0)) for name in given_up)


def _is_gpu(device: Any) -> bool:
    return device is not None and device.type == "cuda"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")  # a process may bear any name
    except OSError:
        return ""


def _children() -> list[int]:
    """Of this process, and theirs; none off Linux."""
    pids = [os.getpid()]
    for known in pids:  # grows while it is walked
        with contextlib.suppress(OSError):  # it may end meanwhile
            for task in Path(f"/proc/{known}/task").glob("*/children"):
                pids += map(int, _read(task).split())
    return pids[1:]


def _in_use(pids: list[int]) -> int:
    if not sys.platform.startswith("linux"):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return sum(map(_anonymous_and_shared, pids))


def _anonymous_and_shared(pid: int) -> int:
    fields = (line.partition(":") for line in _read(Path(f"/proc/{pid}/status")).splitlines())  # none once it has ended
    rss = {name: int(size.split()[0]) * 1024 for name, _, size in fields if name in ("RssAnon", "RssShmem", "VmRSS")}
    whole = rss.pop("VmRSS", 0)
    return sum(rss.values()) if rss else whole  # gVisor tells no parts
