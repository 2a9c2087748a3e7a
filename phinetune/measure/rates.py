"""How fast this machine multiplies matrices, and what share of that training reaches."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phinetune.data import Example
from phinetune.kernels.native import is_emulated
from phinetune.kernels.products import product
from phinetune.model import flat_batches
from phinetune.train.loop import training_step

PROBED_LAYERS = 6  # of how many layers the products are timed: enough that no weight stays in a cache
SIDES = (512, 2048)  # of the matrices by which dtypes are compared
LONGEST = 0.5  # seconds a product of them may take; else the smaller ones tell
REPEATS = 5


class Products:
    """torch's forward product x Wᵀ and dX = dY W of a model's linears and head, at a number of tokens; in float32 where
    the processor multiplies no others.

    Each weight stands for all of its shape, so the mean is weighted by FLOP.
    """

    def __init__(self, model: Any, tokens: int) -> None:
        linears: dict[tuple[int, ...], list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not parameter.requires_grad and "embed" not in name and "lm_head" not in name:
                linears.setdefault(tuple(parameter.shape), []).append(parameter.detach())
        head = model.get_output_embeddings().weight.detach()
        shapes = [*linears.values(), [head]]
        self.weights = sum(weight.numel() for same in shapes for weight in same)
        self.flop = 4 * tokens * self.weights
        dtype = torch.float32 if head.device.type == "cpu" and is_emulated(head.dtype) else head.dtype
        some = [(same[:: max(1, len(same) // PROBED_LAYERS)], len(same)) for same in shapes]
        self.timed = [([weight.to(dtype) for weight in probed], count) for probed, count in some]
        sizes = {n for same in shapes for n in same[0].shape}
        self.inputs = {n: torch.randn(tokens, n, dtype=dtype, device=head.device) for n in sizes}

    def rate(self) -> float:
        """FLOP a second."""
        total = 0.0
        with torch.no_grad():
            for some, count in self.timed:
                begin = time.perf_counter()
                for weight in some:
                    F.linear(self.inputs[weight.shape[1]], weight)
                    torch.mm(self.inputs[weight.shape[0]], weight)
                _finish(weight.device)
                total += (time.perf_counter() - begin) * count / len(some)
        return float(self.flop / total)


class Share(NamedTuple):
    """Of training steps in turns with the model's own products."""

    tokens: int
    """As they were computed: a beginning that rows share counts once."""
    seconds: float
    rate: float
    """FLOP a second of the products."""
    rates: list[float]
    achieved: float
    """4 FLOP a weight and token, a second of training."""

    @property
    def of_rate(self) -> float:
        return self.achieved / self.rate


def share_reached(
    model: Any,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[Sequence[Example]],
    max_batch_tokens: int,
    learning_rate: float,
) -> Share:
    """Training steps on the rows, each between two measurements of the products; the first is run once beforehand."""
    probe = Products(model, max_batch_tokens)

    def step(examples: Sequence[Example], number: int) -> float:
        begin = time.perf_counter()
        training_step(
            model,
            optimizer,
            examples,
            learning_rate=learning_rate,
            max_grad_norm=1.0,
            max_batch_tokens=max_batch_tokens,
            seed=(0, number),
        )
        return time.perf_counter() - begin

    step(steps[0], 0)
    probe.rate()
    seconds, tokens, rates = 0.0, 0, []
    for number, examples in enumerate(steps):
        rates.append(probe.rate())
        seconds += step(examples, number)
        rates.append(probe.rate())
        tokens += sum(batch.ids.numel() for batch in flat_batches(model, examples, max_batch_tokens))
    rate = len(rates) / sum(1 / rate for rate in rates)  # of seconds, not of rates
    return Share(tokens, seconds, rate, rates, 4 * probe.weights * tokens / seconds)


def rates_by_dtype(device: torch.device) -> dict[str, float]:
    """(FL)OP a second of square matrix products in each dtype that training uses, the median of a few."""
    return {
        "float32": _rate(product, torch.float32, device),
        "bfloat16": _rate(product, torch.bfloat16, device),
        "int8": _rate(torch._int_mm, torch.int8, device),
    }


def _rate(multiply: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> float:
    """By the larger matrices, unless the smaller ones tell that those would take too long."""
    rate = math.inf
    for side in SIDES:
        if 2 * side**3 > rate * LONGEST:
            break
        x = torch.randint(-128, 128, (side, side), device=device).to(dtype)
        rate = 2 * side**3 / statistics.median(_seconds(functools.partial(multiply, x, x.T), device))
    return rate


def _seconds(function: Callable[[], object], device: torch.device) -> list[float]:
    taken = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        function()
        _finish(device)
        taken.append(time.perf_counter() - begin)
    return taken[1:]  # the first makes kernels


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
