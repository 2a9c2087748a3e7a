"""The LoRA arithmetic, written once.

    y = x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1.

A layer that stands for several (a fused qkv) has one A and one B a block, stacked: block i reads its
own rows of A and adds to its own rows of y.  A plain layer is the case of one block.

Shape suffixes: T tokens, K inputs, N outputs, R ranks of all blocks together, r ranks of one block.

         R                 r             Block("q"), Block("v") of a fused q, k, v:
    A  [ A_q ]  K     B  [ B_q ]  n_q
       [ A_v ]           [ B_v ]  n_v       y[:, q] += s · (x A_qᵀ) B_qᵀ;  y[:, v] += s · (x A_vᵀ) B_vᵀ
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Block(NamedTuple):
    """Where one low-rank product lives: rows of the output, rows of A, rows of B."""

    out: slice
    a: slice
    b: slice


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    blocks: tuple[Block, ...],
    dropout_p: float = 0.0,
) -> Tensor:
    """A linear layer with its LoRA update.

    Args:
        x: (..., K), any number of leading dimensions.
        weight: (N, K), the frozen base weight (a transposed view is fine).
        bias: (N,) or None.
        lora_A: (R, K) and lora_B: (rows of all blocks, r), in any floating dtype: they are cast to
            the dtype of the product, and their gradients come back in their own.
        scaling: what the low-rank term is multiplied by, `lora_alpha / r` as a rule.
        blocks: one `Block` for each low-rank product.
        dropout_p: the share of x's elements dropped before A; drawn from torch's own generator.

    Returns:
        (..., N) in x's dtype, or in autocast's where autocast is on.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if bias is None else bias.to(dtype)
            args = (x.to(dtype), weight.to(dtype), bias, lora_A, lora_B, scaling, blocks, dropout_p)
            return cast(Tensor, _LoRALinear.apply(*args))
    return cast(Tensor, _LoRALinear.apply(x, weight, bias, lora_A, lora_B, scaling, blocks, dropout_p))


def delta_weight(
    lora_A: Tensor, lora_B: Tensor, scaling: float, blocks: tuple[Block, ...], out_features: int
) -> Tensor:
    """ΔW (N, K) in fp32 (fp64 for fp64 parameters): what merging adds to the base weight."""
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    A_RK, B_Nr = lora_A.detach().to(dtype), lora_B.detach().to(dtype)
    delta_NK = A_RK.new_zeros(out_features, A_RK.shape[1])
    for block in blocks:
        delta_NK[block.out] = (B_Nr[block.b] @ A_RK[block.a]).mul_(scaling)
    return delta_NK


class _LoRALinear(torch.autograd.Function):
    """Saves x, the thin product x Aᵀ and, under dropout, one byte an element, beside the weights themselves.

    Casts of A and B are made again in the backward pass: they cost r / T of a product, and keeping
    them would hold them for every layer at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        blocks: tuple[Block, ...],
        dropout_p: float,
    ) -> Tensor:
        x_TK = x.reshape(-1, x.shape[-1])
        A_RK, B_Nr = lora_A.to(x.dtype), lora_B.to(x.dtype)
        keep_TK = torch.empty_like(x_TK, dtype=torch.bool).bernoulli_(1 - dropout_p) if dropout_p > 0 else None
        thin_TR = _dropped(x_TK, keep_TK, dropout_p) @ A_RK.T

        y_TN = F.linear(x_TK, weight, bias)
        for block in blocks:
            y_TN[:, block.out].addmm_(thin_TR[:, block.a], B_Nr[block.b].T, alpha=scaling)

        ctx.save_for_backward(x, weight, lora_A, lora_B, thin_TR, keep_TK)
        ctx.scaling, ctx.blocks, ctx.dropout_p, ctx.has_bias = scaling, blocks, dropout_p, bias is not None
        return y_TN.view(*x.shape[:-1], y_TN.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, thin_TR, keep_TK = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        x_TK, dy_TN = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        A_RK, B_Nr = lora_A.to(x.dtype), lora_B.to(x.dtype)

        dx_TK = dweight = dA_RK = dB_Nr = None
        if need_B:
            dB_Nr = torch.empty_like(B_Nr)
            for block in ctx.blocks:
                dB_Nr[block.b] = dy_TN[:, block.out].T @ thin_TR[:, block.a]
            dB_Nr.mul_(ctx.scaling)
        if need_A or need_x:
            dthin_TR = torch.empty_like(thin_TR)
            for block in ctx.blocks:
                dthin_TR[:, block.a] = dy_TN[:, block.out] @ B_Nr[block.b]
            dthin_TR.mul_(ctx.scaling)
        if need_A:
            dA_RK = dthin_TR.T @ _dropped(x_TK, keep_TK, ctx.dropout_p)
        if need_x:
            dx_TK = dy_TN @ weight
            if keep_TK is None:
                dx_TK.addmm_(dthin_TR, A_RK)
            else:
                dx_TK += _dropped(dthin_TR @ A_RK, keep_TK, ctx.dropout_p)
        if need_weight:
            dweight = dy_TN.T @ x_TK
        return (
            None if dx_TK is None else dx_TK.view_as(x),
            dweight,
            dy_TN.sum(0) if ctx.has_bias and need_bias else None,
            None if dA_RK is None else dA_RK.to(lora_A.dtype),
            None if dB_Nr is None else dB_Nr.to(lora_B.dtype),
            None,
            None,
            None,
        )


def _dropped(x_TK: Tensor, keep_TK: Tensor | None, dropout_p: float) -> Tensor:
    """Inverted dropout by a mask drawn earlier; x itself where there is none."""
    return x_TK if keep_TK is None else (x_TK * keep_TK).div_(max(1 - dropout_p, 1e-12))
