"""The parts of a decoder layer as autograd functions: linear layers with what stands before and behind them.

    norm_linears     x -> norm -> q, k, v side by side
    linear_add       attention's output -> o, added to the residual
    norm_gated_mlp   x -> norm -> gate, up -> silu(gate) · up -> down, added to x

In bfloat16 on a CPU they are C++ (blockwise.py; where all of a layer is, it is one function: whole.py); here they are
in plain products, for everything else.

Each keeps what can't be made again cheaply: its input, the thin products x Aᵀ, the norm's statistics, and of the MLP
gate and up.  Norms and activations are made again in the backward pass, where they cost a pass over memory.  Base
weights are frozen.  The plain way is transformers' own layer with LoRA layers in it, which tests compare.

Shape suffixes: T tokens, D hidden width, K inputs, N outputs of all layers side by side, F width of the MLP, R ranks.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels.gated import silu_mul, silu_mul_backward
from phinetune.kernels.linear import add_input_gradient_, add_linear_, input_gradient, linear
from phinetune.kernels.norm import rms_norm, rms_norm_again, rms_norm_backward
from phinetune.layers import blockwise
from phinetune.lora.functional import (
    Factors,
    Projection,
    draw_dropout,
    gradient_of_A,
    low_rank_,
    low_rank_backward,
    low_rank_input_gradient,
)


def norm_linears(x_TD: Tensor, norm_weight_D: Tensor, eps: float, layers: Projection) -> Tensor:
    """RMSNorm and the layers that read it, (T, N)."""
    if blockwise.serves(x_TD, layers):
        return blockwise.norm_linears(x_TD, norm_weight_D, eps, layers)
    return cast(Tensor, _NormLinears.apply(layers, eps, x_TD, norm_weight_D, *layers.trained))


def linear_add(x_TK: Tensor, residual_TN: Tensor, layer: Projection) -> Tensor:
    """residual + layer(x), (T, N)."""
    if blockwise.serves(x_TK, layer):
        return blockwise.linear_add(x_TK, residual_TN, layer)
    return cast(Tensor, _LinearAdd.apply(layer, x_TK, residual_TN, *layer.trained))


def norm_gated_mlp(x_TD: Tensor, norm_weight_D: Tensor, eps: float, gate_up: Projection, down: Projection) -> Tensor:
    """x + down(silu(gate(norm(x))) · up(norm(x))), (T, D)."""
    if blockwise.serves(x_TD, gate_up, down):
        return blockwise.norm_gated_mlp(x_TD, norm_weight_D, eps, gate_up, down)
    trained = *gate_up.trained, *down.trained
    return cast(Tensor, _NormGatedMLP.apply(gate_up, down, eps, x_TD, norm_weight_D, *trained))


class _Kept(NamedTuple):
    """What a projection's gradients need beside its input."""

    thin_TR: Tensor | None
    keep_TK: Tensor | None


def _project(x_TK: Tensor, layers: Projection) -> tuple[Tensor, _Kept]:
    y_TN = x_TK.new_empty(x_TK.shape[0], layers.outputs[-1].stop)
    if (factors := layers.factors) is None:
        for weight, bias, columns in zip(layers.weights, layers.biases, layers.outputs, strict=True):
            linear(x_TK, weight, bias, out=y_TN[:, columns])
        return y_TN, _Kept(None, None)
    keep_TK = draw_dropout(x_TK, layers.dropout_p)
    thin_TR = low_rank_(y_TN, x_TK, factors, layers.bias, keep_TK, layers.dropout_p)
    for weight, columns in zip(layers.weights, layers.outputs, strict=True):
        add_linear_(y_TN[:, columns], x_TK, weight)
    return y_TN, _Kept(thin_TR, keep_TK)


def _input_gradient(
    dy_TN: Tensor, dthin_TR: Tensor | None, layers: Projection, factors: Factors | None, kept: _Kept
) -> Tensor:
    terms = list(zip(layers.weights, layers.outputs, strict=True))
    if factors is not None and dthin_TR is not None:
        dx_TK = low_rank_input_gradient(dthin_TR, factors, kept.keep_TK, layers.dropout_p)
    else:
        weight, columns = terms.pop(0)
        dx_TK = input_gradient(dy_TN[:, columns], weight)
    for weight, columns in terms:
        add_input_gradient_(dx_TK, dy_TN[:, columns], weight)
    return dx_TK


def _low_rank_gradients(dy_TN: Tensor, factors: Factors | None, kept: _Kept) -> tuple[Tensor | None, Tensor | None]:
    """(of the thin product, of B)."""
    if factors is None or kept.thin_TR is None:
        return None, None
    return low_rank_backward(dy_TN, kept.thin_TR, factors)


def _gradient_of_A(
    x_TK: Tensor, dthin_TR: Tensor | None, layers: Projection, factors: Factors | None, kept: _Kept
) -> Tensor | None:
    if factors is None or dthin_TR is None:
        return None
    return gradient_of_A(dthin_TR, x_TK, factors, kept.keep_TK, layers.dropout_p)


class _NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layers: Projection, eps: float, x_TD: Tensor, norm_weight_D: Tensor, *trained: Tensor | None
    ) -> Tensor:
        normed_TD, rstd_T1 = rms_norm(x_TD, norm_weight_D, eps)
        y_TN, kept = _project(normed_TD, layers)
        ctx.save_for_backward(x_TD, norm_weight_D, rstd_T1, *kept, *trained)  # A and B mustn't change meanwhile
        ctx.layers = layers
        return y_TN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, norm_weight_D, rstd_T1, *saved = ctx.saved_tensors
        kept, factors = _Kept(*saved[:2]), ctx.layers.factors
        dthin_TR, dB = _low_rank_gradients(dy_TN, factors, kept)
        dA = _gradient_of_A(rms_norm_again(x_TD, norm_weight_D, rstd_T1), dthin_TR, ctx.layers, factors, kept)
        dx_TD = None
        if ctx.needs_input_grad[2]:  # not below the first adapted layer
            dnormed_TD = _input_gradient(dy_TN, dthin_TR, ctx.layers, factors, kept)
            dx_TD = rms_norm_backward(dnormed_TD, x_TD, norm_weight_D, rstd_T1)
        return None, None, dx_TD, None, *ctx.layers.of_each(dA, dB)


class _LinearAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Projection, x_TK: Tensor, residual_TN: Tensor, *trained: Tensor | None) -> Tensor:
        y_TN, kept = _project(x_TK, layer)
        ctx.save_for_backward(x_TK, *kept, *trained)
        ctx.layer = layer
        return y_TN.add_(residual_TN)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, *saved = ctx.saved_tensors
        kept, factors = _Kept(*saved[:2]), ctx.layer.factors
        dthin_TR, dB = _low_rank_gradients(dy_TN, factors, kept)
        dA = _gradient_of_A(x_TK, dthin_TR, ctx.layer, factors, kept)
        dx_TK = _input_gradient(dy_TN, dthin_TR, ctx.layer, factors, kept) if ctx.needs_input_grad[1] else None
        return None, dx_TK, dy_TN, *ctx.layer.of_each(dA, dB)


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
        normed_TD, rstd_T1 = rms_norm(x_TD, norm_weight_D, eps)
        gate_and_up, kept = _project(normed_TD, gate_up)
        y_TD, kept_down = _project(silu_mul(*gate_and_up.chunk(2, dim=-1)), down)
        ctx.save_for_backward(x_TD, norm_weight_D, rstd_T1, gate_and_up, *kept, *kept_down, *trained)
        ctx.gate_up, ctx.down = gate_up, down
        return y_TD.add_(x_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, norm_weight_D, rstd_T1, gate_and_up, *saved = ctx.saved_tensors
        kept, kept_down = _Kept(*saved[:2]), _Kept(*saved[2:4])
        factors, factors_down = ctx.gate_up.factors, ctx.down.factors
        dthin_TR, dB_down = _low_rank_gradients(dy_TD, factors_down, kept_down)
        dactivated_TF = _input_gradient(dy_TD, dthin_TR, ctx.down, factors_down, kept_down)
        dboth, activated_TF = silu_mul_backward(dactivated_TF, *gate_and_up.chunk(2, dim=-1))
        dA_down = _gradient_of_A(activated_TF, dthin_TR, ctx.down, factors_down, kept_down)
        del activated_TF, dactivated_TF

        dthin_TR, dB = _low_rank_gradients(dboth, factors, kept)
        dA = _gradient_of_A(rms_norm_again(x_TD, norm_weight_D, rstd_T1), dthin_TR, ctx.gate_up, factors, kept)
        dx_TD = None
        if ctx.needs_input_grad[3]:
            dnormed_TD = _input_gradient(dboth, dthin_TR, ctx.gate_up, factors, kept)
            dx_TD = rms_norm_backward(dnormed_TD, x_TD, norm_weight_D, rstd_T1).add_(dy_TD)
        return None, None, None, dx_TD, None, *ctx.gate_up.of_each(dA, dB), *ctx.down.of_each(dA_down, dB_down)
