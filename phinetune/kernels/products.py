"""Matrix products in half precision on CPUs that have none.

torch multiplies bfloat16 on a CPU without AVX-512 or AMX element by element: on an AMD Zen 3 at 13 to 19 GFLOP/s where
one operand is a transposed view, and at 0.4 where it isn't, as in every backward pass (fp32: 140; docs/log.md).  There
we multiply panels in fp32 and round each sum once:

                 b_KN   panels of columns
                 ┌──┬──┬──┐
    a_MK  ┌───┐  │  │  │  │      each cell of y: a panel of rows of a times a panel of columns of b, both cast to
   panels │   │  └──┴──┴──┘      fp32 while they are needed; panels and cells have about `PANEL_BYTES` each, or
                                   `SMALLEST_PANEL` rows where those are more
  of rows ├───┤  ┌──┬──┬──┐
          │   │  │  │  │  │ y_MN
          └───┘  └──┴──┴──┘
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

PANEL_BYTES = 1_500_000
SMALLEST_PANEL = 96  # rows: below it fp32 products lose their speed


def product(a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a @ b (+ bias), (M, N), in a's dtype; written into `out` (some columns of a matrix, say) where one is given."""
    if not _needs_panels(a_MK):
        return torch.mm(a_MK, b_KN, out=out) if bias_N is None else torch.addmm(bias_N, a_MK, b_KN, out=out)
    y_MN = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1]) if out is None else out
    for rows, columns, cell in _cells(a_MK, b_KN):
        y_MN[rows, columns] = cell if bias_N is None else cell + bias_N[columns]
    return y_MN


def add_product_(y_MN: Tensor, a_MK: Tensor, b_KN: Tensor, alpha: float = 1.0) -> Tensor:
    """y += alpha · a @ b, in place."""
    if not _needs_panels(a_MK):
        return y_MN.addmm_(a_MK, b_KN, alpha=alpha)
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


def _needs_panels(a_MK: Tensor) -> bool:
    if torch.compiler.is_compiling():  # a graph should hold the product and not its panels
        return False
    return a_MK.device.type == "cpu" and _is_emulated(a_MK.dtype)


@functools.cache
def _is_emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU's products of a dtype are left to torch's element-wise loops, oneDNN having none."""
    if dtype is torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype is torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()
