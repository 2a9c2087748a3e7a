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

from phinetune.kernels import native
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


def _is_laid_out(part: Projection) -> bool:
    for weight in part.weights:
        plain = native.is_plain(weight, torch.bfloat16) and weight.is_contiguous()
        if not plain or weight.shape[0] % VECTOR or weight.shape[1] % VECTOR:
            return False
    if part.factors is None:
        return True
    return not any(edge % VECTOR for block in part.factors.blocks for edge in (block.out.start, block.out.stop))


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
        asked = _Asked(layers, keep_TK)
        y_TN = empty_rows(x_TK, len(x_TK), asked.outputs)
        thin_TP = asked.new_thin(x_TK)
        rstd_T = None if norm_weight_K is None else empty_rows(x_TK, len(x_TK), dtype=torch.float32)
        residual = None if residual_TN is None else residual_TN.contiguous()
        _call("linears_forward", [asked], x_TK, norm_weight_K, ctypes.c_float(eps), residual, y_TN, thin_TP, rstd_T)
        ctx.save_for_backward(x_TK, norm_weight_K, rstd_T, thin_TP, keep_TK, *trained)  # which mustn't change meanwhile
        ctx.layers, ctx.adds = layers, residual_TN is not None
        return y_TN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, norm_weight_K, rstd_T, thin_TP, keep_TK, *_ = ctx.saved_tensors
        asked = _Asked(ctx.layers, keep_TK)
        dx_TK = empty_rows(x_TK, *x_TK.shape) if ctx.needs_input_grad[2] else None
        dA, dB = asked.new_gradients()
        dy = dy_TN.contiguous()
        _call("linears_backward", [asked], dy, x_TK, norm_weight_K, rstd_T, thin_TP, dx_TK, dA, dB, tokens=len(x_TK))
        return None, None, dx_TK, None, dy_TN if ctx.adds else None, *asked.as_trained(dA, dB)


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
        keep_TD = _draw(x_TD, gate_up)
        keep_TF = _draw(x_TD, down, width)
        parts = [_Asked(gate_up, keep_TD), _Asked(down, keep_TF)]
        y_TD = empty_rows(x_TD, *x_TD.shape)
        both_TF2 = empty_rows(x_TD, len(x_TD), 2 * width)
        thins = [part.new_thin(x_TD) for part in parts]
        rstd_T = empty_rows(x_TD, len(x_TD), dtype=torch.float32)
        _call("mlp_forward", parts, x_TD, norm_weight_D, ctypes.c_float(eps), y_TD, both_TF2, *thins, rstd_T)
        ctx.save_for_backward(x_TD, norm_weight_D, rstd_T, both_TF2, *thins, keep_TD, keep_TF, *trained)
        ctx.gate_up, ctx.down = gate_up, down
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, norm_weight_D, rstd_T, both_TF2, thin, thin_down, keep_TD, keep_TF, *_ = ctx.saved_tensors
        parts = [_Asked(ctx.gate_up, keep_TD), _Asked(ctx.down, keep_TF)]
        dx_TD = empty_rows(x_TD, *x_TD.shape) if ctx.needs_input_grad[3] else None
        gradients = [part.new_gradients() for part in parts]
        kept = dy_TD.contiguous(), x_TD, norm_weight_D, rstd_T, both_TF2, thin, thin_down
        _call("mlp_backward", parts, *kept, dx_TD, *gradients[0], *gradients[1], tokens=len(x_TD))
        of_both = [g for part, pair in zip(parts, gradients, strict=True) for g in part.as_trained(*pair)]
        return None, None, None, dx_TD, None, *of_both


def _draw(x_TK: Tensor, layers: Projection, width: int | None = None) -> Tensor | None:
    """A dropout mask for what A reads: (T, K), or (T, `width`) where that isn't made yet."""
    if layers.factors is None:
        return None
    return draw_dropout(x_TK if width is None else x_TK.new_empty(1, 1).expand(len(x_TK), width), layers.dropout_p)


def _call(function: str, parts: Sequence["_Asked"], *arguments: Any, tokens: int | None = None) -> None:
    """The kernel's function on parts, tokens, threads, and tensors (null where None)."""
    tokens = len(arguments[0]) if tokens is None else tokens
    asked = [ctypes.byref(part.struct) for part in parts]
    native.call("decoder", function, *asked, tokens, torch.get_num_threads(), *arguments)


class _LowRank(ctypes.Structure):
    """As in projection.h."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("out", "columns", "a", "rank")),
        ("b", ctypes.c_long),
        ("scaling", ctypes.c_float),
    ]


class _Projection(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("inputs", "outputs", "ranks", "block_count")),
        ("keep_scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("weights", "rows", "bias", "lora_A", "lora_B", "blocks", "keep")),
    ]


class _Asked:
    """A projection as the kernel reads it, with what must live as long."""

    def __init__(self, part: Projection, keep_TK: Tensor | None) -> None:
        self.part = part
        rows = [weight.shape[0] for weight in part.weights]
        self.outputs = sum(rows)
        self.ranks = 0 if part.factors is None else part.factors.lora_A.shape[0]
        weights = (ctypes.c_void_p * len(rows))(*(weight.data_ptr() for weight in part.weights))
        bias = None
        if any(b is not None for b in part.biases):
            some = zip(part.biases, part.weights, strict=True)
            bias = torch.cat([w.new_zeros(w.shape[0]) if b is None else b.detach() for b, w in some]).float()
        lora_A = lora_B = blocks = None
        if part.factors is not None:
            lora_A, lora_B = (factor.detach().float().contiguous() for factor in part.factors[:2])
            made = [
                _LowRank(
                    b.out.start, b.out.stop - b.out.start, b.a.start, b.a.stop - b.a.start, b.b.start or 0, b.scaling
                )
                for b in part.factors.blocks
            ]
            blocks = (_LowRank * len(made))(*made)
        self.held = [weights, (ctypes.c_int * len(rows))(*rows), bias, lora_A, lora_B, blocks, keep_TK]
        self.struct = _Projection(
            part.weights[0].shape[1],
            self.outputs,
            self.ranks,
            0 if blocks is None else len(blocks),
            1 / max(1 - part.dropout_p, 1e-12),
            *map(_address, self.held),
        )

    def new_thin(self, x_TK: Tensor) -> Tensor | None:
        return empty_rows(x_TK, len(x_TK), -(-self.ranks // VECTOR) * VECTOR) if self.ranks else None

    def new_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of A and B, in fp32."""
        if self.part.factors is None:
            return None, None
        lora_A, lora_B = self.part.factors[:2]
        return lora_A.new_empty(lora_A.shape, dtype=torch.float32), lora_B.new_zeros(lora_B.shape, dtype=torch.float32)

    def as_trained(self, dA: Tensor | None, dB: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """In the dtypes of A and B."""
        if dA is None or dB is None or self.part.factors is None:
            return None, None
        return dA.to(self.part.factors.lora_A.dtype), dB.to(self.part.factors.lora_B.dtype)


def _address(held: Any) -> int | None:
    if held is None:
        return None
    return held.data_ptr() if isinstance(held, Tensor) else ctypes.addressof(held)
