"""The held-out loss: every supervised token counts the same, whatever row it stands in."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from phinetune.data import Example
from phinetune.model import flat_batches, loss_sum


@torch.no_grad()
def evaluate_loss(model: Any, examples: Sequence[Example], max_tokens: int) -> dict[str, float]:
    """`eval_loss` (nats a supervised token) and `perplexity` of the model as it is, in evaluation mode."""
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for batch in flat_batches(model, examples, max_tokens):
        total += loss_sum(model, batch.to(model.device)).double().cpu()
        tokens += len(batch.targets)
    model.train(was_training)
    loss = float(total) / tokens
    return {"eval_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
