"""The parts of a decoder layer in bfloat16 by a C++ kernel (kernels/cpp/decoder.cpp): each in one pass over its rows.

decoder.py says what is computed, keeps the same, and is both the reference and the way of machines, dtypes and sizes
that this kernel isn't for.

Shape suffixes as in decoder.py; P ranks, rounded up to whole vectors.
"""

import ctypes
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels import native, norm
from phinetune.kernels.pieces import empty_rows
from phinetune.layers.asked import VECTOR, Asked, call
from phinetune.lora.functional import Projection

# Of a part's weights: larger ones don't stay in the cache between blocks of rows.  Products in fp32 are slow enough not
# to wait for them, but a copy that is laid out is twice as large.
MOST_ELEMENTS = {"avx512_bf16": 1 << 23, "avx2": 1 << 29}


def serves(x_TK: Tensor, *parts: Projection) -> bool:
    """Whether the kernel computes these parts."""
    return native.is_plain(x_TK, torch.bfloat16) and len(x_TK) > 0 and are_held(*parts)


def are_held(*parts: Projection) -> bool:
    """Whether the kernel is for these parts, together."""
    elements = sum(weight.numel() for part in parts for weight in part.weights)
    return holds(elements) and all(_is_laid_out(part) for part in parts)


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
        asked = Asked(layers)
        keep_TK = asked.draw(x_TK)
        y_TN = empty_rows(x_TK, len(x_TK), asked.outputs)
        thin_TP = asked.new_thin(x_TK)
        rstd_T = None if norm_weight_K is None else empty_rows(x_TK, len(x_TK), dtype=torch.float32)
        residual = None if residual_TN is None else residual_TN.contiguous()
        into = residual, y_TN, thin_TP, rstd_T
        call("linears_forward", [asked], [keep_TK], len(x_TK), x_TK, norm_weight_K, ctypes.c_float(eps), *into)
        ctx.save_for_backward(x_TK, norm_weight_K, rstd_T, thin_TP, keep_TK, *trained)  # which mustn't change meanwhile
        ctx.asked, ctx.adds = asked, residual_TN is not None
        return y_TN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, norm_weight_K, rstd_T, thin_TP, keep_TK, *_ = ctx.saved_tensors
        asked: Asked = ctx.asked
        dx_TK = empty_rows(x_TK, *x_TK.shape) if ctx.needs_input_grad[2] else None
        gradients = asked.new_gradients()
        kept = dy_TN.contiguous(), x_TK, norm_weight_K, rstd_T, thin_TP
        call("linears_backward", [asked], [keep_TK], len(x_TK), *kept, None, dx_TK)
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
        parts = [Asked(gate_up), Asked(down)]
        keeps = [part.draw(x_TD) for part in parts]
        y_TD = empty_rows(x_TD, *x_TD.shape)
        both_TF2 = empty_rows(x_TD, len(x_TD), 2 * width)
        thins = [part.new_thin(x_TD) for part in parts]
        rstd_T = empty_rows(x_TD, len(x_TD), dtype=torch.float32)
        into = y_TD, both_TF2, *thins, rstd_T
        call("mlp_forward", parts, keeps, len(x_TD), x_TD, norm_weight_D, ctypes.c_float(eps), *into)
        ctx.save_for_backward(x_TD, norm_weight_D, rstd_T, both_TF2, *thins, *keeps, *trained)
        ctx.parts = parts
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, norm_weight_D, rstd_T, both_TF2, thin, thin_down, *keeps = ctx.saved_tensors[:8]
        parts: list[Asked] = ctx.parts
        dx_TD = empty_rows(x_TD, *x_TD.shape) if ctx.needs_input_grad[3] else None
        gradients = [part.new_gradients() for part in parts]
        kept = dy_TD.contiguous(), x_TD, norm_weight_D, rstd_T, both_TF2, thin, thin_down
        call("mlp_backward", parts, keeps, len(x_TD), *kept, dx_TD)
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
