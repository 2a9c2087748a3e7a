"""Numbers that are not finite, and losses that jump: found, named, and never saved."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phinetune.data import Example, FlatBatch
from phinetune.errors import RunError
from phinetune.evaluate import evaluate_rows
from phinetune.model import loss_sum
from phinetune.train.optimiser import trainable_parameters

REMEMBERED = 32  # steps by whose losses a jump is judged
FEWEST = 8
DEVIATIONS, TIMES = 6.0, 1.5  # a jump is beyond so many standard deviations, and so many times the mean
NAMED = 3


def is_jump(loss: float, before: Sequence[float]) -> bool:
    """Whether a step's loss stands out from those of the steps before."""
    if len(before) < FEWEST:
        return False
    mean = statistics.fmean(before)
    return loss > max(mean + DEVIATIONS * statistics.pstdev(before), mean * TIMES)


def worst_rows(model: Any, examples: Sequence[Example], max_tokens: int) -> str:
    """The rows of a step that the model finds hardest, each with its loss; none where the update has broken it."""
    try:
        rows = evaluate_rows(model, examples, max_tokens)
    except RunError as error:
        return f"that can't be told: {error.what}"
    losses = [loss / max(tokens, 1) for loss, tokens in zip(rows.losses, rows.tokens, strict=True)]
    hardest = sorted(zip(losses, (example.where for example in examples), strict=True), reverse=True)[:NAMED]
    return ", ".join(f"{where} ({loss:.3g})" for loss, where in hardest)


def name_fault(model: nn.Module, batches: Sequence[FlatBatch]) -> str:
    """Where a step's numbers stop being finite: weights, else an output, else gradients; in the model's own names.

    The forward pass is run again for it, in evaluation mode; nothing is changed.
    """
    if weights := _not_finite({**dict(model.named_parameters()), **dict(model.named_buffers())}):
        return f"the weights of {_some(weights)} are not finite"
    if output := _first_output(model, batches):
        return f"the output of {output} is not finite"
    gradients = {name: p.grad for name, p in trainable_parameters(model).items() if p.grad is not None}
    if names := _not_finite(gradients):
        return f"the gradient of {_some(names[::-1])} is not finite"  # the backward pass meets the last layer first
    return "with dropout off every number is finite"


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises RunError if something that is to be saved is not finite."""
    if names := _not_finite(tensors):
        what = f"{_some(names)} holds numbers that are not finite: nothing was saved"
        raise RunError(where, what, "go on with --resume from the checkpoint before, with a lower learning rate")


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [
        name
        for name, tensor in tensors.items()
        if tensor.dtype.is_floating_point and not math.isfinite(float(tensor.detach().sum()))
        if not bool(torch.isfinite(tensor).all())
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


@torch.no_grad()
def _first_output(model: nn.Module, batches: Sequence[FlatBatch]) -> str | None:
    """The first module, in the order of computation, whose output isn't finite."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        tensors = [output] if isinstance(output, Tensor) else output if isinstance(output, tuple) else []
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.dtype.is_floating_point and not torch.isfinite(tensor).all():
                found.append(name)

    hooks = [
        module.register_forward_hook(lambda module, given, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            loss = loss_sum(model, batch.to(model.device))  # type: ignore[arg-type]
            if found or not torch.isfinite(loss):
                return found[0] if found else "the loss head"
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return None
