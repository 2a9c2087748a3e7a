"""From a step's rows to flat batches.

A flat batch lays rows end to end in one line without padding; positions restart with each row, and attention stays
inside it:

    ids        [ a a a b b ]        position_ids  [ 0 1 2 0 1 ]        paths  [(0, 3)], [(3, 5)]

Rows that begin alike (the same system message, the same document, the turns of one conversation) hold their beginning
once; what comes behind it sees it and goes on counting:

    ids  [ p p a a a b b ]    position_ids  [ 0 1 2 3 4 2 3 ]    paths  [(0, 2)], [(0, 2), (2, 5)], [(0, 2), (5, 7)]

How a step's rows are laid out is layout only: the loss is the sum over supervised tokens divided by their
number in the whole step, so any layout gives the same update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from phinetune.data.example import Example

if TYPE_CHECKING:  # what comes before a batch needs no torch
    import torch
    from torch import Tensor

LEAST_SHARED = 16  # tokens: below it a common beginning isn't worth a segment of its own


@dataclass(frozen=True)
class FlatBatch:
    """T tokens of several rows. `predict` are the places whose next token is learnt, `targets` those tokens."""

    ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    paths: list[list[tuple[int, int]]]  # of each segment of the line: the pieces that it sees, itself the last
    predict: Tensor  # (N,)
    targets: Tensor  # (N,)
    counts: Tensor | None  # (N,): how many rows learn it there; None where each is one row's
    rows: list[int]  # which of the examples that were laid out
    learnt: list[np.ndarray]  # of each of `rows`, which of `predict` it learns

    def to(self, device: torch.device) -> FlatBatch:
        tensors = {name: getattr(self, name) for name in ("ids", "position_ids", "predict", "targets", "counts")}
        moved = {name: t.to(device, non_blocking=True) for name, t in tensors.items() if t is not None}
        return replace(self, **moved)


@dataclass(frozen=True)
class _Segment:
    """Tokens [start, end) of some rows, which have them in common, behind other segments."""

    rows: list[int]
    start: int
    end: int
    before: list[_Segment]


def lay_out(
    examples: Sequence[Example], max_tokens: int, boundary: int | None = None, least_shared: int = LEAST_SHARED
) -> list[FlatBatch]:
    """Rows as flat batches of at most `max_tokens` tokens, a longer row in one of its own.

    Args:
        boundary: LongRoPE takes its factors from the largest position in a batch, so rows of more tokens than
            this are never laid together with shorter ones.
        least_shared: a beginning of so many tokens that rows have in common is laid once; 0 shares nothing.
    """
    examples = list(examples)
    batches: list[list[int]] = []
    room: list[int] = []
    beyond: list[bool] = []
    groups = _groups(examples, max_tokens, boundary, least_shared)
    for tokens, group in sorted(groups, key=lambda item: item[0], reverse=True):  # best fit, largest first
        is_beyond = boundary is not None and len(examples[group[0]].ids) > boundary
        fitting = [i for i in range(len(batches)) if room[i] >= tokens and beyond[i] == is_beyond]
        if fitting:
            best = min(fitting, key=room.__getitem__)
        else:
            best = len(batches)
            batches.append([])
            room.append(max_tokens)
            beyond.append(is_beyond)
        batches[best] += group
        room[best] -= tokens
    return [flatten([examples[row] for row in batch], least_shared, batch) for batch in batches]


def _groups(
    examples: Sequence[Example], max_tokens: int, boundary: int | None, least_shared: int
) -> Iterator[tuple[int, list[int]]]:
    """Rows that begin alike, as many as fit a batch, with about the tokens that they take together: fewer than
    `least_shared` a row may come on top, where neighbours have a little more in common than their segments."""
    if not least_shared:
        yield from ((len(example.ids), [row]) for row, example in enumerate(examples))
        return
    group: list[int] = []
    tokens = 0
    for row in _in_order(examples):
        own = examples[row].ids
        if group:
            last = examples[group[-1]].ids
            shared = _common(last, own)
            same_side = boundary is None or (len(last) > boundary) == (len(own) > boundary)
            more = len(own) - shared
            if shared >= least_shared and same_side and tokens + more <= max_tokens:
                group.append(row)
                tokens += more
                continue
            yield tokens, group
        group, tokens = [row], len(own)
    if group:
        yield tokens, group


def _in_order(examples: Sequence[Example]) -> list[int]:
    """The rows by their tokens, so that those which begin alike are neighbours."""
    return sorted(range(len(examples)), key=lambda row: np.asarray(examples[row].ids, np.dtype(">i4")).tobytes())


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two rows have in common at their beginning."""
    length = min(len(a), len(b))
    differs = np.asarray(a[:length]) != np.asarray(b[:length])
    return int(differs.argmax()) if differs.any() else length


def flatten(examples: Sequence[Example], least_shared: int = 0, rows: Sequence[int] | None = None) -> FlatBatch:
    """Rows as one line; beginnings of `least_shared` tokens and more that they have in common are laid once. `rows`
    are their numbers where they are some of many."""
    import torch

    if least_shared:
        segments = list(_segments(examples, _in_order(examples), 0, [], least_shared))
    else:
        segments = [_Segment([row], 0, len(example.ids), []) for row, example in enumerate(examples)]

    begins: dict[int, int] = {}  # where a segment begins in the line, by its id
    places = [np.zeros(len(example.ids), np.int64) for example in examples]  # of each row's tokens in the line
    ids, positions, paths = [], [], []
    total = 0
    for segment in segments:
        length = segment.end - segment.start
        begins[id(segment)] = total
        ids.append(np.asarray(examples[segment.rows[0]].ids[segment.start : segment.end], np.int64))
        positions.append(np.arange(segment.start, segment.end))
        of = [(begins[id(piece)], piece.end - piece.start) for piece in (*segment.before, segment)]
        paths.append([(start, start + size) for start, size in of])
        for row in segment.rows:
            places[row][segment.start : segment.end] = np.arange(total, total + length)
        total += length

    predict, targets = [], []
    for example, place in zip(examples, places, strict=True):
        learnt = np.asarray(example.mask, bool).nonzero()[0]
        learnt = learnt[learnt > 0]  # nothing predicts the first token of a row
        predict.append(place[learnt - 1])
        targets.append(np.asarray(example.ids, np.int64)[learnt])
    pairs, counts = np.stack([np.concatenate(predict), np.concatenate(targets)]), None
    of_rows = np.arange(pairs.shape[1])
    if len(segments) > len(examples) or any(segment.before for segment in segments):
        pairs, of_rows, counts = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
    return FlatBatch(
        ids=torch.from_numpy(np.concatenate(ids))[None],
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        paths=paths,
        predict=torch.from_numpy(np.ascontiguousarray(pairs[0])),
        targets=torch.from_numpy(np.ascontiguousarray(pairs[1])),
        counts=None if counts is None else torch.from_numpy(counts).float(),
        rows=list(range(len(examples)) if rows is None else rows),
        learnt=np.split(of_rows.reshape(-1), np.cumsum([len(places) for places in predict])[:-1]),
    )


def _segments(
    examples: Sequence[Example], rows: list[int], start: int, before: list[_Segment], least_shared: int
) -> Iterator[_Segment]:
    """The segments of rows that are in order and have their first `start` tokens, those of `before`, in common."""
    while rows:
        alike = 1  # how many of the first rows have enough behind `start` in common
        while alike < len(rows):
            shared = _common(examples[rows[alike - 1]].ids, examples[rows[alike]].ids)
            if shared - start < least_shared:
                break
            alike += 1
        group, rows = rows[:alike], rows[alike:]
        if len(group) == 1:
            end = len(examples[group[0]].ids)
            if end > start:
                yield _Segment(group, start, end, before)
            continue
        end = _common(examples[group[0]].ids, examples[group[-1]].ids)  # in order, so all of them have it
        segment = _Segment(group, start, end, before)
        yield segment
        yield from _segments(examples, group, end, [*before, segment], least_shared)


def supervised_tokens(examples: Sequence[Example]) -> int:
    return sum(example.supervised for example in examples)
