"""From a step's rows to flat batches.

A flat batch lays rows end to end in one line without padding; positions restart with each row, and attention stays
inside it:

    ids        [ a a a b b ]        position_ids  [ 0 1 2 0 1 ]        bounds  [ 0, 3, 5 ]

How a step's rows are laid out is layout only: the loss is the sum over supervised tokens divided by their
number in the whole step, so any layout gives the same update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from phinetune.data.render import Example

if TYPE_CHECKING:  # what comes before a batch needs no torch
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class FlatBatch:
    """T tokens of several rows. `predict` are the places whose next token is learnt, `targets` those tokens."""

    ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    bounds: list[int]  # [0, …, T]
    predict: Tensor  # (N,)
    targets: Tensor  # (N,)

    def to(self, device: torch.device) -> FlatBatch:
        tensors = (self.ids, self.position_ids, self.predict, self.targets)
        ids, position_ids, predict, targets = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return FlatBatch(ids, position_ids, self.bounds, predict, targets)


def lay_out(examples: Sequence[Example], max_tokens: int, boundary: int | None = None) -> list[FlatBatch]:
    """Rows as flat batches of at most `max_tokens` tokens, a longer row in one of its own.

    `boundary`: LongRoPE takes its factors from the largest position in a batch, so rows of more tokens than
    this are never laid together with shorter ones.
    """
    batches: list[list[Example]] = []
    room: list[int] = []
    beyond: list[bool] = []
    for example in sorted(examples, key=lambda e: len(e.ids), reverse=True):  # best fit, longest first
        length = len(example.ids)
        is_beyond = boundary is not None and length > boundary
        fitting = [i for i in range(len(batches)) if room[i] >= length and beyond[i] == is_beyond]
        if fitting:
            best = min(fitting, key=room.__getitem__)
        else:
            best = len(batches)
            batches.append([])
            room.append(max_tokens)
            beyond.append(is_beyond)
        batches[best].append(example)
        room[best] -= length
    return [flatten(batch) for batch in batches]


def flatten(examples: Sequence[Example]) -> FlatBatch:
    """Rows end to end."""
    import torch

    lengths = [len(example.ids) for example in examples]
    ids = torch.from_numpy(np.concatenate([np.asarray(example.ids, np.int64) for example in examples]))
    positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))
    learnt = np.concatenate([np.asarray(example.mask, bool) for example in examples])
    bounds = np.cumsum([0, *lengths]).tolist()
    learnt[bounds[:-1]] = False  # nothing predicts the first token of a row
    predict = torch.from_numpy(learnt.nonzero()[0] - 1)
    return FlatBatch(ids[None], positions[None], bounds, predict, ids[predict + 1])


def supervised_tokens(examples: Sequence[Example]) -> int:
    return sum(example.supervised for example in examples)
