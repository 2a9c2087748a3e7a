"""The training loop: the step is `training_step`, the run is `Loop.run`."""

import hashlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from phinetune.data import Example, Plan, supervised_tokens
from phinetune.errors import RunError, Stopped
from phinetune.evaluate import evaluate_loss
from phinetune.model import flat_batches, loss_sum
from phinetune.recipe import Recipe
from phinetune.train.checkpoint import Base, load_checkpoint, read_state, save_checkpoint
from phinetune.train.log import MetricsWriter, ProgressBar
from phinetune.train.optimiser import interval, trainable_parameters

log = logging.getLogger(__name__)


def training_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    *,
    learning_rate: float,
    max_grad_norm: float,
    max_batch_tokens: int,
    seed: tuple[int, ...],
) -> tuple[float, float]:
    """One update on some rows: (loss, gradient norm before clipping).

    The loss is the sum over supervised tokens divided by their number in the whole step, so the layout of the
    rows in flat batches doesn't change it.  Dropout is drawn from (seed, number of the batch).

    Raises:
        FloatingPointError: before the update, if the loss or a gradient isn't finite.
    """
    parameters = list(trainable_parameters(model).values())
    for parameter in parameters:
        if parameter.grad is None:  # kept for the whole run: made among activations they leave holes in the heap
            parameter.grad = torch.zeros_like(parameter)
    supervised = supervised_tokens(examples)
    loss = 0.0
    for number, batch in enumerate(flat_batches(model, examples, max_batch_tokens)):
        torch.manual_seed(derive_seed(*seed, number))
        batch_loss = loss_sum(model, batch.to(model.device)) / supervised
        batch_loss.backward()
        loss += batch_loss.item()

    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf).item()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise FloatingPointError(f"loss {loss}, gradient norm {grad_norm}")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_factor", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return loss, grad_norm


def derive_seed(*numbers: int) -> int:
    """A 64-bit seed from numbers, unrelated to that of other numbers: randomness needs no state to be saved."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@dataclass
class Counters:
    """What a run has done, kept in checkpoints; the `since_` fields belong to the next line of metrics.jsonl."""

    tokens: int = 0
    supervised_tokens: int = 0
    digest: str = ""  # of all tokens, in the order in which they were trained on
    since_loss: float = 0.0  # Σ loss · supervised tokens
    since_tokens: int = 0
    since_supervised: int = 0
    since_seconds: float = 0.0
    since_grad_norms: list[float] = field(default_factory=list)


@dataclass
class Loop:
    """A run: what it trains on, what it trains, and how far it is."""

    recipe: Recipe
    model: Any
    optimizer: torch.optim.Optimizer
    learning_rate_at: Callable[[int], float]
    steps: Plan  # rows of each step
    train: Sequence[Example]
    eval: Sequence[Example]
    folder: Path
    base: Base
    identity: dict[str, Any]  # what a checkpoint of this run must agree with
    step: int = 0
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        config, total = self.recipe.training_config, len(self.steps)
        epoch_ends = self.steps.epoch_ends
        eval_steps = config.eval_steps or config.logging_steps
        self._log_at = _due(config.logging_strategy, config.logging_steps, total, epoch_ends) | {total}
        self._eval_at = _due(config.eval_strategy, eval_steps, total, epoch_ends)
        self._save_at = _due(config.save_strategy, config.save_steps, total, epoch_ends)
        if config.logging_strategy == "no":
            self._log_at = set()
        elif config.logging_first_step:
            self._log_at.add(1)
        if config.save_strategy != "no":
            self._save_at.add(total)

    def resume(self, checkpoint: Path) -> None:
        """Puts adapter, optimiser and counters back as they were behind the checkpoint's step."""
        state = read_state(checkpoint)
        load_checkpoint(checkpoint, self.model, self.optimizer)
        self.step, self.counters = state["step"], Counters(**state["counters"])
        log.info(f"resuming behind step {self.step} from {checkpoint}")

    def run(self) -> None:
        """Trains from `self.step` to the end.

        Raises:
            RunError: if a loss or gradient isn't finite.
            Stopped: on SIGINT or SIGTERM, behind a checkpoint.
        """
        config = self.recipe.training_config
        self.model.train()
        bar = ProgressBar("training", len(self.steps), not config.disable_tqdm, self.step)
        with _signals() as caught, bar, MetricsWriter(self.folder, config, self.step) as metrics:
            if config.eval_on_start and self.step == 0:
                self._evaluate(metrics)
            while self.step < len(self.steps):
                rows = self.steps[self.step]
                examples = [self.train[row] for row in rows]
                learning_rate = self.learning_rate_at(self.step)
                begin = time.perf_counter()
                try:
                    loss, grad_norm = training_step(
                        self.model,
                        self.optimizer,
                        examples,
                        learning_rate=learning_rate,
                        max_grad_norm=config.max_grad_norm,
                        max_batch_tokens=self.recipe.data.max_batch_tokens,
                        seed=(config.seed, self.step),
                    )
                except FloatingPointError as error:
                    where = ", ".join(self.train[row].where for row in rows[:4])
                    raise RunError(
                        f"step {self.step + 1}",
                        f"{error} on rows {where}{' …' if len(rows) > 4 else ''}: nothing was updated",
                        "lower the learning rate, or look at these rows",
                    ) from None
                self.step += 1
                seconds = time.perf_counter() - begin
                tokens = self._count(examples, loss, grad_norm, seconds)
                bar.advance(note=f"loss {loss:.4f}, {tokens / seconds:,.0f} tokens/s")

                if self.step in self._log_at:
                    metrics.write(self._log_line(learning_rate))
                if self.step in self._eval_at:
                    self._evaluate(metrics)
                stopped_by = caught[0] if caught else None
                if self.step in self._save_at or stopped_by:
                    self._save()
                if stopped_by:
                    what = f"stopped by {signal.Signals(stopped_by).name} behind checkpoint-{self.step}"
                    raise Stopped(f"step {self.step}", what, "go on with --resume", stopped_by)

    def write_last_evaluation(self, measured: dict[str, float]) -> None:
        """The evaluation behind the last step, unless the loop has taken one there."""
        if len(self.steps) not in self._eval_at:
            with MetricsWriter(self.folder, self.recipe.training_config, self.step) as metrics:
                metrics.write({"step": self.step, **measured})

    def _count(self, examples: Sequence[Example], loss: float, grad_norm: float, seconds: float) -> int:
        tokens, supervised = sum(len(e.ids) for e in examples), supervised_tokens(examples)
        counters = self.counters
        counters.tokens += tokens
        counters.supervised_tokens += supervised
        counters.since_tokens += tokens
        counters.since_supervised += supervised
        counters.since_seconds += seconds
        counters.since_loss += loss * supervised
        counters.since_grad_norms.append(grad_norm)
        ids = np.concatenate([np.asarray(example.ids, dtype=np.int64) for example in examples])
        counters.digest = hashlib.sha256(counters.digest.encode() + ids.tobytes()).hexdigest()
        return tokens

    def _log_line(self, learning_rate: float) -> dict[str, Any]:
        """The loss is the mean over the supervised tokens since the last line."""
        counters = self.counters
        line = {
            "step": self.step,
            "loss": counters.since_loss / counters.since_supervised,
            "learning_rate": learning_rate,
            "grad_norm": sum(counters.since_grad_norms) / len(counters.since_grad_norms),
            "tokens": counters.tokens,
            "supervised_tokens": counters.supervised_tokens,
            "tokens_per_second": counters.since_tokens / counters.since_seconds,
        }
        self.counters = Counters(counters.tokens, counters.supervised_tokens, counters.digest)
        log.info(
            f"step {self.step}/{len(self.steps)}  loss {line['loss']:.4f}  lr {learning_rate:.2e}  "
            f"grad norm {line['grad_norm']:.3f}  {line['tokens_per_second']:.0f} tokens/s"
        )
        return line

    def _evaluate(self, metrics: MetricsWriter) -> None:
        if self.eval:
            measured = evaluate_loss(self.model, self.eval, self.recipe.data.max_batch_tokens)
            log.info(f"step {self.step}  eval_loss {measured['eval_loss']:.4f}")
            metrics.write({"step": self.step, **measured})

    def _save(self) -> None:
        path = save_checkpoint(
            self.folder,
            self.step,
            self.model,
            self.optimizer,
            {"counters": asdict(self.counters), "identity": self.identity},
            self.base,
            self.recipe.training_config.save_total_limit,
        )
        log.info(f"wrote {path}")


def _due(strategy: str, every: float, total: int, epoch_ends: set[int]) -> set[int]:
    """The steps at which a strategy asks for something."""
    if strategy == "steps":
        each = interval(every, total)
        return set(range(each, total + 1, each))
    return set(epoch_ends) if strategy == "epoch" else set()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Notes SIGINT and SIGTERM in place of dying of them; a second one ends the process as usual."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        for stopping, handler in before.items():
            signal.signal(stopping, handler)
        log.info(f"{signal.Signals(number).name}: finishing this step and writing a checkpoint")

    before: dict[signal.Signals, Any] = {}
    try:
        for stopping in (signal.SIGINT, signal.SIGTERM):
            before[stopping] = signal.signal(stopping, note)
    except ValueError:  # not the main thread: signals are somebody else's
        pass
    try:
        yield caught
    finally:
        for stopping, handler in before.items():
            signal.signal(stopping, handler)
