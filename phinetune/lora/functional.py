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

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from phinetune.kernels.linear import add_input_gradient_, add_linear_
from phinetune.kernels.pieces import empty_rows
from phinetune.kernels.products import add_product_, product
from phinetune.kernels.quantised import QuantisedWeight


class Block(NamedTuple):
    """One low-rank product: the rows of y it adds to, its rows of A, its elements of B, what it is scaled by."""

    out: slice
    a: slice
    b: slice
    scaling: float

    def read_B(self, lora_B: Tensor) -> Tensor:
        """This block's B, (rows of `out`, r), to read; only of a row-major lora_B is it a view that can be written."""
        return lora_B.flatten()[self.b].view(-1, self.a.stop - self.a.start)

    def shifted(self, out: int, a: int, b: int, factor: float) -> "Block":
        """The same product where its outputs, A and B stand behind others, its scaling times `factor`."""
        moved = [slice(s.start + by, s.stop + by) for s, by in ((self.out, out), (self.a, a), (self.b, b))]
        return Block(moved[0], moved[1], moved[2], self.scaling * factor)


class Factors(NamedTuple):
    """What a low-rank update is made of."""

    lora_A: Tensor
    lora_B: Tensor
    blocks: tuple[Block, ...]


class Projection(NamedTuple):
    """Linear layers that read one input, with their LoRA updates: their outputs lie side by side."""

    weights: tuple[Tensor, ...]
    """The frozen weights, (Nᵢ, K)."""
    biases: tuple[Tensor | None, ...]
    updates: tuple[Factors, ...] = ()
    """Their outputs are counted over all layers, their rows of A and elements of B each for itself."""
    dropout_p: float = 0.0

    @property
    def outputs(self) -> list[slice]:
        """The columns of y that each weight makes."""
        ends = list(itertools.accumulate(weight.shape[0] for weight in self.weights))
        return [slice(end - weight.shape[0], end) for end, weight in zip(ends, self.weights, strict=True)]

    @property
    def bias(self) -> Tensor | None:
        """The biases side by side, (N,), zeros where a layer has none; None where none has one."""
        if all(bias is None for bias in self.biases):
            return None
        pairs = zip(self.weights, self.biases, strict=True)
        return torch.cat([weight.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in pairs])

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """A and B of each update, as an autograd function is given them."""
        return tuple(factor for update in self.updates for factor in (update.lora_A, update.lora_B))

    @property
    def factors(self) -> Factors | None:
        """The updates as one."""
        return stack([(update, 1.0) for update in self.updates]) if self.updates else None

    def of_each(self, dA: Tensor | None, dB: Tensor | None) -> list[Tensor | None]:
        """Gradients of `factors` as those of `trained`."""
        if dA is None or dB is None:
            return [None] * len(self.trained)
        dAs = dA.split([len(update.lora_A) for update in self.updates])
        dBs = dB.flatten().split([update.lora_B.numel() for update in self.updates])
        pairs = zip(dAs, dBs, self.updates, strict=True)
        return [d for dA, dB, (A, B, _) in pairs for d in (dA.to(A.dtype), dB.view(B.shape).to(B.dtype))]


def stack(terms: Iterable[tuple[Factors, float]]) -> Factors:
    """Σ weight · update as one update: the As and Bs one behind the other. A single one costs no copy."""
    terms = list(terms)
    if len(terms) == 1 and terms[0][1] == 1:
        return terms[0][0]
    blocks: list[Block] = []
    a = b = 0
    for (lora_A, lora_B, own), weight in terms:
        blocks += [block.shifted(0, a, b, weight) for block in own]
        a, b = a + lora_A.shape[0], b + lora_B.numel()
    lora_As, lora_Bs = [f.lora_A for f, _ in terms], [f.lora_B.flatten() for f, _ in terms]
    return Factors(torch.cat(lora_As), torch.cat(lora_Bs), tuple(blocks))


def side_by_side(projections: Sequence[Projection]) -> Projection:
    """Several layers as one; they share the dropout mask of the one that drops most."""
    if len(projections) == 1:
        return projections[0]
    updates, out = [], 0
    for projection in projections:
        for lora_A, lora_B, blocks in projection.updates:
            updates.append(Factors(lora_A, lora_B, tuple(block.shifted(out, 0, 0, 1.0) for block in blocks)))
        out += sum(weight.shape[0] for weight in projection.weights)
    return Projection(
        tuple(weight for projection in projections for weight in projection.weights),
        tuple(bias for projection in projections for bias in projection.biases),
        tuple(updates),
        max(projection.dropout_p for projection in projections),
    )


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
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # there is none on meta
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            bias = None if bias is None else bias.to(dtype)
            weight = weight if isinstance(weight, QuantisedWeight) else weight.to(dtype)
            return lora_linear(x.to(dtype), weight, bias, factors, dropout_p)
    if torch._C._are_functorch_transforms_active():  # torch.func can't transform an autograd function like ours
        return F.linear(x, weight, bias) + low_rank(x, factors, weight.shape[0], dropout_p)
    return cast(Tensor, _LoRALinear.apply(x, weight, bias, *factors, dropout_p))


def low_rank(x: Tensor, factors: Factors, out_features: int, dropout_p: float = 0.0) -> Tensor:
    """The low-rank term alone, by plain autograd: s · (drop(x) Aᵀ) Bᵀ, (..., N)."""
    lora_A, lora_B = factors.lora_A.to(x.dtype), factors.lora_B.to(x.dtype)
    thin = F.linear(F.dropout(x, dropout_p), lora_A)
    updates = [
        F.pad(
            block.scaling * F.linear(thin[..., block.a], block.read_B(lora_B)),
            (block.out.start, out_features - block.out.stop),
        )
        for block in factors.blocks
    ]
    return functools.reduce(torch.add, updates)


def delta_weight(factors: Factors, out_features: int) -> Tensor:
    """ΔW (N, K) in fp32 (fp64 for fp64 parameters): what merging adds to the base weight."""
    dtype = torch.promote_types(factors.lora_A.dtype, torch.float32)
    A_RK, lora_B = factors.lora_A.to(dtype), factors.lora_B.to(dtype)
    delta_NK = A_RK.new_zeros(out_features, A_RK.shape[1])
    for block in factors.blocks:
        delta_NK[block.out] += block.scaling * (block.read_B(lora_B) @ A_RK[block.a])
    return delta_NK


def draw_dropout(x_TK: Tensor, dropout_p: float) -> Tensor | None:
    """Which elements of x stay, a byte each, from torch's own generator; None where all do."""
    return empty_rows(x_TK, *x_TK.shape, dtype=torch.bool).bernoulli_(1 - dropout_p) if dropout_p > 0 else None


def low_rank_(
    y_TN: Tensor,
    x_TK: Tensor,
    factors: Factors,
    bias_N: Tensor | None = None,
    keep_TK: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """y = s · (drop(x) Aᵀ) Bᵀ + b, written over what y was; returns the thin product drop(x) Aᵀ, (T, R), which the
    gradients need.

    x Wᵀ is to be added to it, and not it to x Wᵀ: bfloat16 then rounds the sum once.  Of an update added to a product
    that is rounded already, all that is smaller than half a unit in that one's last place is lost, each time.
    """
    A_RK, cast_B = factors.lora_A.to(x_TK.dtype), factors.lora_B.to(x_TK.dtype)
    thin_TR = product(_dropped(x_TK, keep_TK, dropout_p), A_RK.T)
    terms = [(block, thin_TR[:, block.a], block.read_B(cast_B).T) for block in factors.blocks]
    if _lie_side_by_side(factors.blocks, y_TN.shape[1]):
        for block, thin, B in terms:
            product(thin, B, None if bias_N is None else bias_N[block.out], y_TN[:, block.out], block.scaling)
    else:
        y_TN.copy_(y_TN.new_zeros(()) if bias_N is None else bias_N)
        for block, thin, B in terms:
            add_product_(y_TN[:, block.out], thin, B, block.scaling)
    return thin_TR


def _lie_side_by_side(blocks: tuple[Block, ...], out_features: int) -> bool:
    """Whether each row of y is written by one of them."""
    outs = sorted((block.out.start, block.out.stop) for block in blocks)
    return [start for start, _ in outs] + [out_features] == [0] + [stop for _, stop in outs]


def low_rank_backward(dy_TN: Tensor, thin_TR: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """(the gradient of the thin product, (T, R), and that of B in its dtype): what needs no x."""
    cast_B = factors.lora_B.to(dy_TN.dtype)
    dthin_TR, dB = torch.empty_like(thin_TR), cast_B.new_empty(cast_B.shape)  # row-major, whatever B is
    for block in factors.blocks:
        dy = dy_TN[:, block.out]
        block.read_B(dB).copy_(product(dy.T, thin_TR[:, block.a]).mul_(block.scaling))
        dthin_TR[:, block.a] = product(dy, block.read_B(cast_B)).mul_(block.scaling)
    return dthin_TR, dB.to(factors.lora_B.dtype)


def gradient_of_A(dthin_TR: Tensor, x_TK: Tensor, factors: Factors, keep_TK: Tensor | None, dropout_p: float) -> Tensor:
    """(R, K), in A's dtype."""
    return product(dthin_TR.T, _dropped(x_TK, keep_TK, dropout_p)).to(factors.lora_A.dtype)


def low_rank_input_gradient(dthin_TR: Tensor, factors: Factors, keep_TK: Tensor | None, dropout_p: float) -> Tensor:
    """The gradient that comes through A, (T, K), which dy W is to be added to, as in `low_rank_`."""
    return _dropped(product(dthin_TR, factors.lora_A.to(dthin_TR.dtype)), keep_TK, dropout_p)


class _LoRALinear(torch.autograd.Function):
    """Saves x, the thin product x Aᵀ and, under dropout, one byte an element, beside the weights themselves.

    Casts of A and B are made again in the backward pass: they cost r / T of a product, and keeping
    them would hold them for every layer at once.  Under `create_graph` the thin product is, too.
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
        keep_TK = draw_dropout(x_TK, dropout_p)
        y_TN = x_TK.new_empty(x_TK.shape[0], weight.shape[0])
        thin_TR = low_rank_(y_TN, x_TK, Factors(lora_A, lora_B, blocks), bias, keep_TK, dropout_p)
        add_linear_(y_TN, x_TK, weight)
        ctx.save_for_backward(x, weight, lora_A, lora_B, thin_TR, keep_TK)
        ctx.blocks, ctx.dropout_p, ctx.has_bias = blocks, dropout_p, bias is not None
        return y_TN.view(*x.shape[:-1], y_TN.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_gradients(ctx, dy)
        x, weight, lora_A, lora_B, thin_TR, keep_TK = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        x_TK, dy_TN = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        factors = Factors(lora_A, lora_B, ctx.blocks)
        dx_TK = dA = dB = None
        if need_x or need_A or need_B:
            dthin_TR, dB = low_rank_backward(dy_TN, thin_TR, factors)
        if need_A:
            dA = gradient_of_A(dthin_TR, x_TK, factors, keep_TK, ctx.dropout_p)
        if need_x:
            dx_TK = low_rank_input_gradient(dthin_TR, factors, keep_TK, ctx.dropout_p)
            add_input_gradient_(dx_TK, dy_TN, weight)
        return (
            None if dx_TK is None else dx_TK.view_as(x),
            product(dy_TN.T, x_TK) if need_weight else None,
            dy_TN.sum(0) if ctx.has_bias and need_bias else None,
            dA,
            dB if need_B else None,
            None,
            None,
        )


def _differentiable_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of `_LoRALinear` in plain operations on what it was given, so that they have gradients too."""
    x, weight, lora_A, lora_B, _, keep_TK = ctx.saved_tensors
    x_TK, dy_TN = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    A_RK, cast_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    dropped_TK = _dropped(x_TK, keep_TK, ctx.dropout_p)
    thin_TR = dropped_TK @ A_RK.T
    scaled = [(block, block.scaling * dy_TN[:, block.out]) for block in ctx.blocks]
    dthin_TR = torch.cat([dy @ block.read_B(cast_B) for block, dy in scaled], dim=1)
    dB = torch.cat([(dy.T @ thin_TR[:, block.a]).flatten() for block, dy in scaled])
    return (
        (dy_TN @ weight + _dropped(dthin_TR @ A_RK, keep_TK, ctx.dropout_p)).view_as(x),
        dy_TN.T @ x_TK if ctx.needs_input_grad[1] else None,
        dy_TN.sum(0) if ctx.has_bias else None,
        (dthin_TR.T @ dropped_TK).to(lora_A.dtype),
        dB.view_as(lora_B).to(lora_B.dtype),
        None,
        None,
    )


def _dropped(x_TK: Tensor, keep_TK: Tensor | None, dropout_p: float) -> Tensor:
    """Inverted dropout by a mask drawn earlier; x itself where there is none."""
    return x_TK if keep_TK is None else (x_TK * keep_TK).div_(max(1 - dropout_p, 1e-12))
