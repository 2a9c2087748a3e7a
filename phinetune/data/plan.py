"""Which rows each step takes: from (seed, epoch) alone, so that any step is found again at once.

A step is a number of rows in shuffled order, or, packed, as many as a budget of tokens holds.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from phinetune.recipe import TrainingConfig


class Plan(Sequence[list[int]]):
    """The rows of every step of a run: `max_steps` where positive, else `num_train_epochs`.

    Args:
        lengths: tokens of each row.
        seed: of the order.
        weights: how often an epoch holds each row, 1 by default; a fraction takes other rows in each epoch.
    """

    def __init__(self, lengths: Any, seed: int, config: TrainingConfig, max_length: int, weights: Any = None) -> None:
        self.lengths, self.seed, self.weights = np.asarray(lengths), seed, weights
        self.rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.budget = self.rows * max_length if config.packing else 0
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)
        self.ends: list[int] = []  # steps behind which each epoch ends
        while config.max_steps > 0 or len(self.ends) < config.num_train_epochs:
            before = self.ends[-1] if self.ends else 0
            steps = self._steps_of(len(self.ends))
            share = min(1.0, config.num_train_epochs - len(self.ends)) if config.max_steps <= 0 else 1.0
            self.ends.append(before + max(1, math.ceil(round(steps * share, 6))))  # 1.1 - 1 is more than 0.1
            if 0 < config.max_steps <= self.ends[-1]:
                self.ends[-1] = config.max_steps
                break
        self._whole_last = self.ends[-1] - (self.ends[-2] if len(self.ends) > 1 else 0) == steps

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, step: Any) -> Any:
        if isinstance(step, slice):
            return [self[number] for number in range(*step.indices(len(self)))]
        if not -len(self) <= step < len(self):
            raise IndexError(step)
        step %= len(self)
        epoch = int(np.searchsorted(self.ends, step, side="right"))
        order, bounds = self._epoch(epoch)
        number = step - (self.ends[epoch - 1] if epoch else 0)
        return order[bounds[number] : bounds[number + 1]].tolist()

    @property
    def epoch_ends(self) -> set[int]:
        """Steps behind which an epoch has been seen to its end."""
        return set(self.ends if self._whole_last else self.ends[:-1])

    @property
    def most_tokens(self) -> int:
        """Of the step that has most."""
        epochs = map(self._epoch, range(len(self.ends)))
        return max(int(np.add.reduceat(self.lengths[order], bounds[:-1]).max()) for order, bounds in epochs)

    def rows_from(self, step: int) -> Any:
        """Every row that is still to come, with repeats."""
        parts = [np.zeros(0, np.int64)]
        for epoch, end in enumerate(self.ends):
            begin = self.ends[epoch - 1] if epoch else 0
            if end > step:
                order, bounds = self._epoch(epoch)
                parts.append(order[bounds[max(step - begin, 0)] : bounds[end - begin]])
        return np.concatenate(parts)

    def _steps_of(self, epoch: int) -> int:
        if self.budget or self.weights is not None:
            return len(self._epoch(epoch)[1]) - 1
        return math.ceil(len(self.lengths) / self.rows)

    def _plan_epoch(self, epoch: int) -> tuple[Any, Any]:
        """(rows in order, where each step begins in it and the last ends)"""
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = generator.permutation(self._rows_of(epoch))
        if not self.budget:
            return order, np.array([*range(0, len(order), self.rows), len(order)])
        ends = np.cumsum(self.lengths[order])
        bounds = [0]
        while bounds[-1] < len(order):
            used = ends[bounds[-1] - 1] if bounds[-1] else 0
            bounds.append(max(int(np.searchsorted(ends, used + self.budget, side="right")), bounds[-1] + 1))
        return order, np.array(bounds)

    def _rows_of(self, epoch: int) -> Any:
        """The rows of an epoch: each as often as its weight says, a fraction of them in turn."""
        rows = np.arange(len(self.lengths))
        if self.weights is None:
            return rows
        taken = [np.repeat(rows, np.floor(self.weights).astype(int))]
        for weight in np.unique(self.weights):
            share = weight % 1
            if share:
                group = np.random.Generator(np.random.PCG64(self.seed)).permutation(rows[self.weights == weight])
                size = max(1, round(share * len(group)))
                start = epoch * size % len(group)
                taken.append(np.take(group, range(start, start + size), mode="wrap"))
        return np.concatenate(taken)


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """The places of a step's rows for each of some processes, with tokens as even as may be.

    The longest first, each to the process that has least; a process may get none of a small step.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        rank = loads.index(min(loads))
        shares[rank].append(place)
        loads[rank] += lengths[place]
    return shares
