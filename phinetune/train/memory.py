"""Memory as phinetune counts it: the peak of anonymous plus shared memory over the process tree.

Mapped files (a model's weights read from the page cache) don't count: the system can drop them at will.  Of a run on a
GPU it is the GPU's memory that torch has given out to tensors.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

INTERVAL = 0.05  # seconds
CGROUPS = [  # (limit, use) of a container, in bytes, by both versions of control groups
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
]


class MemoryPeak:
    """Samples while a `with` block runs; `gb` is the peak so far, in units of 10⁹ bytes."""

    def __init__(self, device: Any = None) -> None:
        self._device = device
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-peak", daemon=True)

    def __enter__(self) -> "MemoryPeak":
        if _is_gpu(self._device):
            import torch

            if torch.cuda.is_initialized():  # else nothing was allocated, and workers are still to be forked
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

            return torch.cuda.max_memory_allocated(self._device) / 1e9 if torch.cuda.is_initialized() else 0.0
        self._peak = max(self._peak, memory_in_use())
        return self._peak / 1e9

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._peak = max(self._peak, memory_in_use())


def memory_in_use(device: Any = None) -> int:
    """RssAnon + RssShmem of this process and its children, in bytes; the peak resident size off Linux. Of a GPU, what
    tensors of this process take."""
    if _is_gpu(device):
        import torch

        return torch.cuda.memory_allocated(device)
    if not sys.platform.startswith("linux"):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return sum(_anonymous_and_shared(pid) for pid in _process_tree(os.getpid()))


def memory_free(device: Any = None) -> int:
    """Bytes that can still be had: of a GPU's memory, else of this machine's, or of what a container may use of it."""
    if _is_gpu(device):
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = _read("/proc/meminfo")
    free = [int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:")]
    for limit, used in CGROUPS:
        bounds = _read(limit).strip(), _read(used).strip()
        if all(bound.isdigit() for bound in bounds):
            # What the container uses counts its page cache too, which would be given up.
            free.append(int(bounds[0]) - min(int(bounds[1]), memory_in_use()))
    return min(free, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))  # off Linux what there is


def _is_gpu(device: Any) -> bool:
    return device is not None and device.type == "cuda"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _process_tree(pid: int) -> list[int]:
    pids = [pid]
    for known in pids:  # grows while it is walked
        for task in Path(f"/proc/{known}/task").glob("*/children"):
            try:
                pids += map(int, task.read_text().split())
            except OSError:
                pass
    return pids


def _anonymous_and_shared(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
