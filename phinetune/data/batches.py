"""From examples to steps, and from a step to flat batches.

A step is a number of rows in shuffled order (or, packed, a token budget).  A flat batch lays rows end to
end in one line without padding; positions restart with each row, and attention stays inside it:

    ids        [ a a a b b ]        position_ids  [ 0 1 2 0 1 ]        bounds  [ 0, 3, 5 ]

How a step's rows are laid out is layout only: the loss is the sum over supervised tokens divided by their
number in the whole step, so any layout gives the same update.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phinetune.data.render import Example
from phinetune.recipe import TrainingConfig


@dataclass(frozen=True)
class FlatBatch:
    """T tokens of several rows. `predict` are the places whose next token is learnt, `targets` those tokens."""

    ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    bounds: list[int]  # [0, …, T]
    predict: Tensor  # (N,)
    targets: Tensor  # (N,)

    def to(self, device: torch.device) -> "FlatBatch":
        tensors = (self.ids, self.position_ids, self.predict, self.targets)
        ids, position_ids, predict, targets = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return FlatBatch(ids, position_ids, self.bounds, predict, targets)


def plan_epoch(
    lengths: Sequence[int], epoch: int, seed: int, config: TrainingConfig, max_length: int
) -> list[list[int]]:
    """The rows of each step of an epoch, from (seed, epoch) alone: any step can be found again."""
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(lengths)).tolist()
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if not config.packing:
        return [order[start : start + rows] for start in range(0, len(order), rows)]
    budget = rows * max_length
    steps: list[list[int]] = [[]]
    used = 0
    for row in order:
        if used + lengths[row] > budget and steps[-1]:
            steps.append([])
            used = 0
        steps[-1].append(row)
        used += lengths[row]
    return steps


def plan_run(lengths: Sequence[int], seed: int, config: TrainingConfig, max_length: int) -> list[list[int]]:
    """The rows of every step of the run: `max_steps` where positive, else `num_train_epochs`."""
    steps: list[list[int]] = []
    epoch = 0
    while True:
        planned = plan_epoch(lengths, epoch, seed, config, max_length)
        left = config.max_steps - len(steps)
        if config.max_steps <= 0:
            left = math.ceil(len(planned) * (config.num_train_epochs - epoch))
        if left <= 0:
            return steps
        steps += planned[:left]
        epoch += 1


def lay_out(examples: Sequence[Example], max_tokens: int, boundary: int | None = None) -> list[FlatBatch]:
    """Rows as flat batches of at most `max_tokens` tokens, a longer row in one of its own.

    `boundary`: LongRoPE takes its factors from the largest position in a batch, so rows of more tokens than
    this are never laid together with shorter ones.
    """
    batches: list[list[Example]] = []
    room: list[int] = []
    beyond: list[bool] = []
    for example in sorted(examples, key=lambda e: len(e.ids), reverse=True):  # first fit, longest first
        length = len(example.ids)
        is_beyond = boundary is not None and length > boundary
        for i in range(len(batches)):
            if room[i] >= length and beyond[i] == is_beyond:
                break
        else:
            i = len(batches)
            batches.append([])
            room.append(max_tokens)
            beyond.append(is_beyond)
        batches[i].append(example)
        room[i] -= length
    return [flatten(batch) for batch in batches]


def flatten(examples: Sequence[Example]) -> FlatBatch:
    """Rows end to end."""
    ids = torch.tensor([token for example in examples for token in example.ids])
    positions = torch.cat([torch.arange(len(example.ids)) for example in examples])
    bounds = np.cumsum([0] + [len(example.ids) for example in examples]).tolist()
    learnt = torch.tensor([flag for example in examples for flag in (False, *example.mask[1:])])
    predict = learnt.nonzero()[:, 0] - 1
    return FlatBatch(ids[None], positions[None], bounds, predict, ids[predict + 1])


def supervised_tokens(examples: Sequence[Example]) -> int:
    return sum(example.supervised for example in examples)
