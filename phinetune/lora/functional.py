"""The LoRA arithmetic, written once.

    y = x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1.

A layer that stands for several (a fused qkv) has one A and one B a block, stacked: block i reads its
own rows of A and adds to its own rows of y.  A plain layer is the case of one block; several adapters
at once are blocks that add to the same rows.  Ranks may differ, so B is read block by block from its
elements in a row.

Shape suffixes: T tokens, K inputs, N outputs, R ranks of all blocks together, r ranks of one block.

         R                 r             blocks of a fused q, k, v with LoRA on q and v:
    A  [ A_q ]  K     B  [ B_q ]  n_q
       [ A_v ]           [ B_v ]  n_v       y[:, q] += s · (x A_qᵀ) B_qᵀ;  y[:, v] += s · (x A_vᵀ) B_vᵀ
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels.products import add_product_, product


class Block(NamedTuple):
    """One low-rank product: the rows of y it adds to, its rows of A, its elements of B, what it is scaled by."""

    out: slice
    a: slice
    b: slice
    scaling: float

    def read_B(self, lora_B: Tensor) -> Tensor:
        """This block's B, (rows of `out`, r): a view."""
        return lora_B.flatten()[self.b].view(-1, self.a.stop - self.a.start)

    def shifted(self, a: int, b: int, factor: float) -> "Block":
        """The same product where A and B stand behind others, its scaling times `factor`."""
        moved_a, moved_b = (slice(s.start + by, s.stop + by) for s, by in ((self.a, a), (self.b, b)))
        return Block(self.out, moved_a, moved_b, self.scaling * factor)


class Factors(NamedTuple):
    """What a low-rank update is made of."""

    lora_A: Tensor
    lora_B: Tensor
    blocks: tuple[Block, ...]


def stack(terms: Iterable[tuple[Factors, float]]) -> Factors:
    """Σ weight · update as one update: the As and Bs one behind the other. A single one costs no copy."""
    terms = list(terms)
    if len(terms) == 1 and terms[0][1] == 1:
        return terms[0][0]
    blocks: list[Block] = []
    a = b = 0
    for (lora_A, lora_B, own), weight in terms:
        blocks += [block.shifted(a, b, weight) for block in own]
        a, b = a + lora_A.shape[0], b + lora_B.numel()
    lora_As, lora_Bs = [f.lora_A for f, _ in terms], [f.lora_B.flatten() for f, _ in terms]
    return Factors(torch.cat(lora_As), torch.cat(lora_Bs), tuple(blocks))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors,
    dropout_p: float = 0.0,
) -> Tensor:
    """A linear layer with its LoRA update, in one autograd function.

    Args:
        x: (..., K), any number of leading dimensions.
        weight: (N, K), the frozen base weight (a transposed view is fine).
        bias: (N,) or None.
        factors: lora_A (R, K) and lora_B (the blocks' elements in a row, in any shape), in any floating
            dtype: they are cast to the dtype of the product, and their gradients come back in their own.
        dropout_p: the share of x's elements dropped before A; drawn from torch's own generator.

    Returns:
        (..., N) in x's dtype, or in autocast's where autocast is on.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if bias is None else bias.to(dtype)
            return cast(Tensor, _LoRALinear.apply(x.to(dtype), weight.to(dtype), bias, *factors, dropout_p))
    return cast(Tensor, _LoRALinear.apply(x, weight, bias, *factors, dropout_p))


def low_rank(x: Tensor, factors: Factors, out_features: int, dropout_p: float = 0.0) -> Tensor:
    """The low-rank term alone, by plain autograd: s · (drop(x) Aᵀ) Bᵀ, (..., N)."""
    lora_A, lora_B = factors.lora_A.to(x.dtype), factors.lora_B.to(x.dtype)
    thin = F.linear(F.dropout(x, dropout_p), lora_A)
    y = thin.new_zeros(*x.shape[:-1], out_features)
    for block in factors.blocks:
        y[..., block.out] += block.scaling * F.linear(thin[..., block.a], block.read_B(lora_B))
    return y


def delta_weight(factors: Factors, out_features: int) -> Tensor:
    """ΔW (N, K) in fp32 (fp64 for fp64 parameters): what merging adds to the base weight."""
    dtype = torch.promote_types(factors.lora_A.dtype, torch.float32)
    A_RK, lora_B = factors.lora_A.to(dtype), factors.lora_B.to(dtype)
    delta_NK = A_RK.new_zeros(out_features, A_RK.shape[1])
    for block in factors.blocks:
        delta_NK[block.out] += block.scaling * (block.read_B(lora_B) @ A_RK[block.a])
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
        blocks: tuple[Block, ...],
        dropout_p: float,
    ) -> Tensor:
        x_TK = x.reshape(-1, x.shape[-1])
        A_RK, cast_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        keep_TK = torch.empty_like(x_TK, dtype=torch.bool).bernoulli_(1 - dropout_p) if dropout_p > 0 else None
        thin_TR = product(_dropped(x_TK, keep_TK, dropout_p), A_RK.T)

        y_TN = product(x_TK, weight.T, bias)
        for block in blocks:
            add_product_(y_TN[:, block.out], thin_TR[:, block.a], block.read_B(cast_B).T, block.scaling)

        ctx.save_for_backward(x, weight, lora_A, lora_B, thin_TR, keep_TK)
        ctx.blocks, ctx.dropout_p, ctx.has_bias = blocks, dropout_p, bias is not None
        return y_TN.view(*x.shape[:-1], y_TN.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, thin_TR, keep_TK = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        x_TK, dy_TN = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        A_RK, cast_B = lora_A.to(x.dtype), lora_B.to(x.dtype)

        dx_TK = dweight = dA_RK = dB = None
        if need_B:
            dB = cast_B.new_empty(cast_B.shape)
            for block in ctx.blocks:
                block.read_B(dB).copy_(product(dy_TN[:, block.out].T, thin_TR[:, block.a]).mul_(block.scaling))
        if need_A or need_x:
            dthin_TR = torch.empty_like(thin_TR)
            for block in ctx.blocks:
                dthin_TR[:, block.a] = product(dy_TN[:, block.out], block.read_B(cast_B)).mul_(block.scaling)
        if need_A:
            dA_RK = product(dthin_TR.T, _dropped(x_TK, keep_TK, ctx.dropout_p))
        if need_x:
            dx_TK = product(dy_TN, weight)
            if keep_TK is None:
                add_product_(dx_TK, dthin_TR, A_RK)
            else:
                dx_TK += _dropped(product(dthin_TR, A_RK), keep_TK, ctx.dropout_p)
        if need_weight:
            dweight = product(dy_TN.T, x_TK)
        return (
            None if dx_TK is None else dx_TK.view_as(x),
            dweight,
            dy_TN.sum(0) if ctx.has_bias and need_bias else None,
            None if dA_RK is None else dA_RK.to(lora_A.dtype),
            None if dB is None else dB.to(lora_B.dtype),
            None,
            None,
        )


def _dropped(x_TK: Tensor, keep_TK: Tensor | None, dropout_p: float) -> Tensor:
    """Inverted dropout by a mask drawn earlier; x itself where there is none."""
    return x_TK if keep_TK is None else (x_TK * keep_TK).div_(max(1 - dropout_p, 1e-12))
