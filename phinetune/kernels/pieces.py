"""Memory of tensors with a row for each token of a flat batch, used again from batch to batch on a CPU.

glibc gives an aligned tensor a hole only where that is larger than it by the alignment, so what one batch's activations
leave doesn't serve the next batch's, and a sixth of the memory of a step was holes (docs/log.md).  Here a tensor that
is gone leaves its memory to the next one of as many bytes a row.
"""

import ctypes
import math
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LEAST = 1 << 16  # bytes: smaller ones are left to the C library
_shelves: dict[int, "_Shelf"] = {}  # by bytes of a row


def empty_rows(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor, of `like`'s dtype and device by default; its memory is used again when it is gone."""
    dtype = dtype or like.dtype
    row = math.prod(shape[1:]) * dtype.itemsize
    if like.device.type == "cpu" and row * shape[0] >= LEAST and hasattr(mmap, "MAP_ANONYMOUS"):
        shelf = _shelves.get(row) or _shelves.setdefault(row, _Shelf(row))
        if loan := shelf.lend(shape[0]):
            return torch.frombuffer(loan, dtype=dtype, count=math.prod(shape)).resize_(shape)
    return like.new_empty(shape, dtype=dtype)


def release_idle() -> None:
    """Gives the system back what no tensor holds."""
    for shelf in list(_shelves.values()):
        shelf.idle.clear()


class _Shelf:
    """Idle pieces of one size: as many rows as the largest batch so far, and some.  They come and go by single list
    operations, so threads don't disturb each other, nor a tensor that goes while another is made."""

    def __init__(self, row: int) -> None:
        self.row, self.rows = row, 0
        self.idle: list[mmap.mmap] = []
        self.loan: Any = None

    def lend(self, rows: int) -> Any:
        """A buffer of at least so many rows, whose memory is idle again when nobody holds it any more; None if the
        system refuses it."""
        if rows > self.rows:
            some = 1 << max(0, rows.bit_length() - 3)  # an eighth to a quarter of them
            self.rows = -(-rows // some) * some
            self.loan = _loan_of(self.row * self.rows, self._take_back)
            self.idle.clear()
        loan = self.loan
        try:
            while len(piece := self.idle.pop()) < ctypes.sizeof(loan):  # of before the batches grew
                pass
        except IndexError:
            if (new := _map(ctypes.sizeof(loan))) is None:
                return None
            piece = new
        lent = loan.from_buffer(piece)
        lent.piece = piece
        return lent

    def _take_back(self, piece: mmap.mmap) -> None:
        if len(piece) == self.row * self.rows:
            self.idle.append(piece)


def _loan_of(size: int, take_back: Callable[[mmap.mmap], None]) -> Any:
    """A class of buffers of so many bytes, which give their piece back in the end."""

    def end(self: Any) -> None:
        if piece := getattr(self, "piece", None):
            take_back(piece)

    return type("_Loan", (ctypes.Array,), {"_type_": ctypes.c_ubyte, "_length_": size, "__del__": end})


def _map(size: int) -> mmap.mmap | None:
    for make_room in (release_idle, lambda: None):
        try:
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            make_room()
    return None
