"""The training loop: the step is `training_step`, the run is `Loop.run`."""

import hashlib
import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phinetune.adapter import save_adapter
from phinetune.data import Example, Plan, supervised_tokens
from phinetune.errors import CheckpointError, RunError, Stopped
from phinetune.evaluate import evaluate_loss
from phinetune.kernels.allocator import is_out_of_memory
from phinetune.layers.fast import settled
from phinetune.machine.garbage import garbage_set_aside
from phinetune.model import flat_batches, loss_sum, takes_flat_batches
from phinetune.model.memory import Batch
from phinetune.recipe import Recipe
from phinetune.train.best import Best
from phinetune.train.checkpoint import Base, checkpoint_of, load_checkpoint, prove, save_checkpoint
from phinetune.train.log import MetricsWriter, ProgressBar
from phinetune.train.numbers import REMEMBERED, is_jump, name_fault, worst_rows
from phinetune.train.optimiser import trainable_parameters
from phinetune.train.progress import Counters, Progress
from phinetune.train.schedule import Schedule
from phinetune.train.signals import Interrupted, Signals
from phinetune.train.usage import Usage

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
        ValueError: if no token of the rows is supervised.
        FloatingPointError: before the update, if the loss or a gradient isn't finite.
        OutOfMemory: before the update, if memory was refused; gradients are zero.
    """
    parameters = list(trainable_parameters(model).values())
    supervised = supervised_tokens(examples)
    if not supervised:
        raise ValueError("no token of the step's rows is supervised")
    loss = 0.0
    try:
        for parameter in parameters:
            if parameter.grad is None:  # kept for the whole run: made among activations they leave holes in the heap
                parameter.grad = torch.zeros_like(parameter)
        with settled(model):
            for number, batch in enumerate(flat_batches(model, examples, max_batch_tokens)):
                _draw_from(derive_seed(*seed, number), model.device)
                batch_loss = loss_sum(model, batch.to(model.device)) / supervised
                batch_loss.backward()
                loss += batch_loss.item()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        optimizer.zero_grad(set_to_none=False)
        raise OutOfMemory(" ".join(str(error).split())) from None

    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    grad_norm = norm.item()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise FloatingPointError(f"loss {loss}, gradient norm {grad_norm}")
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm or math.inf, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_factor", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return loss, grad_norm


class OutOfMemory(MemoryError):
    """A step's forward or backward pass was refused memory."""


def derive_seed(*numbers: int) -> int:
    """A 64-bit seed from numbers, unrelated to that of other numbers: randomness needs no state to be saved."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _draw_from(seed: int, device: torch.device) -> None:
    """What the device draws next, of it and no other's: `torch.manual_seed` seeds them all."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@dataclass
class Loop:
    """A run: what it trains on, what it trains, and how far it is."""

    recipe: Recipe
    model: Any
    optimizer: torch.optim.Optimizer
    learning_rate_at: Callable[[int], float]
    steps: Plan  # rows of each step
    schedule: Schedule
    train: Sequence[Example]
    eval: Sequence[Example]
    held_out: str  # a digest of `eval`
    folder: Path
    base: Base
    identity: dict[str, Any]  # what a checkpoint of this run must agree with
    largest_batch: Batch
    signals: Signals = field(default_factory=Signals)
    usage: Usage = field(default_factory=Usage)
    step: int = 0
    counters: Counters = field(default_factory=Counters)
    best: Best = field(init=False)

    def __post_init__(self) -> None:
        self.best = Best.of(self.recipe.training_config)
        self.max_batch_tokens = self.recipe.data.max_batch_tokens  # fewer, once memory was refused
        self.memory_was_refused = False

    def resume(self, progress: Progress) -> None:
        """Puts adapter, optimiser and counters back as they were behind the checkpoint's step."""
        self.step, self.counters, self.best = progress.step, progress.counters, progress.best
        self.usage.go_on_from(progress.usage)
        self.memory_was_refused = progress.memory_was_refused
        if progress.memory_was_refused:
            self.max_batch_tokens = min(self.max_batch_tokens, progress.max_batch_tokens)
        if self.max_batch_tokens != progress.max_batch_tokens:
            now, before = f"{self.max_batch_tokens:,} tokens", f"{progress.max_batch_tokens:,} before"
            words = "the same updates but for rounding, and for what dropout draws"
            log.warning(f"flat batches of {now}, {before}: {words}")
        if progress.held_out != self.held_out:
            if self.best.step is not None and self.best.decides:
                log.warning("other rows are held out than before: what evaluated best is looked for anew")
            self.best = Best.of(self.recipe.training_config)
        load_checkpoint(progress.checkpoint, self.model, self.optimizer)
        log.info(f"resuming behind step {self.step} from {progress.checkpoint}")

    def run(self, metrics: MetricsWriter) -> None:
        """Trains from `self.step` to the end, or until evaluations have stopped improving.

        Raises:
            RunError: if a loss or gradient isn't finite, a row doesn't fit into memory, or a checkpoint on the disk.
            Stopped: on SIGINT or SIGTERM, behind a checkpoint.
        """
        config = self.recipe.training_config
        self.model.train()
        bar = ProgressBar("training", len(self.steps), not config.disable_tqdm, self.step)
        with self.signals.deferred(), bar, garbage_set_aside():
            self._evaluate_if_due(metrics)  # on start, or what a signal left undone
            while self.step < len(self.steps) and not self.best.is_exhausted:
                examples = [self.train[row] for row in self.steps[self.step]]
                learning_rate = self.learning_rate_at(self.step)
                begin = time.perf_counter()
                loss, grad_norm = self.update(examples, learning_rate)
                self.step += 1
                seconds = time.perf_counter() - begin
                self._flag_jump(examples, loss)
                tokens = self._count(examples, loss, grad_norm, seconds)
                bar.advance(note=f"loss {loss:.4f}, {tokens / seconds:,.0f} tokens/s")

                if self.step in self.schedule.log:
                    metrics.write(self._log_line(learning_rate))
                try:
                    self._evaluate_if_due(metrics)
                except Interrupted:  # taken again behind the checkpoint
                    pass
                ended_early = self.best.is_exhausted and config.save_strategy != "no"
                is_due = self.step in self.schedule.save or self.best.is_wanted(self.step) or ended_early
                if is_due or self.signals.caught:
                    self.save()
                if self.signals.caught and not self.is_over:
                    name = signal.Signals(self.signals.caught).name
                    what = f"stopped by {name} behind checkpoint-{self.step}"
                    raise Stopped(f"step {self.step}", what, "go on with --resume", self.signals.caught)
        if self.best.is_exhausted:
            log.info(f"early stopping behind step {self.step}: {self.best.words}")

    @property
    def is_evaluated(self) -> bool:
        """Whether the evaluation behind the last step, where there is one, is done with."""
        return self.best.evaluated_behind == self.step

    @property
    def is_over(self) -> bool:
        return self.step == len(self.steps) or self.best.is_exhausted

    def update(self, examples: Sequence[Example], learning_rate: float) -> tuple[float, float]:
        """`training_step`, in smaller flat batches once memory is refused: the same rows, the same update."""
        config = self.recipe.training_config
        longest = max(len(example.ids) for example in examples)
        while True:
            try:
                return training_step(
                    self.model,
                    self.optimizer,
                    examples,
                    learning_rate=learning_rate,
                    max_grad_norm=config.max_grad_norm,
                    max_batch_tokens=self.max_batch_tokens,
                    seed=(config.seed, self.step),
                )
            except FloatingPointError as error:
                raise self._not_finite(examples, error) from None
            except OutOfMemory as error:
                refused = str(error)
            tokens = min(self.max_batch_tokens, sum(len(example.ids) for example in examples))
            if tokens <= longest or not takes_flat_batches(self.model):
                what = f"a row of {longest:,} tokens doesn't fit into memory ({refused})"
                mend = "lower data.max_length, set gradient_checkpointing: true, or choose a smaller model"
                raise RunError(f"step {self.step + 1}", what, mend)
            self.max_batch_tokens, self.memory_was_refused = tokens // 2, True
            log.warning(
                f"step {self.step + 1}: memory was refused for a flat batch of {tokens:,} tokens: going on with "
                f"{self.max_batch_tokens:,}, the same rows a step"
            )

    def _not_finite(self, examples: Sequence[Example], error: FloatingPointError) -> RunError:
        """Names the step, the rows and the module."""
        fault = name_fault(self.model, flat_batches(self.model, examples, self.max_batch_tokens))
        where = ", ".join(example.where for example in examples[:4]) + (" …" if len(examples) > 4 else "")
        what = f"{error} on rows {where}: {fault}; nothing was updated"
        return RunError(f"step {self.step + 1}", what, "lower the learning rate, or look at these rows")

    def _flag_jump(self, examples: Sequence[Example], loss: float) -> None:
        losses = self.counters.losses
        if is_jump(loss, losses):
            rows = worst_rows(self.model, examples, self.max_batch_tokens)
            log.warning(f"step {self.step}: the loss jumped to {loss:.3g}, most of all on rows {rows}")
        self.counters.losses = [*losses, loss][-REMEMBERED:]

    def write_last_evaluation(self, metrics: MetricsWriter, measured: dict[str, float]) -> None:
        """The evaluation behind the last step, unless the loop has taken one there."""
        if not self.is_evaluated:
            metrics.write({"step": self.step, **measured})

    def _count(self, examples: Sequence[Example], loss: float, grad_norm: float, seconds: float) -> int:
        tokens, supervised = sum(len(e.ids) for e in examples), supervised_tokens(examples)
        counters = self.counters
        counters.tokens += tokens
        counters.supervised_tokens += supervised
        counters.since_tokens += tokens
        counters.since_supervised += supervised
        counters.since_seconds += seconds
        counters.since_steps += 1
        counters.since_loss += loss * supervised
        counters.since_grad_norm += grad_norm
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
            "grad_norm": counters.since_grad_norm / counters.since_steps,
            "tokens": counters.tokens,
            "supervised_tokens": counters.supervised_tokens,
            "tokens_per_second": counters.since_tokens / counters.since_seconds,
        }
        self.counters = Counters(counters.tokens, counters.supervised_tokens, counters.digest, counters.losses)
        log.info(
            f"step {self.step}/{len(self.steps)}  loss {line['loss']:.4f}  lr {learning_rate:.2e}  "
            f"grad norm {line['grad_norm']:.3f}  {line['tokens_per_second']:.0f} tokens/s"
        )
        return line

    def _evaluate_if_due(self, metrics: MetricsWriter) -> None:
        """
        Raises:
            Interrupted: where a signal has come meanwhile; the evaluation still is to be taken.
        """
        on_start = self.recipe.training_config.eval_on_start and self.step == 0
        is_due = on_start or self.step in self.schedule.evaluate
        if not self.eval or not is_due or self.is_evaluated:
            return
        measured = evaluate_loss(self.model, self.eval, self.max_batch_tokens, self.signals.check)
        log.info(f"step {self.step}  eval_loss {measured['eval_loss']:.4f}")
        metrics.write({"step": self.step, **measured})
        self.best.see(self.step, measured)

    def save(self) -> None:
        """A checkpoint of what is now."""
        progress = Progress(
            checkpoint=checkpoint_of(self.folder, self.step),
            step=self.step,
            counters=self.counters,
            best=self.best,
            held_out=self.held_out,
            max_batch_tokens=self.max_batch_tokens,
            memory_was_refused=self.memory_was_refused,
            usage=self.usage.so_far(),
            identity=self.identity,
        )
        limit, best = self.recipe.training_config.save_total_limit, self.best.step if self.best.keeps else None
        state, optimizer = progress.state(), self.optimizer
        path = save_checkpoint(self.folder, self.step, self.model, optimizer, state, self.base, limit, best)
        log.info(f"wrote {path}")

    def save_adapter(self) -> None:
        """The adapter as it is now, at the root of the run's folder."""
        base = self.base
        save_adapter(self.model, self.folder, base.model, base.revision, chat_format=base.chat_format)

    def load_best(self) -> bool:
        """Puts the adapter back that evaluated best, where `load_best_model_at_end` asks for it; whether it has put one
        in the place of the last step's."""
        config, step = self.recipe.training_config, self.best.step
        if not config.load_best_model_at_end or step in (None, self.step):
            return False
        try:
            prove(checkpoint_of(self.folder, step))
            load_checkpoint(checkpoint_of(self.folder, step), self.model)
        except CheckpointError as error:
            log.warning(f"load_best_model_at_end: {error}; the last adapter is kept")
            return False
        log.info(f"the adapter of step {step} is kept: {self.best.words}")
        return True
