"""Frozen weights in int8: half the memory of bfloat16, and products at twice its rate on CPUs that have VNNI or AMX.

    y = x Wᵀ,   W[n, k] ≈ scale[n] · codes[n, k],   x[t, k] ≈ row[t] · q[t, k]

so Σ_k x W becomes row[t] · scale[n] · Σ_k q · codes, a sum of whole numbers, exact in int32.  Dettmers et al.,
"LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale" (2022): vector-wise quantisation (section 2.1), and
input columns with outliers taken out of it (section 3), here a fixed few, found anew for each x.  The gradient
dx = dy W has the channels in its sum, where no scale can be taken out of it: it is folded into dy before dy is
quantised, so that the same codes serve both ways.

    q_TK, without the outliers' columns    codes, in panels of channels        the sums are kept for one cell at a
          ┌─────────┐                            ┌──┬──┬──┐                     time, small enough for the cache; a
      T   │ 0     0 │  ×                       K │  │  │  │                     cell is scaled, its outliers added,
          └─────────┘                            └──┴──┴──┘                     in one pass over it
            K                                      N

Shape suffixes: T tokens, K summed over, N outputs, O outliers' columns; a weight is (N, K) as in `nn.Linear`.
"""

import functools
import logging
import math
import timeit
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels.compiled import compiled
from phinetune.kernels.products import add_product_, product
from phinetune.kernels.quantised import QuantisedWeight

log = logging.getLogger(__name__)

OUTLIERS = 8  # columns of x that are multiplied without rounding; more of them cost time and gain little (docs/log.md)
SAMPLE = 64  # rows in which they are looked for: what stands out does so in nearly all rows
ROWS, CELL = 2048, 1 << 21  # of the sums: rows at most, and elements (8 MB); fewer rows would pack the weight again
FEW = 4  # rows: up to so many, as in generation, x isn't rounded, since reading the weight is all that takes time
TINY = 1e-30  # in the place of a scale of 0
TRIES, AS_FAST = 8, 1.5  # products in int8 and in floats before a processor is called slow; their time in the others'
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Int8Weight(QuantisedWeight):
    """A frozen weight as int8 `codes` (N, K) and one fp32 `scale` (N,) a channel.

    As the weight of an `nn.Linear` it makes its forward pass and its input gradient int8 products.
    """

    KIND = "load_in_8bit on a CPU is phinetune's own int8"
    PARTS = ("codes", "scale")
    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> "Int8Weight":
        return cast(Int8Weight, QuantisedWeight.wrap(cls, {"codes": codes, "scale": scale}, codes.shape, dtype))

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        return _dequantise_weight(self.codes, self.scale, dtype or self.dtype)

    def linear(self, x_TK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        return linear(x_TK, self, bias_N)

    def input_gradient(self, dy_TN: Tensor) -> Tensor:
        return input_gradient(dy_TN, self)

    def add_linear_(self, y_TN: Tensor, x_TK: Tensor) -> Tensor:
        if not _is_supported(x_TK):
            return add_product_(y_TN, x_TK, self.dequantise(x_TK.dtype).T)
        if _are_few(x_TK, self):
            return y_TN.add_(_product_of_few(x_TK, self))
        return _product(x_TK, None, self.codes.T, self.scale, None, y_TN)

    def add_input_gradient_(self, dx_TK: Tensor, dy_TN: Tensor) -> Tensor:
        if not _is_supported(dy_TN):
            return add_product_(dx_TK, dy_TN, self.dequantise(dy_TN.dtype))
        return _product(dy_TN, self.scale, self.codes, None, None, dx_TK)

    def quantised_alike(self, plain_NK: Tensor) -> "Int8Weight":
        return quantise(plain_NK)


def quantise(weight_NK: Tensor) -> Int8Weight:
    """Rounds each output channel of a weight (N, K) to 255 steps between minus and plus its largest element."""
    with torch.no_grad():
        ones_K = weight_NK.new_ones(weight_NK.shape[1], dtype=torch.float32)
        codes_NK, scale_N1 = _quantise_rows(weight_NK.detach().contiguous(), ones_K)
    return Int8Weight(codes_NK, scale_N1[:, 0], weight_NK.dtype)


def linear(x_TK: Tensor, weight: Int8Weight, bias_N: Tensor | None = None) -> Tensor:
    """x Wᵀ (+ bias), (T, N) in x's dtype, differentiable in x and bias."""
    if torch.is_grad_enabled() and (x_TK.requires_grad or (bias_N is not None and bias_N.requires_grad)):
        return cast(Tensor, _Linear.apply(x_TK, weight, bias_N))
    if not _is_supported(x_TK):
        return linear_reference(x_TK, weight, bias_N)
    if _are_few(x_TK, weight):
        return (_product_of_few(x_TK, weight) + (0 if bias_N is None else bias_N)).to(x_TK.dtype)
    return _product(x_TK, None, weight.codes.T, weight.scale, bias_N)


def input_gradient(dy_TN: Tensor, weight: Int8Weight) -> Tensor:
    """dy W, (T, K) in dy's dtype: the gradient of what `linear` was given."""
    if not _is_supported(dy_TN):
        return product(dy_TN, weight.dequantise(dy_TN.dtype))
    return _product(dy_TN, weight.scale, weight.codes, None, None)


def linear_reference(x_TK: Tensor, weight: Int8Weight, bias_N: Tensor | None = None) -> Tensor:
    """`linear` with a plain product and x as it is."""
    return product(x_TK, weight.dequantise(x_TK.dtype).T, bias_N)


def relative_error(x_TK: Tensor, weight_NK: Tensor, quantised: Int8Weight) -> float:
    """‖linear(x, quantised) − x Wᵀ‖ / ‖x Wᵀ‖ for some rows x (T, K): whether a layer bears it."""
    with torch.no_grad():
        exact_TN = x_TK.float() @ weight_NK.float().T
        return float((linear(x_TK, quantised).float() - exact_TN).norm() / exact_TN.norm().clamp_min(TINY))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight: Int8Weight, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        return linear(x_TK, weight, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        need_x, _, need_bias = ctx.needs_input_grad
        dx_TK = input_gradient(dy_TN, weight) if need_x else None
        return dx_TK, None, dy_TN.sum(0, dtype=ctx.bias_dtype) if need_bias else None


# The product -----------------------------------------------------------------------------------------------


@torch.no_grad()
def _product(
    a_TK: Tensor,
    in_scale_K: Tensor | None,
    codes_KN: Tensor,
    out_scale_N: Tensor | None,
    bias_N: Tensor | None,
    added_to: Tensor | None = None,
) -> Tensor:
    """(a · in_scale) @ codes · out_scale + bias, (T, N) in a's dtype; added to what is there already, where given."""
    y_TN = a_TK.new_empty(a_TK.shape[0], codes_KN.shape[1]) if added_to is None else added_to
    if y_TN.numel() == 0:
        return y_TN
    a_TK = a_TK.contiguous()
    scale = functools.partial(torch.ones, dtype=torch.float32, device=a_TK.device)
    in_scale_K = scale(a_TK.shape[1]) if in_scale_K is None else in_scale_K
    out_scale_N = scale(y_TN.shape[1]) if out_scale_N is None else out_scale_N
    bias_N = torch.zeros_like(out_scale_N) if bias_N is None else bias_N.float()

    columns_O = _outlier_columns(a_TK, in_scale_K)
    outliers_TO = a_TK[:, columns_O] * in_scale_K[columns_O]
    codes_ON = codes_KN[columns_O].float().contiguous()
    q_TK, rows_T1 = _quantise_rows(a_TK, in_scale_K.index_fill(0, columns_O, 0))

    scratch = torch.empty(0, dtype=torch.int32, device=a_TK.device)
    for rows, columns in _cells(*y_TN.shape):
        cell = y_TN[rows, columns]
        sums = scratch.resize_(cell.numel()).view(cell.shape)
        torch._int_mm(q_TK[rows], codes_KN[:, columns], out=sums)
        of_rows, of_columns = (rows_T1[rows], outliers_TO[rows]), (out_scale_N[columns], bias_N[columns])
        _finish(sums, *of_rows, codes_ON[:, columns], *of_columns, cell, added_to is not None)
    return y_TN


def _cells(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    height = min(rows, ROWS)
    width = max(1, CELL // height)
    for i in range(0, rows, height):
        for j in range(0, columns, width):
            yield slice(i, i + height), slice(j, j + width)


def _outlier_columns(a_TK: Tensor, in_scale_K: Tensor) -> Tensor:
    """The columns that stand out of their rows the most, in root mean square over some of the rows."""
    sample = a_TK[:: -(-a_TK.shape[0] // SAMPLE)].float() * in_scale_K
    sample = sample / sample.abs().mean(1, keepdim=True).clamp_min(TINY)
    return sample.square_().sum(0).topk(OUTLIERS, sorted=False).indices


@compiled
def _quantise_rows(a_TK: Tensor, factor_K: Tensor) -> tuple[Tensor, Tensor]:
    """a · factor as int8 (T, K) and the scale of each row (T, 1)."""
    scaled = a_TK.float() * factor_K
    rows_T1 = scaled.abs().amax(1, keepdim=True).clamp_min(TINY) / 127
    return (scaled / rows_T1).round().to(torch.int8), rows_T1


@compiled
def _finish(
    sums: Tensor,
    rows_T1: Tensor,
    outliers_TO: Tensor,
    codes_ON: Tensor,
    scale_N: Tensor,
    bias_N: Tensor,
    out: Tensor,
    adds: bool,
) -> None:
    """A cell of y: sums · rows · scale, with what the outliers add; the loop is unrolled into one pass."""
    y = sums.float() * rows_T1
    for i in range(codes_ON.shape[0]):
        y = y + outliers_TO[:, i : i + 1] * codes_ON[i]
    y = y * scale_N + bias_N
    out.copy_(y + out if adds else y)


@compiled
def _dequantise_weight(codes_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes_NK.float() * scale_N[:, None]).to(dtype)


def _is_supported(a_TK: Tensor) -> bool:
    wide = a_TK.shape[1] > OUTLIERS  # else all of it is an outlier; of one column torch 2.13 makes wrong products
    return wide and a_TK.device.type == "cpu" and a_TK.dtype in FLOATS and _is_fast() and _is_exact()


def _product_of_few(x_TK: Tensor, weight: Int8Weight) -> Tensor:
    """x Wᵀ in fp32 of sums in x's dtype, by torch's product for generation."""
    ones_N = torch.ones_like(weight.scale, dtype=x_TK.dtype)
    return torch._weight_int8pack_mm(x_TK.contiguous(), weight.codes, ones_N) * weight.scale


def _are_few(x_TK: Tensor, weight: Int8Weight) -> bool:
    """Whether torch's product for generation is for these; of other sizes it reads past the end."""
    return 0 < x_TK.shape[0] <= FEW and not any(size % 64 for size in weight.shape)


@functools.cache
def _is_fast() -> bool:
    """Whether this processor is as fast in int8 as in floats; without VNNI or AMX it has a thirtieth of their rate.

    The best of each decides, until int8 is `AS_FAST`: a product can take thirty times as long beside another process,
    and half as long again in a heap that is new to it.
    """
    x, w = (torch.ones(size, 1024, dtype=torch.bfloat16) for size in (256, 1024))
    q, codes = x.char(), w.char()
    best = [math.inf, math.inf]
    for tried in range(TRIES):
        for which, multiply in enumerate((lambda: torch._int_mm(q, codes.T), lambda: product(x, w.T))):
            best[which] = min(best[which], timeit.timeit(multiply, number=1))
        if tried and best[0] <= AS_FAST * best[1]:  # the first one is of cold caches
            return True
    log.warning("this CPU is slow in int8: weights are dequantised for each product, which saves memory alone")
    return False


@functools.cache
def _is_exact() -> bool:
    """Whether this build's int8 products are right: some without VNNI weren't (pytorch #136746)."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (33, 260), generator=generator, dtype=torch.int8) for _ in range(2))
    a[0], b[0], b[1] = 127, 127, -127  # what overflows 16 bits, if anything does
    exact = a.long() @ b.long().T
    right = all(torch.equal(torch._int_mm(a, b_KN).long(), exact) for b_KN in (b.T, b.T.contiguous()))
    if not right:
        log.warning("this build of torch multiplies int8 matrices wrongly: weights are dequantised for each product")
    return right
