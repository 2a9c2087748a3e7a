"""The parts of a decoder layer in bfloat16 by a C++ kernel (kernels/cpp/decoder.cpp): each in one pass over its rows.

decoder.py says what is computed, keeps the same, and is both the reference and the way of machines, dtypes and sizes
that this kernel isn't for.

Shape suffixes as in decoder.py; P ranks, rounded up to whole vectors.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels import native, norm
from phinetune.kernels.pieces import empty_rows
from phinetune.lora.functional import Projection, draw_dropout

VECTOR = 16  # widths are multiples of it
# Of a part's weights: larger ones don't stay in the cache between blocks of rows.  Products in fp32 are slow enough not
# to wait for them, but a copy that is laid out is twice as large.
MOST_ELEMENTS = {"avx512_bf16": 1 << 23, "avx2": 1 << 29}


def serves(x_TK: Tensor, *parts: Projection) -> bool:
    """Whether the kernel computes these parts."""
    return (
        native.is_plain(x_TK, torch.bfloat16)
        and len(x_TK) > 0
        and holds(sum(weight.numel() for part in parts for weight in part.weights))
        and all(_is_laid_out(part) for part in parts)
    )


def holds(elements: int) -> bool:
    """Whether the kernel is there, and is for weights of so many elements."""
    return native.library("decoder") is not None and elements <= MOST_ELEMENTS[native.instructions() or ""]


def norm_linears(x_TD: Tensor, norm_weight_D: Tensor, eps: float, layers: Projection) -> Tensor:
    """As decoder.norm_linears."""
    return cast(Tensor, _Linears.apply(layers, eps, x_TD, norm_weight_D, None, *layers.trained))


def linear_add(x_TK: Tensor, residual_TN: Tensor, layer: Projection) -> Tensor:
    """As decoder.linear_add."""
    return cast(Tensor, _Linears.apply(layer, 0.0, x_TK, None, residual_TN, *layer.trained))


def norm_gated_mlp(x_TD: Tensor, norm_weight_D: Tensor, eps: float, gate_up: Projection, down: Projection) -> Tensor:
    """As decoder.norm_gated_mlp."""
    trained = *gate_up.trained, *down.trained
    return cast(Tensor, _NormGatedMLP.apply(gate_up, down, eps, x_TD, norm_weight_D, *trained))


def serves_norm(x: Tensor, weight_D: Tensor) -> bool:
    """Whether the kernel computes the RMSNorm of x (..., D) for a gradient of x alone."""
    if torch._C._are_functorch_transforms_active():  # torch.func can't transform an autograd function like ours
        return False
    learns = torch.is_grad_enabled() and x.requires_grad and not weight_D.requires_grad
    plain = all(native.is_plain(t, torch.bfloat16) and t.is_contiguous() for t in (x, weight_D))
    return learns and plain and len(weight_D) % VECTOR == 0 and holds(0)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """w · x / √(mean(x²) + eps), of x's shape (..., D); it keeps x and a number a token."""
    return cast(Tensor, _RMSNorm.apply(x, weight_D, eps))


def _is_laid_out(part: Projection) -> bool:
    for weight in part.weights:
        plain = native.is_plain(weight, torch.bfloat16) and weight.is_contiguous()
        if not plain or weight.shape[0] % VECTOR or weight.shape[1] % VECTOR:
            return False
    blocks = [block for update in part.updates for block in update.blocks]
    return not any(edge % VECTOR for block in blocks for edge in (block.out.start, block.out.stop))


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layers: Projection,
        eps: float,
        x_TK: Tensor,
        norm_weight_K: Tensor | None,
        residual_TN: Tensor | None,
        *trained: Tensor | None,
    ) -> Tensor:
        x_TK = x_TK.contiguous()
        keep_TK = _draw(x_TK, layers)
        asked = _Asked(layers)
        y_TN = empty_rows(x_TK, len(x_TK), asked.outputs)
        thin_TP = asked.new_thin(x_TK)
        rstd_T = None if norm_weight_K is None else empty_rows(x_TK, len(x_TK), dtype=torch.float32)
        residual = None if residual_TN is None else residual_TN.contiguous()
        into = residual, y_TN, thin_TP, rstd_T
        _call("linears_forward", [asked], [keep_TK], x_TK, norm_weight_K, ctypes.c_float(eps), *into)
        ctx.save_for_backward(x_TK, norm_weight_K, rstd_T, thin_TP, keep_TK, *trained)  # which mustn't change meanwhile
        ctx.asked, ctx.adds = asked, residual_TN is not None
        return y_TN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, norm_weight_K, rstd_T, thin_TP, keep_TK, *_ = ctx.saved_tensors
        asked: _Asked = ctx.asked
        dx_TK = empty_rows(x_TK, *x_TK.shape) if ctx.needs_input_grad[2] else None
        gradients = asked.new_gradients()
        kept = dy_TN.contiguous(), x_TK, norm_weight_K, rstd_T, thin_TP
        _call("linears_backward", [asked], [keep_TK], *kept, dx_TK)
        return None, None, dx_TK, None, dy_TN if ctx.adds else None, *asked.as_trained(gradients)


class _NormGatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate_up: Projection,
        down: Projection,
        eps: float,
        x_TD: Tensor,
        norm_weight_D: Tensor,
        *trained: Tensor | None,
    ) -> Tensor:
        x_TD = x_TD.contiguous()
        width = down.weights[0].shape[1]
        keeps = _draw(x_TD, gate_up), _draw(x_TD, down, width)
        parts = [_Asked(gate_up), _Asked(down)]
        y_TD = empty_rows(x_TD, *x_TD.shape)
        both_TF2 = empty_rows(x_TD, len(x_TD), 2 * width)
        thins = [part.new_thin(x_TD) for part in parts]
        rstd_T = empty_rows(x_TD, len(x_TD), dtype=torch.float32)
        _call("mlp_forward", parts, keeps, x_TD, norm_weight_D, ctypes.c_float(eps), y_TD, both_TF2, *thins, rstd_T)
        ctx.save_for_backward(x_TD, norm_weight_D, rstd_T, both_TF2, *thins, *keeps, *trained)
        ctx.parts = parts
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, norm_weight_D, rstd_T, both_TF2, thin, thin_down, *keeps = ctx.saved_tensors[:8]
        parts: list[_Asked] = ctx.parts
        dx_TD = empty_rows(x_TD, *x_TD.shape) if ctx.needs_input_grad[3] else None
        gradients = [part.new_gradients() for part in parts]
        kept = dy_TD.contiguous(), x_TD, norm_weight_D, rstd_T, both_TF2, thin, thin_down
        _call("mlp_backward", parts, keeps, *kept, dx_TD)
        of_both = [d for part, own in zip(parts, gradients, strict=True) for d in part.as_trained(own)]
        return None, None, None, dx_TD, None, *of_both


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        tokens, width = x.numel() // x.shape[-1], x.shape[-1]
        y, rstd_T = torch.empty_like(x), x.new_empty(tokens, dtype=torch.float32)
        sizes = tokens, torch.get_num_threads(), width
        native.call("decoder", "rms_norm_forward", *sizes, x, weight_D, ctypes.c_float(eps), y, rstd_T)
        ctx.save_for_backward(x, weight_D, rstd_T)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, rstd_T = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return *torch.autograd.grad(norm.rms_norm(x, weight_D, ctx.eps)[0], x, dy, create_graph=True), None, None
        dx, sizes = torch.empty_like(x), (len(rstd_T), torch.get_num_threads(), x.shape[-1])
        native.call("decoder", "rms_norm_backward", *sizes, dy.contiguous(), x, weight_D, rstd_T, dx)
        return dx, None, None


def _draw(x_TK: Tensor, layers: Projection, width: int | None = None) -> Tensor | None:
    """A dropout mask for what A reads: (T, K), or (T, `width`) where that isn't made yet."""
    if not layers.updates:
        return None
    return draw_dropout(x_TK if width is None else x_TK.new_empty(1, 1).expand(len(x_TK), width), layers.dropout_p)


def _call(function: str, parts: Sequence["_Asked"], keeps: Sequence[Tensor | None], first: Tensor, *more: Any) -> None:
    """The kernel's function on parts and what dropout keeps of their inputs, on as many tokens as `first` has rows,
    and on tensors (null where None)."""
    for part, keep_TK in zip(parts, keeps, strict=True):
        part.struct.keep = None if keep_TK is None else keep_TK.data_ptr()
    asked = [ctypes.byref(part.struct) for part in parts]
    native.call("decoder", function, *asked, len(first), torch.get_num_threads(), first, *more)


class _LowRank(ctypes.Structure):
    """As in projection.h."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("out", "columns", "a", "rank")),
        *((name, ctypes.c_void_p) for name in ("A", "B", "dA", "dB")),
        ("scaling", ctypes.c_float),
    ]


class _Projection(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("inputs", "outputs", "ranks", "block_count")),
        ("keep_scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("weights", "rows", "bias", "blocks", "keep")),
    ]


class _Asked:
    """A projection as the kernel reads it, with the tensors that it points at: they stay, whatever a module gets."""

    def __init__(self, part: Projection) -> None:
        self.part = part
        self.weights = [weight.detach() for weight in part.weights]
        self.factors = [factor.detach().float().contiguous() for factor in part.trained]
        self.bias = _bias_of(part)
        rows = [len(weight) for weight in self.weights]
        inputs, self.outputs = self.weights[0].shape[1], sum(rows)
        self.ranks, low_rank = 0, []
        for (*_, blocks), lora_A, lora_B in zip(part.updates, self.factors[::2], self.factors[1::2], strict=True):
            for out, a, b, scaling in blocks:
                sizes = out.start, out.stop - out.start, self.ranks + a.start, a.stop - a.start
                A, B = lora_A.data_ptr() + 4 * inputs * a.start, lora_B.data_ptr() + 4 * (b.start or 0)
                low_rank.append(_LowRank(*sizes, A, B, None, None, scaling))
            self.ranks += len(lora_A)
        self.arrays = (
            (ctypes.c_void_p * len(rows))(*(weight.data_ptr() for weight in self.weights)),
            (ctypes.c_int * len(rows))(*rows),
            (_LowRank * len(low_rank))(*low_rank),
        )
        weights_at, rows_at, low_rank_at = [ctypes.addressof(array) for array in self.arrays]
        bias_at = None if self.bias is None else self.bias.data_ptr()
        keep_scale = 1 / max(1 - part.dropout_p, 1e-12)
        self.struct = _Projection(
            inputs, self.outputs, self.ranks, len(low_rank), keep_scale, weights_at, rows_at, bias_at, low_rank_at
        )

    def new_thin(self, x_TK: Tensor) -> Tensor | None:
        return empty_rows(x_TK, len(x_TK), -(-self.ranks // VECTOR) * VECTOR) if self.ranks else None

    def new_gradients(self) -> list[Tensor]:
        """Of A and B of each update, in fp32, where the kernel writes them next."""
        gradients = [torch.zeros_like(factor) for factor in self.factors]
        low_rank = iter(self.arrays[2])
        for (*_, blocks), dA, dB in zip(self.part.updates, gradients[::2], gradients[1::2], strict=True):
            for (_, a, b, _), block in zip(blocks, low_rank, strict=False):  # which goes on
                block.dA = dA.data_ptr() + 4 * dA.shape[1] * a.start
                block.dB = dB.data_ptr() + 4 * (b.start or 0)
        return gradients

    def as_trained(self, gradients: list[Tensor]) -> list[Tensor]:
        """In the dtypes of A and B."""
        return [d.to(factor.dtype) for d, factor in zip(gradients, self.part.trained, strict=True)]


def _bias_of(part: Projection) -> Tensor | None:
    """(N,) in fp32."""
    if all(bias is None for bias in part.biases):
        return None
    pairs = zip(part.biases, part.weights, strict=True)
    return torch.cat([w.new_zeros(len(w)) if bias is None else bias.detach() for bias, w in pairs]).float()
