"""The held-out loss: every supervised token counts the same, whatever row it stands in."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from phinetune.data import Example
from phinetune.errors import RunError
from phinetune.kernels.allocator import is_out_of_memory
from phinetune.model import flat_batches, loss_sum

log = logging.getLogger(__name__)


@torch.no_grad()
def evaluate_loss(
    model: Any, examples: Sequence[Example], max_tokens: int, on_batch: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """`eval_loss` (nats a supervised token) and `perplexity` of the model as it is, in evaluation mode.

    `on_batch` is called before each flat batch.  Where memory is refused, batches of half the tokens are tried.

    Raises:
        RunError: if no token is supervised, or a loss isn't finite.
    """
    was_training = model.training
    model.eval()
    try:
        while True:
            try:
                loss = _mean_loss(model, examples, max_tokens, on_batch)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or max_tokens <= max(len(example.ids) for example in examples):
                    raise
            max_tokens //= 2
            log.warning(f"evaluation: memory was refused: going on with flat batches of {max_tokens:,} tokens")
    finally:
        model.train(was_training)
    return {"eval_loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _mean_loss(model: Any, examples: Sequence[Example], max_tokens: int, on_batch: Callable[[], None]) -> float:
    total, tokens = 0.0, sum(example.supervised for example in examples)
    if not tokens:
        raise RunError(
            "evaluation", "no token of these rows is supervised", "look at them with `phinetune data preview`"
        )
    for batch in flat_batches(model, examples, max_tokens):
        on_batch()
        loss = float(loss_sum(model, batch.to(model.device)))
        if not math.isfinite(loss):
            bad = [example.where for example in examples if not math.isfinite(_alone(model, example))]
            what = f"the held-out loss is {loss} on rows {', '.join(bad[:4]) or 'that are finite alone'}"
            raise RunError("evaluation", what, "look at these rows, or at the model's weights")
        total += loss
    return total / tokens


def _alone(model: Any, example: Example) -> float:
    return float(sum(loss_sum(model, batch.to(model.device)) for batch in flat_batches(model, [example], 1)))
