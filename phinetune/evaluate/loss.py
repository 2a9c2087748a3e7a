"""The held-out loss: every supervised token counts the same, whatever row it stands in."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phinetune.data import Example, FlatBatch
from phinetune.errors import RunError
from phinetune.kernels.allocator import is_out_of_memory
from phinetune.model import flat_batches, row_losses

AT_ONCE = 4096  # rows that are laid out: how long that takes grows with their square
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowLosses:
    """Of each row, in their order, the sum of its supervised tokens' cross-entropy in nats, and their number."""

    losses: list[float]
    tokens: list[int]

    def measured(self) -> dict[str, float]:
        """`eval_loss` (nats a supervised token) and `perplexity`."""
        loss = math.fsum(self.losses) / sum(self.tokens)
        return {"eval_loss": loss, "perplexity": perplexity(loss)}


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def evaluate_loss(
    model: Any, examples: Sequence[Example], max_tokens: int, on_batch: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """`eval_loss` and `perplexity` over all of the rows; the arguments of `evaluate_rows`."""
    return evaluate_rows(model, examples, max_tokens, on_batch).measured()


@torch.no_grad()
def evaluate_rows(
    model: Any, examples: Sequence[Example], max_tokens: int, on_batch: Callable[[], None] = lambda: None
) -> RowLosses:
    """The loss of each row by the model as it is, in evaluation mode.

    `on_batch` is called before each flat batch.  Where memory is refused, batches of half the tokens are tried.

    Raises:
        RunError: if no token is supervised, or a loss isn't finite.
    """
    was_training = model.training
    model.eval()
    try:
        while True:
            try:
                return _losses(model, examples, max_tokens, on_batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or max_tokens <= max(len(example.ids) for example in examples):
                    raise
            max_tokens //= 2
            log.warning(f"evaluation: memory was refused: going on with flat batches of {max_tokens:,} tokens")
    finally:
        model.train(was_training)


def _batches(model: Any, examples: Sequence[Example], max_tokens: int) -> Iterator[tuple[int, FlatBatch]]:
    """Flat batches, and the row from which theirs are counted: laid out some thousand rows at a time."""
    for first in range(0, len(examples), AT_ONCE):
        for batch in flat_batches(model, examples[first : first + AT_ONCE], max_tokens):
            yield first, batch


def _losses(model: Any, examples: Sequence[Example], max_tokens: int, on_batch: Callable[[], None]) -> RowLosses:
    tokens = [example.supervised for example in examples]
    if not sum(tokens):
        raise RunError(
            "evaluation", "no token of these rows is supervised", "look at them with `phinetune data preview`"
        )
    losses = [0.0] * len(examples)
    for first, batch in _batches(model, examples, max_tokens):
        on_batch()
        rows = [first + row for row in batch.rows]
        for row, loss in zip(rows, row_losses(model, batch.to(model.device)), strict=True):
            losses[row] = loss
        if bad := [row for row in rows if not math.isfinite(losses[row])]:
            named = ", ".join(examples[row].where for row in bad[:4])
            what = f"the held-out loss is {losses[bad[0]]} on rows {named}{' …' if len(bad) > 4 else ''}"
            raise RunError("evaluation", what, "look at these rows, or at the model's weights")
    return RowLosses(losses, tokens)
