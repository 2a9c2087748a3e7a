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

The square is never built.  On a CPU each segment is cut into blocks of queries; a block's scores against all keys that
it sees are one product, its softmax one pass: at 64 to 1,024 tokens two to five times as fast as torch's flash kernel
(Zen 5; docs/log.md).  Elsewhere each segment is a call of torch's own attention.

Shape suffixes: T tokens of the line, H query heads, K key-value heads, G query heads a key-value head (H = K·G),
D head width, Q queries of a block, C keys that a segment sees (its context), S keys that a block sees.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels.compiled import compiled
from phinetune.kernels.rotary import rotate, rotate_backward

Path = Sequence[tuple[int, int]]
"""Where the tokens that a segment sees lie, in order of their positions: (start, end) of each piece, its own the last."""

BLOCK_ELEMENTS = 1 << 21  # scores of a block of queries: they stay in the cache between the passes over them
SMALLEST_BLOCK, LARGEST_BLOCK = 64, 256  # queries; larger blocks compute more of what is masked
KEPT_CONTEXT = 384  # a block that sees no more keys keeps its weights for the backward pass: they are cheaper kept


def packed_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, paths: Sequence[Path], scaling: float, window: int | None = None
) -> Tensor:
    """Softmax(scaling · q kᵀ) v of each token over those of its path that don't come after it.

    Args:
        q_THD: queries (T, H, D); k_TKD, v_TKD: keys and values (T, K, D), K dividing H.
        paths: of each segment; segments follow each other and fill the line.
        scaling: the factor on the scores, as a rule D ** -0.5.
        window: a token sees itself and the `window - 1` tokens before it; all of them where None.

    Returns:
        (T, H, D), contiguous.
    """
    if q_THD.device.type != "cpu":
        return _by_torch(q_THD, k_TKD, v_TKD, paths, scaling, window)
    return cast(Tensor, _PackedAttention.apply(q_THD, k_TKD, v_TKD, paths, scaling, window))


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
    width = head_width or cos_TR.shape[1]
    qkv_THD = qkv_TN.view(qkv_TN.shape[0], -1, width)
    if qkv_TN.device.type == "cpu":
        out_THD = _RotaryAttention.apply(qkv_THD, cos_TR, sin_TR, kv_heads, paths, scaling, window)
    else:
        q_THD, k_TKD, v_TKD = _split(rotate(qkv_THD, cos_TR, sin_TR, qkv_THD.shape[1] - kv_heads), kv_heads)
        out_THD = _by_torch(q_THD, k_TKD, v_TKD, paths, scaling, window)
    return cast(Tensor, out_THD).flatten(1)


def separate(bounds: Sequence[int]) -> list[Path]:
    """Paths of segments that share nothing: [0, 3, 5] -> [[(0, 3)], [(3, 5)]]."""
    return [[(start, end)] for start, end in zip(bounds, bounds[1:], strict=False)]


def packed_attention_reference(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, paths: Sequence[Path], scaling: float, window: int | None = None
) -> Tensor:
    """The same by the whole square and a mask."""
    tokens, heads, kv_heads = q_THD.shape[0], q_THD.shape[1], k_TKD.shape[1]
    seen_TT = torch.zeros(tokens, tokens, dtype=torch.bool, device=q_THD.device)
    for path in paths:
        context = torch.cat([torch.arange(start, end) for start, end in path])
        own = path[-1][1] - path[-1][0]
        positions = torch.arange(len(context))
        distance = positions[-own:, None] - positions[None]
        allowed = (distance >= 0) & (distance < (window or len(context)))
        seen_TT[slice(*path[-1])] = seen_TT[slice(*path[-1])].index_copy(1, context, allowed)
    k_THD, v_THD = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k_TKD, v_TKD))
    scores_HTT = torch.einsum("qhd,khd->hqk", q_THD, k_THD).float() * scaling
    weights_HTT = scores_HTT.masked_fill(~seen_TT, float("-inf")).softmax(-1).to(q_THD.dtype)
    return torch.einsum("hqk,khd->qhd", weights_HTT, v_THD)


class _Block(NamedTuple):
    """Queries `own` of the line against the keys `seen` of the segment's context, the first query's position there."""

    own: slice
    seen: slice
    position: int


def _blocks(path: Path, heads: int, window: int | None) -> Iterator[_Block]:
    start, end = path[-1]
    before = sum(e - s for s, e in path[:-1])
    done = start
    while done < end:
        seen_so_far = before + done - start
        seen = min(seen_so_far, window or seen_so_far) + LARGEST_BLOCK
        width = min(max(BLOCK_ELEMENTS // (heads * seen), SMALLEST_BLOCK), LARGEST_BLOCK)
        left = -(-(end - done) // width)
        width = -(-(end - done) // left)  # the rest in equal blocks
        first = 0 if window is None else max(0, seen_so_far - window + 1)
        yield _Block(slice(done, done + width), slice(first, seen_so_far + width), seen_so_far)
        done += width


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *how: Any) -> Tensor:
        out_THD, kept = _attend(q_THD, k_TKD, v_TKD, *how)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, *kept)
        ctx.how = how
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_TKD, v_TKD, *kept = ctx.saved_tensors
        return *_split(_attend_backward(dout_THD, q_THD, k_TKD, v_TKD, kept, *ctx.how), k_TKD.shape[1]), None, None, None


class _RotaryAttention(torch.autograd.Function):
    """Keeps q and k as they are rotated, not as they were."""

    @staticmethod
    def forward(ctx: Any, qkv_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, kv_heads: int, *how: Any) -> Tensor:
        turned_THD = rotate(qkv_THD, cos_TR, sin_TR, qkv_THD.shape[1] - kv_heads)
        out_THD, kept = _attend(*_split(turned_THD, kv_heads), *how)
        ctx.save_for_backward(turned_THD, cos_TR, sin_TR, *kept)
        ctx.kv_heads, ctx.how = kv_heads, how
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        turned_THD, cos_TR, sin_TR, *kept = ctx.saved_tensors
        dqkv_THD = _attend_backward(dout_THD, *_split(turned_THD, ctx.kv_heads), kept, *ctx.how)
        dqkv_THD = rotate_backward(dqkv_THD, cos_TR, sin_TR, dqkv_THD.shape[1] - ctx.kv_heads)
        return dqkv_THD, None, None, None, None, None, None


def _split(qkv_THD: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q_THD, k_TKD, v_TKD = qkv_THD.split([qkv_THD.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    return q_THD, k_TKD, v_TKD


def _attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, paths: Sequence[Path], scaling: float, window: int | None
) -> tuple[Tensor, list[Tensor]]:
    """The output and, of each block, its weights or their log-sum-exp, from which they are made again."""
    kv_heads = k_TKD.shape[1]
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    kept: list[Tensor] = []
    for path in paths:
        k_KCD, v_KCD = _context(k_TKD, path), _context(v_TKD, path)
        for block in _blocks(path, q_THD.shape[1], window):
            q_KRD = _heads_first(q_THD[block.own], kv_heads)
            scores_KRS = q_KRD @ _seen(k_KCD, block).transpose(1, 2)
            weights_HQS, lse_HQ1 = _softmax(*_of_heads(scores_KRS, block, window), scaling)
            kept.append(weights_HQS if _keeps_weights(block) else lse_HQ1)
            _write(out_THD[block.own], weights_HQS.view_as(scores_KRS) @ _seen(v_KCD, block))
    return out_THD, kept


def _attend_backward(
    dout_THD: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    kept: Sequence[Tensor],
    paths: Sequence[Path],
    scaling: float,
    window: int | None,
) -> Tensor:
    """The gradients of q, k and v side by side, (T, H + 2K, D)."""
    heads, kv_heads = q_THD.shape[1], k_TKD.shape[1]
    dqkv_THD = q_THD.new_empty(q_THD.shape[0], heads + 2 * kv_heads, q_THD.shape[2])
    dq_THD, dk_TKD, dv_TKD = _split(dqkv_THD, kv_heads)
    shared = _Shared(paths)
    of_blocks = iter(kept)
    for path in paths:
        k_KCD, v_KCD = _context(k_TKD, path), _context(v_TKD, path)
        dk_KCD, dv_KCD = None, None
        for block in _blocks(path, heads, window):
            q_KRD, dout_KRD = _heads_first(q_THD[block.own], kv_heads), _heads_first(dout_THD[block.own], kv_heads)
            k_KSD, of_block = _seen(k_KCD, block), next(of_blocks)
            if not _keeps_weights(block):
                scores_KRS = q_KRD @ k_KSD.transpose(1, 2)
                of_block = _softmax_again(*_of_heads(scores_KRS, block, window), of_block, scaling)
            weights_KRS = of_block.view(kv_heads, q_KRD.shape[1], -1)
            dweights_KRS = dout_KRD @ _seen(v_KCD, block).transpose(1, 2)
            dscores_KRS = _softmax_backward(weights_KRS, dweights_KRS, scaling)
            _write(dq_THD[block.own], dscores_KRS @ k_KSD)
            dk_KSD, dv_KSD = dscores_KRS.transpose(1, 2) @ q_KRD, weights_KRS.transpose(1, 2) @ dout_KRD
            dk_KCD, dv_KCD = _add_seen(dk_KCD, dk_KSD, block, k_KCD), _add_seen(dv_KCD, dv_KSD, block, v_KCD)
        assert dk_KCD is not None and dv_KCD is not None
        shared.give_back(dk_TKD, dk_KCD, path, "k")
        shared.give_back(dv_TKD, dv_KCD, path, "v")
    shared.write(dk_TKD, dv_TKD)
    return dqkv_THD


class _Shared:
    """Gradients of keys and values that several segments see, summed in fp32 until all of them are there."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.ends = {path[-1][0]: path[-1][1] for path in paths}
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.starts = {start for path in paths for start, _ in path[:-1]}

    def give_back(self, gradient_TKD: Tensor, gradient_KCD: Tensor, path: Path, name: str) -> None:
        """A context's gradient goes to the places that it was gathered from."""
        pieces = gradient_KCD.split([end - start for start, end in path], dim=1)
        for (start, end), piece_KCD in zip(path, pieces, strict=True):
            if start not in self.starts:
                gradient_TKD[start:end] = piece_KCD.transpose(0, 1)
            elif (name, start) in self.sums:
                self.sums[name, start] += piece_KCD
            else:
                self.sums[name, start] = piece_KCD.to(torch.promote_types(piece_KCD.dtype, torch.float32), copy=True)

    def write(self, dk_TKD: Tensor, dv_TKD: Tensor) -> None:
        for (name, start), sum_KCD in self.sums.items():
            {"k": dk_TKD, "v": dv_TKD}[name][start : self.ends[start]] = sum_KCD.transpose(0, 1)


def _context(x_TKD: Tensor, path: Path) -> Tensor:
    """Keys or values of a path, (K, C, D), contiguous."""
    pieces = [x_TKD[start:end].transpose(0, 1) for start, end in path]
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0].contiguous()


def _heads_first(x_QHD: Tensor, kv_heads: int) -> Tensor:
    """(Q, H, D) -> (K, R, D), R = G·Q rows that share their keys, contiguous."""
    queries, heads, width = x_QHD.shape
    grouped = x_QHD.view(queries, kv_heads, heads // kv_heads, width).permute(1, 2, 0, 3)
    return grouped.reshape(kv_heads, heads // kv_heads * queries, width)


def _write(out_QHD: Tensor, out_KRD: Tensor) -> None:
    """The opposite of `_heads_first`, into a part of the line."""
    queries, heads, width = out_QHD.shape
    kv_heads = out_KRD.shape[0]
    out_QHD.view(queries, kv_heads, heads // kv_heads, width).copy_(
        out_KRD.view(kv_heads, heads // kv_heads, queries, width).permute(2, 0, 1, 3)
    )


def _seen(x_KCD: Tensor, block: _Block) -> Tensor:
    """A block's keys or values, contiguous: a batched product of a slice copies it each time."""
    return x_KCD[:, block.seen].contiguous()


def _add_seen(sum_KCD: Tensor | None, gradient_KSD: Tensor, block: _Block, like_KCD: Tensor) -> Tensor:
    """Adds a block's gradient to its context's, which is summed in fp32; a block that sees all is the only one."""
    if gradient_KSD.shape == like_KCD.shape and sum_KCD is None:
        return gradient_KSD
    if sum_KCD is None:
        sum_KCD = torch.zeros_like(like_KCD, dtype=torch.promote_types(like_KCD.dtype, torch.float32))
    sum_KCD[:, block.seen] += gradient_KSD
    return sum_KCD


def _keeps_weights(block: _Block) -> bool:
    return block.seen.stop - block.seen.start <= KEPT_CONTEXT


def _of_heads(scores_KRS: Tensor, block: _Block, window: int | None) -> tuple[Tensor, Tensor]:
    """Scores by head, (H, Q, S), and what of them is hidden, (Q, S)."""
    queries, keys = block.own.stop - block.own.start, block.seen.stop - block.seen.start
    return scores_KRS.view(-1, queries, keys), _hidden(queries, keys, block.position - block.seen.start, window)


@functools.lru_cache(maxsize=64)
def _hidden(queries: int, keys: int, position: int, window: int | None) -> Tensor:
    """0 where the query at `position` + i sees key j, −inf where not: (Q, S) in fp32."""
    distance_QS = position + torch.arange(queries)[:, None] - torch.arange(keys)[None]
    seen_QS = (distance_QS >= 0) & (distance_QS < (window or position + queries))
    return torch.zeros(queries, keys).masked_fill_(~seen_QS, float("-inf"))


@compiled
def _softmax(scores_HQS: Tensor, hidden_QS: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Softmax(scaling · scores) over what is seen, and its log-sum-exp (H, Q, 1): sums in fp32 (fp64 for fp64)."""
    scores = scores_HQS.to(torch.promote_types(scores_HQS.dtype, torch.float32)) * scaling + hidden_QS
    top = scores.amax(-1, keepdim=True)
    e = torch.exp(scores - top)
    sum_ = e.sum(-1, keepdim=True)
    return (e * (1 / sum_)).to(scores_HQS.dtype), top + sum_.log()


@compiled
def _softmax_again(scores_HQS: Tensor, hidden_QS: Tensor, lse_HQ1: Tensor, scaling: float) -> Tensor:
    """The same softmax by its log-sum-exp."""
    return torch.exp(scores_HQS.to(lse_HQ1.dtype) * scaling + hidden_QS - lse_HQ1).to(scores_HQS.dtype)


@compiled
def _softmax_backward(weights: Tensor, dweights: Tensor, scaling: float) -> Tensor:
    """The gradient of the scores: scaling · w · (dw − Σ w · dw)."""
    precise = torch.promote_types(weights.dtype, torch.float32)
    w = weights.to(precise)
    along = w * dweights.to(precise)
    return ((along - w * along.sum(-1, keepdim=True)) * scaling).to(weights.dtype)


def _by_torch(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, paths: Sequence[Path], scaling: float, window: int | None
) -> Tensor:
    """A call of torch's attention for each segment."""
    outs = []
    for path in paths:
        q_HQD = q_THD[slice(*path[-1])].transpose(0, 1)
        k_KCD, v_KCD = _context(k_TKD, path), _context(v_TKD, path)
        queries, keys = q_HQD.shape[1], k_KCD.shape[1]
        plain = len(path) == 1 and (window is None or keys <= window)
        seen_QS = None if plain else (_hidden(queries, keys, keys - queries, window) == 0).to(q_HQD.device)
        out_HQD = F.scaled_dot_product_attention(
            q_HQD[None], k_KCD[None], v_KCD[None], seen_QS, is_causal=plain, scale=scaling, enable_gqa=True
        )[0]
        outs.append(out_HQD.transpose(0, 1))
    return torch.cat(outs)
