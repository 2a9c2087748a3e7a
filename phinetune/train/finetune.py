"""A whole fine-tune: load, adapt, batches, optimiser, resume, loop, evaluate."""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from phinetune.data import Plan, Prepared, Renderer, chat_fingerprint, prepare
from phinetune.errors import RecipeError, Stopped
from phinetune.evaluate import Comparison, check_metrics, compare
from phinetune.kernels import native
from phinetune.kernels.allocator import keep_freed_memory
from phinetune.kernels.threads import settle_threads
from phinetune.machine.disk import check_room, replacing, write_text
from phinetune.machine.memory import memory_free, memory_in_use
from phinetune.model import (
    adapt_model,
    full_name,
    has_position_table,
    load_model,
    load_tokenizer,
    pick_device,
    revision_of,
)
from phinetune.model.memory import Batch, decoder_layers, layers_to_recompute, mapped_bytes, recompute
from phinetune.recipe import Recipe, TrainingConfig
from phinetune.report import write_report
from phinetune.train.announce import announce
from phinetune.train.checkpoint import (
    Base,
    adapter_bytes,
    checkpoint_bytes,
    checkpoint_of,
    list_checkpoints,
    most_at_once,
)
from phinetune.train.estimate import expected_gb, has_room_to_fold
from phinetune.train.folder import begun, claimed, give_up_later
from phinetune.train.log import MetricsWriter, ProgressBar, early_log
from phinetune.train.loop import Loop
from phinetune.train.optimiser import learning_rates, make_optimizer
from phinetune.train.progress import Progress
from phinetune.train.rehearsal import rehearse
from phinetune.train.resume import (
    check_identity,
    identity_of,
    progress_to_resume,
    with_dtype,
    with_revision,
    with_today,
)
from phinetune.train.schedule import Schedule
from phinetune.train.signals import Interrupted, Signals, listening
from phinetune.train.trackers import check_trackers
from phinetune.train.usage import Usage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """Where the run was written, its `summary.json`, and the held-out answers where any were asked for."""

    folder: Path
    summary: dict[str, Any]
    comparison: Comparison | None


def train(
    recipe: Recipe,
    *,
    train_rows: Iterable[Any] | None = None,
    eval_rows: Iterable[Any] | None = None,
    resume: bool | str | Path = False,
    overwrite: bool = False,
    rehearsal: bool = True,
    words: Sequence[str] = (),
) -> Result:
    """Fine-tunes as a recipe says and writes the output folder.

    Args:
        recipe: what to do.
        train_rows, eval_rows: rows as objects that take the place of `recipe.data.train` and `recipe.data.eval`.
        resume: True for the newest whole checkpoint of the output folder, or a checkpoint.
        overwrite: empties an output folder that holds an earlier run.
        rehearsal: tries everything once, with the longest rows, before the first step.
        words: said at the beginning, such as what names were mapped.

    Raises:
        PhinetuneError: its kinds say what; bad input is found before the first step, most before the model is loaded.
    """
    config, folder = recipe.training_config, Path(recipe.training_config.output_dir)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        what = f"asks for {os.environ['WORLD_SIZE']} processes, and a run is one"
        raise RecipeError("WORLD_SIZE", what, "start it without torchrun")
    device, given_up = pick_device(config.use_cpu), overwrite or config.overwrite_output_dir
    usage = Usage(device)
    with (
        claimed(folder, bool(resume), given_up),
        early_log(),
        listening() as signals,
        _settled(device) as threads,
        usage,
    ):
        progress = progress_to_resume(folder, resume, config)
        recipe = with_revision(recipe, progress)
        tokenizer = load_tokenizer(recipe.model, recipe.model_kwargs, recipe.tokenizer_kwargs)
        recipe = with_today(recipe, tokenizer, progress)
        data = prepare(recipe.data, tokenizer, config.seed_of_rows, train_rows, eval_rows)
        check_trackers(recipe)
        check_metrics(recipe.evaluation.metrics)
        loop = make_loop(recipe, tokenizer, data, signals, progress, usage=usage)
        _check_room(loop)
        signals.check()
        with begun(folder, loop.recipe, data, tokenizer, fresh=not resume, goes_on=progress is not None) as when:
            for word in words:
                log.warning(word)
            if progress is not None:
                loop.resume(progress)
            expected = _expected_gb(loop, data)  # what a rehearsal leaves would count twice
            if rehearsal:
                rehearse(loop, tokenizer, data, progress)
            announce(loop, data, threads, expected)
            give_up_later(folder, loop.step, loop.is_over)
            with MetricsWriter(loop.recipe, folder, when, loop.step, loop.is_evaluated, signals) as metrics:
                loop.run(metrics)

                with signals.deferred():
                    is_of_last_step = not loop.load_best()
                    loop.save_adapter()
                with _ending_at_once(loop, is_of_last_step):
                    comparison = _compare(loop, tokenizer, data) if data.eval else None
                if comparison is not None and is_of_last_step:
                    with signals.deferred():
                        loop.write_last_evaluation(metrics, comparison.tuned)
            with signals.deferred():
                summary = {
                    "model": recipe.model,
                    "rows": data.ledgers["train"].used,
                    "steps": loop.step,
                    **usage.so_far(),
                    **(comparison.summary() if comparison else {}),
                }
                write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
                _write_report(folder)
                seconds, gb = summary["seconds"], summary["peak_gb"]
                log.info(f"done: {loop.step} steps in {seconds:.0f} s, peak {gb:.2f} GB, {folder}")
    return Result(folder, summary, comparison)


def make_loop(
    recipe: Recipe,
    tokenizer: Any,
    data: Prepared,
    signals: Signals,
    progress: Progress | None = None,
    layers: int | None = None,
    usage: Usage | None = None,
) -> Loop:
    """Everything that a run trains with: steps, the model loaded and adapted, the optimiser.

    Args:
        progress: that it will go on from, if the run agrees with it.
        layers: only so many decoder layers, for a measurement.
        usage: which counts since the run began.

    Raises:
        PhinetuneError: what the recipe asks for can't be had, or `progress` is another run's.
    """
    config = recipe.training_config
    steps = Plan(data.train.lengths, config.seed_of_rows, config, recipe.data.max_length, data.weights)
    schedule, learning_rate_at = Schedule.of(config, steps), learning_rates(config, len(steps))
    _check_evaluations(recipe, data, schedule, len(steps))
    device = pick_device(config.use_cpu)
    recipe = with_dtype(recipe, device, progress)
    identity = identity_of(recipe, data)
    if progress is not None:
        check_identity(progress, identity)

    model = load_model(recipe.model, recipe.model_kwargs, device, layers)
    adapt_model(model, recipe.peft_config, config.seed)
    batch = largest_batch(data.train.lengths, steps.most_tokens, recipe.data.max_batch_tokens)
    _check_tokens(recipe, model, tokenizer, batch)
    recompute(model, _layers_to_recompute(model, config, batch))
    return Loop(
        recipe=recipe,
        model=model,
        optimizer=make_optimizer(model, config, recipe.peft_config),
        learning_rate_at=learning_rate_at,
        steps=steps,
        schedule=schedule,
        train=data.train,
        eval=data.eval,
        held_out=data.held_out_fingerprint,
        folder=Path(config.output_dir),
        base=Base(full_name(recipe.model), revision_of(recipe.model, recipe.model_kwargs), chat_fingerprint(tokenizer)),
        identity=identity,
        signals=signals,
        usage=usage or Usage(device),
        largest_batch=batch,
    )


@contextmanager
def _settled(device: torch.device) -> Iterator[str]:
    """Allocator, threads and kernels as training wants them, and random numbers apart from the caller's; says which
    threads compute."""
    before = torch.get_num_threads()
    draws_on_gpus = device.type == "cuda" or torch.cuda.is_initialized()
    keep_freed_memory()
    try:
        threads = settle_threads()
        native.prepare(device)
        with torch.random.fork_rng(range(torch.cuda.device_count()) if draws_on_gpus else ()):
            yield threads
    finally:
        torch.set_num_threads(before)


@contextmanager
def _ending_at_once(loop: Loop, is_of_last_step: bool) -> Iterator[None]:
    """A signal in this block, behind the last step, ends it, with a checkpoint from which it is done again: that of the
    last step, or of the best one, whose adapter is in the model then."""
    try:
        loop.signals.check()
        yield
    except Interrupted as interrupted:
        if is_of_last_step and not checkpoint_of(loop.folder, loop.step).is_dir():
            loop.save()
        what = f"stopped by {interrupted} behind the last step, with everything trained"
        raise Stopped(f"step {loop.step}", what, "go on with --resume", interrupted.number) from None


def _check_evaluations(recipe: Recipe, data: Prepared, schedule: Schedule, steps: int) -> None:
    """Warns where evaluations are asked for, and nothing is held out.

    Raises:
        RecipeError: if evaluations are to decide something, and there are none.
    """
    config = recipe.training_config
    asked = {
        "load_best_model_at_end": config.load_best_model_at_end,
        "metric_for_best_model": config.metric_for_best_model is not None,
        "early_stopping_patience": config.early_stopping_patience is not None,
    }
    names = [name for name, is_asked in asked.items() if is_asked]
    ignored = {
        "evaluation.metrics": recipe.evaluation.metrics,
        "training_config.eval_strategy": config.eval_strategy != "no",
        "training_config.eval_on_start": config.eval_on_start,
    }
    if not names and not len(data.eval) and any(ignored.values()):
        which = " and ".join(name for name, is_asked in ignored.items() if is_asked)
        log.warning(f"no rows are held out, so {which} do nothing: set data.eval")
    if names and (config.eval_strategy == "no" or not len(data.eval)):
        lacking = "held-out rows" if not len(data.eval) else "evaluations on the way"
        mend = "set data.eval" if not len(data.eval) else "set training_config.eval_strategy: steps or epoch"
        raise RecipeError(f"training_config.{names[0]}", f"needs {lacking}, and there are none", mend)
    if names and not schedule.evaluate:
        what = f"needs evaluations on the way, and none falls into {steps} steps"
        raise RecipeError(f"training_config.{names[0]}", what, "evaluate more often: eval_strategy=steps, eval_steps")


def _check_room(loop: Loop) -> None:
    """Raises RunError unless the disk has room for every checkpoint that will be there at once, and the adapter."""
    size, saves = checkpoint_bytes(loop.model), loop.schedule.saves_behind(loop.step, loop.best)
    together = most_at_once(saves, loop.recipe.training_config.save_total_limit, loop.best.keeps)
    there = len(list_checkpoints(loop.folder))
    check_room(loop.folder, max(together - there, 1 if together else 0) * size + adapter_bytes(loop.model))


def _check_tokens(recipe: Recipe, model: Any, tokenizer: Any, batch: Batch) -> None:
    """Warns of rows that are longer than the model was made for.

    Raises:
        RecipeError: if it can't be given them, or has no embeddings for tokens that `tokenizer_kwargs` added.
    """
    words = model.get_input_embeddings().num_embeddings
    if recipe.tokenizer_kwargs and len(tokenizer) > words:
        what = f"makes {len(tokenizer):,} tokens, and {recipe.model} has embeddings for {words:,}"
        raise RecipeError("tokenizer_kwargs", what, "name tokens that the model has")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or batch.longest <= positions:
        return
    what = f"{recipe.model} was made for {positions:,} positions, and the longest row has {batch.longest:,} tokens"
    if has_position_table(model):
        raise RecipeError("data.max_length", what, f"set data.max_length={positions}")
    log.warning(f"{what}: it answers badly where it never was; data.max_length={positions} leaves such rows out")


def largest_batch(lengths: Any, together: int, max_batch_tokens: int) -> Batch:
    """As long as flat batches of rows can get, and the longest row in them.

    Args:
        lengths: tokens of each row.
        together: tokens of the most rows that are laid out at once.
    """
    longest = int(lengths.max())
    return Batch(max(longest, min(together, max_batch_tokens)), longest)


def _expected_gb(loop: Loop, data: Prepared) -> float:
    """Of steps, evaluations and answers; held-out rows are about as long with the answers that they get."""
    if not len(data.eval):
        return expected_gb(loop.model, loop.largest_batch)
    lengths, recipe = data.eval.lengths, loop.recipe
    evaluated = largest_batch(lengths, int(lengths.sum()), loop.max_batch_tokens)
    size = min(recipe.training_config.per_device_eval_batch_size, len(lengths)) if recipe.evaluation.metrics else 0
    return expected_gb(loop.model, loop.largest_batch, evaluated, size * evaluated.longest)


def _layers_to_recompute(model: Any, config: TrainingConfig, batch: Batch) -> int:
    """As the recipe says, or as few as its memory allows."""
    count = len(decoder_layers(model))
    asked = config.gradient_checkpointing or config.gradient_checkpointing_layers not in ("auto", 0)
    if asked and not count:
        log.warning(f"gradient_checkpointing is ignored: {model.config.model_type} models can't recompute their layers")
    if config.gradient_checkpointing:
        return count
    if config.gradient_checkpointing_layers != "auto":
        return min(count, config.gradient_checkpointing_layers)
    if config.max_memory_gb is not None:
        return layers_to_recompute(model, batch, config.max_memory_gb * 1e9 - memory_in_use(model.device))
    return layers_to_recompute(model, batch, memory_free(model.device) - mapped_bytes(model))


def _write_report(folder: Path) -> None:
    """The report is made of what is written; that it can't be is no fault of the run's."""
    try:
        write_report(folder)
    except Exception as error:  # of a library that draws, say
        log.warning(f"there is no report.html: {' '.join(str(error).split()) or type(error).__name__}")


def _compare(loop: Loop, tokenizer: Any, data: Prepared) -> Comparison:
    """Base against tuned on the held-out rows; their answers go to answers.jsonl."""
    recipe, folder = loop.recipe, loop.folder
    total = 2 * len(data.eval_rows) if recipe.evaluation.metrics else 0
    with ProgressBar("evaluating", total, bool(total) and not recipe.training_config.disable_tqdm) as bar:
        comparison = compare(
            loop.model,
            tokenizer,
            Renderer.of(tokenizer, recipe.data),
            data.eval,
            data.eval_rows,
            recipe.evaluation,
            loop.max_batch_tokens,
            recipe.training_config.per_device_eval_batch_size,
            lambda who, done: bar.advance(done, what=f"evaluating {who}"),
            fold=has_room_to_fold(loop.model),
            seed=recipe.training_config.seed,
        )
    for who, measured in (("base ", comparison.base), ("tuned", comparison.tuned)):
        log.info(f"{who}  " + "  ".join(f"{name} {value:.4f}" for name, value in measured.items()))
    if recipe.evaluation.metrics:
        with replacing(folder / "answers.jsonl") as work, work.open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in comparison.answers)
    return comparison
