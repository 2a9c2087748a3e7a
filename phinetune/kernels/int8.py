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
from collections.abc import Iterator
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from phinetune.kernels.compiled import compiled
from phinetune.kernels.products import product

log = logging.getLogger(__name__)

OUTLIERS = 8  # columns of x that are multiplied without rounding; more of them cost time and gain little (docs/log.md)
SAMPLE = 64  # rows in which they are looked for: what stands out does so in nearly all rows
ROWS, CELL = 2048, 1 << 21  # of the sums: rows at most, and elements (8 MB); fewer rows would pack the weight again
FEW = 4  # rows: up to so many, as in generation, x isn't rounded, since reading the weight is all that takes time
TINY = 1e-30  # in the place of a scale of 0
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
READ_ONLY = "can't be written to; dequantise() gives a plain tensor"
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


class Int8Weight(Tensor):
    """A frozen weight as int8 `codes` (N, K) and one fp32 `scale` (N,) a channel, which looks like the (N, K) tensor
    of floats that it stands for.

    It can be the weight of an `nn.Linear`, whose forward pass and input gradient are then int8 products.  Copies, moves
    between devices, state dicts and pickles stay int8; anything else (`.float()`, `.T`, `w + 1`) is done on the
    dequantised weight and gives a plain tensor.  It can't be written to, but for `copy_`, which quantises.
    """

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> "Int8Weight":
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device, requires_grad=False)
        made.codes, made.scale = codes, scale
        return made

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain (N, K) weight, in its own dtype or another."""
        return _dequantise_weight(self.codes, self.scale, dtype or self.dtype)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """What it takes in memory."""
        return self.codes.nbytes + self.scale.nbytes

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Int8Weight({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    # Copies ---------------------------------------------------------------------------------------------

    def _like(self, codes: Tensor, scale: Tensor) -> "Int8Weight":
        return Int8Weight(codes, scale, self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Int8Weight":
        if id(self) not in memo:
            memo[id(self)] = _rebuild(self.codes.clone(), self.scale.clone(), self.dtype, self._is_parameter)
        return cast(Int8Weight, memo[id(self)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.codes, self.scale, self.dtype, self._is_parameter)

    @property
    def _is_parameter(self) -> bool:
        return isinstance(self, torch.nn.Parameter)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], dtype: Any, size: Any, stride: Any) -> "Int8Weight":
        return Int8Weight(inner["codes"], inner["scale"], dtype)

    # What torch does with it ----------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _nn_linear(*args, **(kwargs or {}))
        if func is Tensor.__setitem__ and isinstance(args[0], Int8Weight):
            raise RuntimeError(f"an int8 weight {READ_ONLY}")
        if func is SET_DATA:  # what nn.Module.to(dtype) does: the weight stays int8 and stands for another dtype
            weight, data = args
            given = data if isinstance(data, Int8Weight) else quantise(data)
            weight.codes, weight.scale, args = given.codes, given.scale, (weight, given)
        with torch._C.DisableTorchFunctionSubclass():  # what comes out is no weight unless __torch_dispatch__ makes one
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        aten, first = torch.ops.aten, args[0]
        if func in (aten.detach.default, aten.alias.default):
            return first._like(first.codes, first.scale)
        if func is aten.clone.default:
            return first._like(first.codes.clone(), first.scale.clone())
        if func is aten._to_copy.default and isinstance(first, Int8Weight):
            dtype, device = kwargs.get("dtype") or first.dtype, kwargs.get("device")
            moved = first._like(first.codes.to(device), first.scale.to(device))
            return moved if dtype == first.dtype else moved.dequantise(dtype)
        if func is aten.copy_.default and isinstance(first, Int8Weight):
            return first._take(args[1])
        if func._schema.is_mutable and any(isinstance(a, Int8Weight) for a in (first, kwargs.get("out"))):
            raise RuntimeError(f"{func}: an int8 weight {READ_ONLY}")
        args, kwargs = tree_map_only(Int8Weight, lambda weight: weight.dequantise(), (args, kwargs))
        return func(*args, **kwargs)

    def _take(self, source: Tensor) -> Self:
        """`copy_`: from int8 as it is, from plain numbers quantised."""
        given = source if isinstance(source, Int8Weight) else quantise(source.expand(self.shape))
        self.codes.copy_(given.codes)
        self.scale.copy_(given.scale)
        return self


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
    if 0 < x_TK.shape[0] <= FEW and not any(size % 64 for size in weight.shape):  # it reads past the end of others
        y_TN = torch._weight_int8pack_mm(
            x_TK.contiguous(), weight.codes, torch.ones_like(weight.scale, dtype=x_TK.dtype)
        )
        return (y_TN * weight.scale + (0 if bias_N is None else bias_N)).to(x_TK.dtype)
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


def _nn_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` where some of its tensors are int8."""
    if not isinstance(weight, Int8Weight) or isinstance(input, Int8Weight):
        input, weight = (t.dequantise() if isinstance(t, Int8Weight) else t for t in (input, weight))
        return F.linear(input, weight, bias)
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    y_TN = linear(input.reshape(-1, input.shape[-1]), weight, bias)
    return y_TN.view(*input.shape[:-1], y_TN.shape[-1])


# The product -----------------------------------------------------------------------------------------------


@torch.no_grad()
def _product(
    a_TK: Tensor, in_scale_K: Tensor | None, codes_KN: Tensor, out_scale_N: Tensor | None, bias_N: Tensor | None
) -> Tensor:
    """(a · in_scale) @ codes · out_scale + bias, (T, N) in a's dtype."""
    y_TN = a_TK.new_empty(a_TK.shape[0], codes_KN.shape[1])
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
        _finish(
            sums, rows_T1[rows], outliers_TO[rows], codes_ON[:, columns], out_scale_N[columns], bias_N[columns], cell
        )
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
) -> None:
    """A cell of y: sums · rows · scale, with what the outliers add; the loop is unrolled into one pass."""
    y = sums.float() * rows_T1
    for i in range(codes_ON.shape[0]):
        y = y + outliers_TO[:, i : i + 1] * codes_ON[i]
    out.copy_(y * scale_N + bias_N)


@compiled
def _dequantise_weight(codes_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes_NK.float() * scale_N[:, None]).to(dtype)


def _rebuild(codes: Tensor, scale: Tensor, dtype: torch.dtype, is_parameter: bool) -> Int8Weight:
    made = Int8Weight(codes, scale, dtype)
    return cast(Int8Weight, torch.nn.Parameter(made, requires_grad=False)) if is_parameter else made


def _is_supported(a_TK: Tensor) -> bool:
    wide = a_TK.shape[1] > OUTLIERS  # else all of it is an outlier; of one column torch 2.13 makes wrong products
    return wide and a_TK.device.type == "cpu" and a_TK.dtype in FLOATS and _is_exact()


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
