"""Matrix products in half precision on CPUs that have none.

torch multiplies bfloat16 on a CPU without AVX-512 or AMX element by element: on an AMD Zen 3 at 13 to 19 GFLOP/s where
one operand is a transposed view, and at 0.4 where it isn't, as in every backward pass (fp32: 140; docs/log.md).  There
a C++ kernel multiplies in fp32 and rounds each sum once (cpp/products.cpp, 125); without a compiler, and for float16,
torch does, in panels:

                 b_KN   panels of columns
                 ┌──┬──┬──┐
    a_MK  ┌───┐  │  │  │  │      each cell of y: a panel of rows of a times a panel of columns of b, both cast to
   panels │   │  └──┴──┴──┘      fp32 while they are needed; panels and cells have about `PANEL_BYTES` each, or
                                   `SMALLEST_PANEL` rows where those are more
  of rows ├───┤  ┌──┬──┬──┐
          │   │  │  │  │  │ y_MN
          └───┘  └──┴──┴──┘
"""

import ctypes
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from phinetune.kernels import native

PANEL_BYTES = 1_500_000
ALMOST_ONE = 1 + 2**-23  # the float32 behind one: no difference once a sum is rounded to 16 bits
SMALLEST_PANEL = 96  # rows: below it fp32 products lose their speed


def product(
    a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None, out: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """alpha · a @ b (+ bias), (M, N), in a's dtype; written into `out` (some columns of a matrix, say) where one is
    given."""
    if not _is_left_to_us(a_MK):
        if bias_N is not None:
            return torch.addmm(bias_N, a_MK, b_KN, alpha=alpha, out=out)
        if alpha == 1:
            return torch.mm(a_MK, b_KN, out=out)
    y_MN = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1]) if out is None else out
    if not _is_left_to_us(a_MK):
        return y_MN.addmm_(a_MK, b_KN, beta=0, alpha=alpha)
    if _is_native(a_MK, b_KN, y_MN):
        return _native_product(a_MK, b_KN, bias_N, y_MN, alpha)
    for rows, columns, cell in _cells(a_MK, b_KN):
        y_MN[rows, columns] = cell.mul_(alpha) if bias_N is None else cell.mul_(alpha).add_(bias_N[columns])
    return y_MN


def add_product_(y_MN: Tensor, a_MK: Tensor, b_KN: Tensor, alpha: float = 1.0) -> Tensor:
    """y += alpha · a @ b, in place, each sum rounded once.

    A GPU's library adds to y by a kernel of its own where it is asked for exactly 1 · y: on an H200 that one rounds the
    product to 16 bits first, and of a y that is small beside it a third arrives (torch 2.11, CUDA 13.0; docs/log.md).
    """
    if not _is_left_to_us(a_MK):
        beta = ALMOST_ONE if y_MN.is_cuda and y_MN.element_size() == 2 else 1
        return y_MN.addmm_(a_MK, b_KN, beta=beta, alpha=alpha)
    if _is_native(a_MK, b_KN, y_MN):
        return _native_product(a_MK, b_KN, None, y_MN, alpha, adds=True)
    for rows, columns, cell in _cells(a_MK, b_KN):
        y_MN[rows, columns] = cell.mul_(alpha).add_(y_MN[rows, columns])
    return y_MN


def _cells(a_MK: Tensor, b_KN: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and fp32 product of each pair of panels."""
    elements = PANEL_BYTES // 4
    width = max(SMALLEST_PANEL, min(elements // max(1, a_MK.shape[1]), math.isqrt(elements)))
    for j in range(0, b_KN.shape[1], width):
        columns = slice(j, j + width)
        panel = b_KN[:, columns].float()
        for i in range(0, a_MK.shape[0], width):
            rows = slice(i, i + width)
            yield rows, columns, a_MK[rows].float() @ panel


class _Product(ctypes.Structure):
    """As in cpp/products.cpp."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("rows", "inner", "columns")),
        ("a", ctypes.c_void_p), ("a_row", ctypes.c_long),
        ("b", ctypes.c_void_p), ("b_row", ctypes.c_long), ("by_columns", ctypes.c_int),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p), ("y_row", ctypes.c_long),
        ("alpha", ctypes.c_float), ("adds", ctypes.c_int),
    ]  # fmt: skip


def _native_product(
    a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None, y_MN: Tensor, alpha: float = 1.0, adds: bool = False
) -> Tensor:
    assert y_MN.shape == (a_MK.shape[0], b_KN.shape[1]) and a_MK.shape[1] == b_KN.shape[0]  # else it reads past them
    a_MK = a_MK if a_MK.stride(1) == 1 else a_MK.contiguous()
    bias_N = None if bias_N is None else bias_N.detach().to(a_MK.dtype).contiguous()
    by_columns = b_KN.stride(0) == 1
    asked = _Product(
        a_MK.shape[0], *b_KN.shape, a_MK.data_ptr(), a_MK.stride(0),
        b_KN.data_ptr(), b_KN.stride(1 if by_columns else 0), by_columns,
        None if bias_N is None else bias_N.data_ptr(), y_MN.data_ptr(), y_MN.stride(0), alpha, adds,
    )  # fmt: skip
    native.call("products", "product", ctypes.byref(asked), torch.get_num_threads())
    return y_MN


def _is_native(a_MK: Tensor, b_KN: Tensor, y_MN: Tensor) -> bool:
    """Whether cpp/products.cpp is for these: numbers of bfloat16, y's rows and b's rows or columns in one piece."""
    plain = all(native.is_plain(t, torch.bfloat16) and t.numel() > 0 for t in (a_MK, b_KN, y_MN))
    laid = 1 in b_KN.stride() and y_MN.stride(1) == 1
    return plain and laid and native.library("products") is not None


def _is_left_to_us(a_MK: Tensor) -> bool:
    if torch.compiler.is_compiling():  # a graph should hold the product and not its panels
        return False
    return a_MK.device.type == "cpu" and native.is_emulated(a_MK.dtype)
