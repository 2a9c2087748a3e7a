"""Which tokens of a flat line are computed together in attention: segments in blocks of queries, blocks in groups.

    row a: 300 tokens       blocks  a0 (150 queries, 150 keys), a1 (150, 300)
    row b: 140              b0 (140, 140)                                        groups  {a0, b0}, {a1}

A group is padded to its largest block.  Padded queries see what their block's last one sees, are read by nobody, and
the gradient of their output is the row of zeros behind the line's; padded keys have a position after every query's,
so nobody sees them.  A pack depends on the line's layout alone and serves all
layers, forward and backward.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Path = Sequence[tuple[int, int]]
"""Where the tokens that a segment sees lie, in order of positions: (start, end) of each piece, its own the last."""

LARGEST_BLOCK, SMALLEST_BLOCK = 256, 64  # queries: large blocks compute more of what nobody sees
GROUP_SCORES = 1 << 22  # of a group: they stay in the cache between the passes over them
PADDING = 0.2  # of a group's scores at most
NO_WINDOW = BEYOND = 1 << 30


class Block(NamedTuple):
    """Queries at `own` of the line and the keys that they see, as pieces of the line; the first ones' positions."""

    own: slice
    pieces: list[slice]
    query_position: int
    key_position: int

    @property
    def queries(self) -> int:
        return int(self.own.stop - self.own.start)

    @property
    def keys(self) -> int:
        return sum(int(piece.stop - piece.start) for piece in self.pieces)


class Group(NamedTuple):
    """N blocks, padded to Q queries and S keys. Rows count heads of tokens, as q, k and v lie side by side."""

    blocks: int
    kv_heads: int
    queries: int
    keys: int
    q_rows: Tensor  # (N·H·Q,) of the line of q, k and v
    k_rows: Tensor  # (N·K·S,)
    v_rows: Tensor  # (N·K·S,)
    outputs: Tensor  # (N·H·Q,) of the line of outputs, T·H where padded
    query_positions: Tensor  # (N, Q)
    key_positions: Tensor  # (N, S)


class Piece(NamedTuple):
    """Keys of a block of a group that lie `offset` tokens into a segment that several blocks see."""

    group: int
    block: int
    keys: slice
    offset: int


class Pack(NamedTuple):
    groups: list[Group]
    heads: int
    kv_heads: int
    window: int
    of_outputs: Tensor  # (T·H,): where each output is among the groups' rows
    of_inputs: Tensor  # (T·(H + 2K),): where each gradient is among those of all queries, all keys, all values
    shared: dict[tuple[int, int], list[Piece]]
    """Segments whose keys several blocks see, with all pieces of their gradients."""


def separate(bounds: Sequence[int]) -> list[Path]:
    """Paths of segments that share nothing: [0, 3, 5] -> [[(0, 3)], [(3, 5)]]."""
    return [[(start, end)] for start, end in itertools.pairwise(bounds)]


def pack_of(paths: Sequence[Path], heads: int, kv_heads: int, window: int | None) -> Pack:
    """The pack of a line, made once for all layers."""
    return _pack(tuple(tuple(path) for path in paths), heads, kv_heads, window or NO_WINDOW)


@functools.lru_cache(maxsize=4)
def _pack(paths: tuple[tuple[tuple[int, int], ...], ...], heads: int, kv_heads: int, window: int) -> Pack:
    blocks = sorted((b for path in paths for b in _blocks(path, heads, window)), key=lambda b: (b.keys, b.queries))
    grouped = list(_grouped(blocks, heads))
    tokens = paths[-1][-1][1]
    groups = [_group(members, heads, kv_heads, tokens) for members in grouped]
    side = heads + 2 * kv_heads
    of_outputs = torch.empty(tokens, heads, dtype=torch.int64)
    of_inputs = torch.empty(tokens, side, dtype=torch.int64)
    q_total, k_total = (sum(len(getattr(group, rows)) for group in groups) for rows in ("q_rows", "k_rows"))
    q_done = k_done = 0
    pieces: dict[tuple[int, int], list[Piece]] = {path[-1]: [] for path in paths}
    segment_at = {start: (start, end) for start, end in pieces}
    starts = torch.tensor(sorted(segment_at))
    for number, (group, members) in enumerate(zip(groups, grouped, strict=True)):
        q_rows = q_done + torch.arange(len(group.q_rows)).view(group.blocks, heads, group.queries)
        k_rows = q_total + k_done + torch.arange(len(group.k_rows)).view(group.blocks, kv_heads, group.keys)
        for i, block in enumerate(members):
            of_outputs[block.own] = q_rows[i, :, : block.queries].T
            done = 0
            for piece in block.pieces:
                length = piece.stop - piece.start
                keys = slice(done, done + length)
                of_inputs[piece, heads : heads + kv_heads] = k_rows[i, :, keys].T
                of_inputs[piece, heads + kv_heads :] = k_rows[i, :, keys].T + k_total
                segment = segment_at[int(starts[torch.searchsorted(starts, piece.start, right=True) - 1])]
                pieces[segment].append(Piece(number, i, keys, piece.start - segment[0]))
                done += length
        q_done, k_done = q_done + len(group.q_rows), k_done + len(group.k_rows)
    of_inputs[:, :heads] = of_outputs
    shared = {segment: of for segment, of in pieces.items() if len(of) > 1}
    return Pack(groups, heads, kv_heads, window, of_outputs.flatten(), of_inputs.flatten(), shared)


def _blocks(path: Path, heads: int, window: int) -> Iterator[Block]:
    start, end = path[-1]
    before = sum(e - s for s, e in path[:-1])
    done = start
    while done < end:
        seen = before + done - start
        width = GROUP_SCORES // (heads * (min(seen, window) + LARGEST_BLOCK))
        width = min(max(width, SMALLEST_BLOCK), LARGEST_BLOCK)
        width = -(-(end - done) // -(-(end - done) // width))  # the rest in equal blocks
        first = max(0, seen - window + 1)
        pieces = []
        position = 0
        for s, e in (*path[:-1], (start, done + width)):
            skipped = min(max(first - position, 0), e - s)
            if skipped < e - s:
                pieces.append(slice(s + skipped, e))
            position += e - s
        yield Block(slice(done, done + width), pieces, seen, first)
        done += width


def _grouped(blocks: list[Block], heads: int) -> Iterator[list[Block]]:
    """Blocks in order of size, as many together as padding and the cache allow."""
    members: list[Block] = []
    for block in blocks:
        together = [*members, block]
        queries, keys = max(b.queries for b in together), max(b.keys for b in together)
        area = len(together) * queries * keys
        real = sum(b.queries * b.keys for b in together)
        if members and (area * heads > GROUP_SCORES or area > real * (1 + PADDING)):
            yield members
            together = [block]
        members = together
    if members:
        yield members


def _group(members: list[Block], heads: int, kv_heads: int, tokens: int) -> Group:
    queries, keys = max(b.queries for b in members), max(b.keys for b in members)
    q_tokens = torch.zeros(len(members), queries, dtype=torch.int64)
    k_tokens = torch.zeros(len(members), keys, dtype=torch.int64)
    is_padded = torch.ones(len(members), queries, dtype=torch.bool)
    query_positions = torch.zeros(len(members), queries, dtype=torch.int32)
    key_positions = torch.full((len(members), keys), BEYOND, dtype=torch.int32)
    for i, block in enumerate(members):
        q_tokens[i, : block.queries] = torch.arange(block.own.start, block.own.stop)
        k_tokens[i, : block.keys] = torch.cat([torch.arange(piece.start, piece.stop) for piece in block.pieces])
        query_positions[i, : block.queries] = block.query_position + torch.arange(block.queries)
        key_positions[i, : block.keys] = block.key_position + torch.arange(block.keys)
        query_positions[i, block.queries :] = block.query_position + block.queries - 1
        is_padded[i, : block.queries] = False
    side = heads + 2 * kv_heads
    of_heads, of_kv_heads = torch.arange(heads)[None, :, None], torch.arange(kv_heads)[None, :, None]
    q_tokens, k_tokens = q_tokens[:, None], k_tokens[:, None]
    return Group(
        len(members),
        kv_heads,
        queries,
        keys,
        (q_tokens * side + of_heads).flatten(),
        (k_tokens * side + heads + of_kv_heads).flatten(),
        (k_tokens * side + heads + kv_heads + of_kv_heads).flatten(),
        (q_tokens * heads + of_heads).masked_fill(is_padded[:, None], tokens * heads).flatten(),
        query_positions,
        key_positions,
    )
