"""How the C library hands memory to torch on a CPU, and how a refusal of it is told.

glibc maps every large block anew and gives it back when it is freed, so that each tensor of a training step costs a
page fault for each 4 KB of it: as long as several passes over it.  Kept and used again, the same memory costs nothing
(SmolLM2-135M on a Zen 5: 527 tokens a second before, 750 behind; docs/log.md).
"""

import ctypes
import sys

import torch

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# How torch, its compiler, oneDNN, cuBLAS and the C++ library say that memory was refused.
REFUSALS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "could not create a memory",
            "memoryerror", "cublas_status_alloc_failed")  # fmt: skip


def keep_freed_memory() -> bool:
    """Makes this process use freed memory again in place of giving it back; True where that could be set.

    It concerns what is allocated from then on, so it is best called before a model is loaded.  Other C libraries than
    glibc are left as they are.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed: on a GPU, or where the system limits what a process may have."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in REFUSALS)
