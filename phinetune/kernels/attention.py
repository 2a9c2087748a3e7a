"""Causal attention over a flat pack: several examples end to end in one line, none seeing another.

    tokens   a a a b b        a [ 1 . . . . ]     paths [(0, 3)], [(3, 5)]
                              a [ 1 1 . . . ]
                              a [ 1 1 1 . . ]
                              b [ . . . 1 . ]
                              b [ . . . 1 1 ]

A segment of the line may continue another: examples that begin alike hold their common beginning once.

    tokens   p p a a b b      p [ 1 . . . . . ]   paths [(0, 2)], [(0, 2), (2, 4)], [(0, 2), (4, 6)]
                              p [ 1 1 . . . . ]
                              a [ 1 1 1 . . . ]
                              a [ 1 1 1 1 . . ]
                              b [ 1 1 . . 1 . ]
                              b [ 1 1 . . 1 1 ]

The square is never built.  There are several ways: on a CPU with the instructions for it, a C++ kernel (flash.py).  On
other CPUs and in other dtypes, plain products: each segment is cut into blocks of queries, and blocks of about the same
size are computed together: their queries and keys are gathered from the line, their scores are one batched product,
their softmax one pass (packs.py says which block goes where).  At 64 to 1,024 tokens these products are two to five
times as fast as torch's flash kernel, and ours two to three times as fast as they (Zen 5, bfloat16; docs/log.md).
On a GPU, in half precision, torch's variable-length flash attention (varlen.py); else a call of torch's own attention
for each segment.

Shape suffixes: T tokens of the line, H query heads, K key-value heads, J = H + 2K heads of q, k and v side by side,
D head width; of a group of blocks: N blocks, G query heads a key-value head (H = K·G), Q queries and S keys of a block.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels import flash, varlen
from phinetune.kernels.compiled import compiled
from phinetune.kernels.packs import Group, Pack, Path, pack_of
from phinetune.kernels.rotary import rotate, rotate_backward, rotate_backward_side_by_side

KEPT_KEYS = 512  # blocks that see no more keys keep their weights for the backward pass: they are cheaper kept


def packed_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, paths: Sequence[Path], scaling: float, window: int | None = None
) -> Tensor:
    """Softmax(scaling · q kᵀ) v of each token over those of its path that don't come after it.

    Args:
        q_THD: queries (T, H, D); k_TKD, v_TKD: keys and values (T, K, D), K dividing H.
        paths: of each segment; segments follow each other and fill the line. A path is whole segments: those that
            the one before its last is a path of, and its own.
        scaling: the factor on the scores, as a rule D ** -0.5.
        window: a token sees itself and the `window - 1` tokens before it; all of them where None.

    Returns:
        (T, H, D), contiguous.
    """
    if q_THD.device.type != "cpu":
        return _by_torch(q_THD, k_TKD, v_TKD, paths, scaling, window)
    qkv_TJD = torch.cat([q_THD, k_TKD, v_TKD], dim=1)
    return _on_cpu(qkv_TJD, None, None, k_TKD.shape[1], paths, scaling, window)


def rotary_attention(
    qkv_TN: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    kv_heads: int,
    paths: Sequence[Path],
    scaling: float,
    window: int | None = None,
    head_width: int | None = None,
) -> Tensor:
    """Packed attention of a fused projection's output, whose queries and keys are rotated first.

    Args:
        qkv_TN: (T, (H + 2K)·D): queries, keys, values side by side.
        cos_TR, sin_TR: of each token's position, (T, R): R ≤ D elements of a head are rotated.
        kv_heads: K; `head_width`: D, R where None.
        others: as in `packed_attention`.

    Returns:
        (T, H·D), contiguous.
    """
    qkv_TJD = qkv_TN.view(qkv_TN.shape[0], -1, head_width or cos_TR.shape[1])
    if qkv_TN.device.type == "cpu":
        out_THD = _on_cpu(qkv_TJD, cos_TR, sin_TR, kv_heads, paths, scaling, window)
    else:
        q_THD, k_TKD, v_TKD = cast(tuple[Tensor, ...], _Rotated.apply(qkv_TJD, cos_TR, sin_TR, kv_heads))
        out_THD = _by_torch(q_THD, k_TKD, v_TKD, paths, scaling, window)
    return out_THD.flatten(1)


def packed_attention_reference(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, paths: Sequence[Path], scaling: float, window: int | None = None
) -> Tensor:
    """The same by the whole square and a mask."""
    tokens, heads, kv_heads = q_THD.shape[0], q_THD.shape[1], k_TKD.shape[1]
    seen_TT = torch.zeros(tokens, tokens, dtype=torch.bool, device=q_THD.device)
    for path in paths:
        context = torch.cat([torch.arange(start, end) for start, end in path])
        own = slice(*path[-1])
        seen_TT[own] = seen_TT[own].index_copy(1, context, _seen(own.stop - own.start, len(context), window))
    k_THD, v_THD = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k_TKD, v_TKD))
    scores_HTT = torch.einsum("qhd,khd->hqk", q_THD, k_THD).float() * scaling
    weights_HTT = scores_HTT.masked_fill(~seen_TT, float("-inf")).softmax(-1).to(q_THD.dtype)
    return torch.einsum("hqk,khd->qhd", weights_HTT, v_THD)


def _on_cpu(
    qkv_TJD: Tensor,
    cos_TR: Tensor | None,
    sin_TR: Tensor | None,
    kv_heads: int,
    paths: Sequence[Path],
    scaling: float,
    window: int | None,
) -> Tensor:
    if flash.serves(qkv_TJD):
        return flash.flash_attention(qkv_TJD, cos_TR, sin_TR, kv_heads, paths, scaling, window)
    return cast(Tensor, _PackedAttention.apply(qkv_TJD, cos_TR, sin_TR, kv_heads, paths, scaling, window))


class _PackedAttention(torch.autograd.Function):
    """Keeps q and k as they are rotated, v, and the weights of blocks with few keys; those of others are made again."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_TJD: Tensor,
        cos_TR: Tensor | None,
        sin_TR: Tensor | None,
        kv_heads: int,
        paths: Sequence[Path],
        scaling: float,
        window: int | None,
    ) -> Tensor:
        if cos_TR is not None and sin_TR is not None:
            qkv_TJD = rotate(qkv_TJD, cos_TR, sin_TR, qkv_TJD.shape[1] - kv_heads)
        tokens, heads, width = qkv_TJD.shape
        pack = pack_of(paths, heads - 2 * kv_heads, kv_heads, window)
        kept, outs = [], []
        for group in pack.groups:
            q, k, v = _gather(qkv_TJD, group)
            scores = _by_head(q @ k.transpose(1, 2), group)
            weights, lse = _softmax(scores, group.query_positions, group.key_positions, scaling, pack.window)
            kept.append(weights if group.keys <= KEPT_KEYS else lse)
            outs.append((_by_kv_head(weights, group) @ v).view(-1, width))
        ctx.save_for_backward(qkv_TJD, cos_TR, sin_TR, *kept)
        ctx.pack, ctx.scaling = pack, scaling
        return _join(outs).index_select(0, pack.of_outputs).view(tokens, -1, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        qkv_TJD, cos_TR, sin_TR, *kept = ctx.saved_tensors
        pack: Pack = ctx.pack
        width = qkv_TJD.shape[2]
        dout_rows = torch.cat([dout_THD.reshape(-1, width), dout_THD.new_zeros(1, width)])
        dqs, dks, dvs = [], [], []
        for group, of_group in zip(pack.groups, kept, strict=True):
            q, k, v = _gather(qkv_TJD, group)
            dout = dout_rows.index_select(0, group.outputs).view(q.shape)
            weights = of_group
            if group.keys > KEPT_KEYS:
                scores = _by_head(q @ k.transpose(1, 2), group)
                positions = group.query_positions, group.key_positions
                weights = _softmax_again(scores, of_group, *positions, ctx.scaling, pack.window)
            dweights = _by_head(dout @ v.transpose(1, 2), group)
            dscores = _by_kv_head(_softmax_backward(weights, dweights, ctx.scaling), group)
            dqs.append((dscores @ k).view(-1, width))
            dks.append((dscores.transpose(1, 2) @ q).view(-1, width))
            dvs.append((_by_kv_head(weights, group).transpose(1, 2) @ dout).view(-1, width))
        dqkv_TJD = _join([*dqs, *dks, *dvs]).index_select(0, pack.of_inputs).view(qkv_TJD.shape)
        _sum_shared(dqkv_TJD, dks, dvs, pack)
        if cos_TR is not None:
            dqkv_TJD = rotate_backward(dqkv_TJD, cos_TR, sin_TR, dqkv_TJD.shape[1] - pack.kv_heads)
        return dqkv_TJD, None, None, None, None, None, None


def _gather(qkv_TJD: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """A group's queries (N·K, G·Q, D), keys and values (N·K, S, D)."""
    rows = qkv_TJD.view(-1, qkv_TJD.shape[2])
    batch = group.blocks * group.kv_heads
    q, k, v = (rows.index_select(0, which) for which in (group.q_rows, group.k_rows, group.v_rows))
    return q.view(batch, -1, rows.shape[1]), k.view(batch, -1, rows.shape[1]), v.view(batch, -1, rows.shape[1])


def _by_head(x: Tensor, group: Group) -> Tensor:
    """(N·K, G·Q, S) -> (N, H, Q, S)."""
    return x.view(group.blocks, -1, group.queries, group.keys)


def _by_kv_head(x: Tensor, group: Group) -> Tensor:
    """(N, H, Q, S) -> (N·K, G·Q, S)."""
    return x.view(group.blocks * group.kv_heads, -1, group.keys)


def _join(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _sum_shared(dqkv_TJD: Tensor, dks: list[Tensor], dvs: list[Tensor], pack: Pack) -> None:
    """Gradients of keys and values that several blocks see are summed up in fp32 and written in place."""
    heads, kv_heads, width = pack.heads, pack.kv_heads, dqkv_TJD.shape[2]
    precise = torch.promote_types(dqkv_TJD.dtype, torch.float32)
    for (start, end), pieces in pack.shared.items():
        for gradients, first in ((dks, heads), (dvs, heads + kv_heads)):
            total_KLD = dqkv_TJD.new_zeros(kv_heads, end - start, width, dtype=precise)
            for piece in pieces:
                group = pack.groups[piece.group]
                of_block_KSD = gradients[piece.group].view(group.blocks, kv_heads, group.keys, width)[piece.block]
                length = piece.keys.stop - piece.keys.start
                total_KLD[:, piece.offset : piece.offset + length] += of_block_KSD[:, piece.keys]
            dqkv_TJD[start:end, first : first + kv_heads] = total_KLD.transpose(0, 1)


@compiled
def _softmax(
    scores_NHQS: Tensor, query_positions_NQ: Tensor, key_positions_NS: Tensor, scaling: float, window: int
) -> tuple[Tensor, Tensor]:
    """Softmax(scaling · scores) over what is seen, and its log-sum-exp (N, H, Q, 1): sums in fp32 (fp64 for fp64)."""
    scores = _masked(scores_NHQS, query_positions_NQ, key_positions_NS, scaling, window)
    top = scores.amax(-1, keepdim=True)
    e = torch.exp(scores - top)
    sum_ = e.sum(-1, keepdim=True)
    return (e * (1 / sum_)).to(scores_NHQS.dtype), top + sum_.log()


@compiled
def _softmax_again(
    scores_NHQS: Tensor,
    lse_NHQ1: Tensor,
    query_positions_NQ: Tensor,
    key_positions_NS: Tensor,
    scaling: float,
    window: int,
) -> Tensor:
    """The same softmax by its log-sum-exp."""
    scores = _masked(scores_NHQS, query_positions_NQ, key_positions_NS, scaling, window)
    return torch.exp(scores - lse_NHQ1).to(scores_NHQS.dtype)


def _masked(
    scores_NHQS: Tensor, query_positions_NQ: Tensor, key_positions_NS: Tensor, scaling: float, window: int
) -> Tensor:
    """Scaled scores in fp32 at least, −inf where the query doesn't see the key."""
    query, key = query_positions_NQ[:, None, :, None], key_positions_NS[:, None, None, :]
    scores = scores_NHQS.to(torch.promote_types(scores_NHQS.dtype, torch.float32)) * scaling
    return torch.where((key <= query) & (key > query - window), scores, float("-inf"))


@compiled
def _softmax_backward(weights: Tensor, dweights: Tensor, scaling: float) -> Tensor:
    """The gradient of the scores: scaling · w · (dw − Σ w · dw)."""
    precise = torch.promote_types(weights.dtype, torch.float32)
    w = weights.to(precise)
    along = w * dweights.to(precise)
    return ((along - w * along.sum(-1, keepdim=True)) * scaling).to(weights.dtype)


class _Rotated(torch.autograd.Function):
    """(queries (T, H, D) and keys (T, K, D), turned, values (T, K, D)). Keeps the angles alone, which all layers
    share."""

    @staticmethod
    def forward(ctx: Any, qkv_TJD: Tensor, cos_TR: Tensor, sin_TR: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos_TR, sin_TR)
        turned_TJD = rotate(qkv_TJD, cos_TR, sin_TR, qkv_TJD.shape[1] - kv_heads)
        sizes = [qkv_TJD.shape[1] - 2 * kv_heads, kv_heads, kv_heads]
        return tuple(turned_TJD.split(sizes, dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_THD: Tensor, dk_TKD: Tensor, dv_TKD: Tensor) -> tuple[Tensor | None, ...]:
        return rotate_backward_side_by_side(dq_THD, dk_TKD, dv_TKD, *ctx.saved_tensors), None, None, None


def _by_torch(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, paths: Sequence[Path], scaling: float, window: int | None
) -> Tensor:
    """By torch's variable-length attention where that is for them, else a call of its attention for each segment."""
    if varlen.serves(q_THD):
        return varlen.varlen_attention(q_THD, k_TKD, v_TKD, paths, scaling, window)
    outs = []
    for path in paths:
        q_HQD = q_THD[slice(*path[-1])].transpose(0, 1)
        k_KSD, v_KSD = (torch.cat([x[slice(*piece)] for piece in path]).transpose(0, 1) for x in (k_TKD, v_TKD))
        shared = q_HQD.shape[0] // k_KSD.shape[0]  # each by itself, since no lean kernel shares them in float32
        k_HSD, v_HSD = (x.repeat_interleave(shared, dim=0) for x in (k_KSD, v_KSD))
        queries, keys = q_HQD.shape[1], k_HSD.shape[1]
        plain = len(path) == 1 and (window is None or keys <= window)
        seen_QS = None if plain else _seen(queries, keys, window).to(q_HQD.device)
        out_HQD = F.scaled_dot_product_attention(
            q_HQD[None], k_HSD[None], v_HSD[None], seen_QS, is_causal=plain, scale=scaling
        )[0]
        outs.append(out_HQD.transpose(0, 1))
    return torch.cat(outs)


def _seen(queries: int, keys: int, window: int | None) -> Tensor:
    """(Q, S): which keys the last `queries` tokens of a context of `keys` see."""
    distance_QS = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
    return (distance_QS >= 0) & (distance_QS < (window or keys))
