"""A whole fine-tune: load, adapt, batches, optimiser, resume, loop, evaluate."""

import datetime
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from phinetune.data import Plan, Prepared, Renderer, chat_fingerprint, prepare, writes_date
from phinetune.disk import check_room, replacing, write_text
from phinetune.errors import CheckpointError, InputError, RecipeError, Stopped
from phinetune.evaluate import Comparison, compare
from phinetune.kernels import native
from phinetune.kernels.allocator import keep_freed_memory
from phinetune.kernels.threads import settle_threads
from phinetune.lora import lora_layers
from phinetune.model import (
    adapt_model,
    full_name,
    has_position_table,
    is_on_hub,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    quantised_layers,
    resolve_dtype,
    revision_of,
    takes_flat_batches,
    version_of,
)
from phinetune.model.memory import (
    Batch,
    decoder_layers,
    layers_to_recompute,
    mapped_bytes,
    recompute,
    recomputed_layers,
)
from phinetune.recipe import Recipe, TrainingConfig
from phinetune.report import write_report
from phinetune.train.checkpoint import (
    Base,
    checkpoint_bytes,
    checkpoint_of,
    list_checkpoints,
    most_at_once,
    newest_whole_checkpoint,
    read_state,
)
from phinetune.train.estimate import expected_gb, expected_seconds, has_room_to_fold
from phinetune.train.folder import begun, claimed
from phinetune.train.log import MetricsWriter, ProgressBar, early_log
from phinetune.train.loop import Loop, progress_of
from phinetune.train.memory import memory_free, memory_in_use
from phinetune.train.optimiser import learning_rates, make_optimizer
from phinetune.train.rehearsal import rehearse
from phinetune.train.schedule import Schedule
from phinetune.train.signals import Interrupted, Signals, listening
from phinetune.train.trackers import check_trackers
from phinetune.train.usage import Usage

log = logging.getLogger(__name__)

# What may differ between a run and its resumption, since no update depends on it.
FREE_TO_CHANGE = {
    "training_config": {
        *(
            "output_dir",
            "overwrite_output_dir",
            "logging_strategy",
            "logging_steps",
            "logging_first_step",
            "logging_dir",
            "run_name",
            "project",
        ),
        *("log_level", "disable_tqdm", "report_to", "eval_strategy", "eval_steps", "eval_on_start"),
        *("save_strategy", "save_steps", "save_total_limit", "per_device_eval_batch_size"),
        *("load_best_model_at_end", "early_stopping_patience", "early_stopping_threshold"),
        *("gradient_checkpointing", "gradient_checkpointing_layers", "max_memory_gb"),
    },
    "data": {"train", "eval", "max_rejected", "num_proc", "duplicates", "held_out_in_train", "max_batch_tokens"},
    "model_kwargs": {"token", "cache_dir", "revision"},  # whose commit is compared
}


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
        overwrite: empties an output folder that isn't empty.
        rehearsal: tries everything once, with the longest rows, before the first step.
        words: said at the beginning, such as what names were mapped.

    Raises:
        PhinetuneError: its kinds say what; bad input is found before the model is loaded.
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
        checkpoint = _checkpoint_to_resume(folder, resume)
        if checkpoint is not None:
            progress_of(checkpoint, config)
        recipe = _with_revision(recipe, checkpoint)
        tokenizer = load_tokenizer(recipe.model, recipe.model_kwargs, recipe.tokenizer_kwargs)
        recipe = _with_today(recipe, tokenizer, checkpoint)
        data = prepare(recipe.data, tokenizer, config.seed_of_rows, train_rows, eval_rows)
        check_trackers(recipe)
        loop = make_loop(recipe, tokenizer, data, signals, checkpoint, usage=usage)
        _check_room(loop)
        signals.check()
        goes_on = checkpoint is not None
        with begun(folder, loop.recipe, data, tokenizer, fresh=not resume, goes_on=goes_on) as when:
            for word in words:
                log.warning(word)
            if checkpoint is not None:
                loop.resume(checkpoint)
            expected = expected_gb(loop.model, loop.largest_batch)  # what a rehearsal leaves would count twice
            if rehearsal:
                rehearse(loop, tokenizer, data, checkpoint)
            _announce(loop, data, threads, expected)
            is_evaluated = loop.best.evaluated_behind == loop.step
            with MetricsWriter(loop.recipe, folder, when, loop.step, is_evaluated) as metrics:
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
    checkpoint: Path | None = None,
    layers: int | None = None,
    usage: Usage | None = None,
) -> Loop:
    """Everything that a run trains with: steps, the model loaded and adapted, the optimiser.

    Args:
        checkpoint: that will be resumed, if the run agrees with it.
        layers: only so many decoder layers, for a measurement.
        usage: which counts since the run began.

    Raises:
        PhinetuneError: what the recipe asks for can't be had, or `checkpoint` is another run's.
    """
    config = recipe.training_config
    steps = Plan(data.train.lengths, config.seed_of_rows, config, recipe.data.max_length, data.weights)
    schedule, learning_rate_at = Schedule.of(config, steps), learning_rates(config, len(steps))
    _check_evaluations(config, data, schedule, len(steps))
    device = pick_device(config.use_cpu)
    recipe = _with_dtype(recipe, device, checkpoint)
    identity = _identity(recipe, data)
    if checkpoint is not None:
        _check_identity(checkpoint, identity)

    model = load_model(recipe.model, recipe.model_kwargs, device, layers)
    adapt_model(model, recipe.peft_config, config.seed)
    batch = largest_batch(data, recipe.data.max_batch_tokens)
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
    keep_freed_memory()
    threads = settle_threads()
    native.prepare(device)
    with torch.random.fork_rng(range(torch.cuda.device_count()) if device.type == "cuda" else ()):
        try:
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
        what = f"stopped by {interrupted} in the evaluation behind the last step, with everything trained"
        raise Stopped(f"step {loop.step}", what, "go on with --resume", interrupted.number) from None


def _check_evaluations(config: TrainingConfig, data: Prepared, schedule: Schedule, steps: int) -> None:
    """Raises RecipeError if evaluations are to decide something, and there are none."""
    asked = {
        "load_best_model_at_end": config.load_best_model_at_end,
        "metric_for_best_model": config.metric_for_best_model is not None,
        "early_stopping_patience": config.early_stopping_patience is not None,
    }
    names = [name for name, is_asked in asked.items() if is_asked]
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
    check_room(loop.folder, max(together - there, 1 if together else 0) * size + size // 4)


def _identity(recipe: Recipe, data: Prepared) -> dict[str, Any]:
    """Everything an update depends on: a checkpoint is resumed only by a run that agrees with it."""
    settings: dict[str, Any] = {"model": recipe.model, "tokenizer_kwargs": recipe.tokenizer_kwargs}
    settings["version of the model"] = version_of(recipe.model, recipe.model_kwargs)
    for section in ("model_kwargs", "data", "training_config", "peft_config"):
        for name, value in getattr(recipe, section):
            if name not in FREE_TO_CHANGE.get(section, ()):
                settings[f"{section}.{name}"] = value
    return {**settings, "rows": len(data.train), "tokens of the rows": data.fingerprint}


def _with_dtype(recipe: Recipe, device: torch.device, checkpoint: Path | None) -> Recipe:
    """The recipe with `dtype: auto` resolved: as the checkpoint has it, else by what this machine is faster in."""
    dtype = recipe.model_kwargs.dtype
    if dtype == "float16":
        what = "is not for training: gradients in it need loss scaling, which there is none of"
        raise RecipeError("model_kwargs.dtype=float16", what, "use bfloat16 or float32")
    if dtype == "auto" and checkpoint is not None:
        dtype = read_state(checkpoint).get("identity", {}).get("model_kwargs.dtype", dtype)
    if recipe.model_kwargs.dtype != "auto":
        model_type = load_config(recipe.model, recipe.model_kwargs).model_type
        resolve_dtype(dtype, device, model_type)  # which says where it is slow here
        return recipe
    return recipe.derived("model_kwargs", "dtype", resolve_dtype(dtype, device), "this machine, for auto")


def _with_today(recipe: Recipe, tokenizer: Any, checkpoint: Path | None) -> Recipe:
    """The recipe with the day that a template which writes the date is told: that on which the run began."""
    if recipe.data.today is not None or not writes_date(tokenizer):
        return recipe
    begun = read_state(checkpoint).get("identity", {}).get("data.today") if checkpoint else None
    today = begun or datetime.date.today().isoformat()
    return recipe.derived("data", "today", today, "the day the run began")


def _with_revision(recipe: Recipe, checkpoint: Path | None) -> Recipe:
    """The recipe with the version of a Hub's model that a checkpoint was made with, where it names none: a branch may
    have moved since."""
    if checkpoint is None or recipe.model_kwargs.revision is not None or not is_on_hub(recipe.model):
        return recipe
    commit = read_state(checkpoint).get("identity", {}).get("version of the model")
    return recipe.derived("model_kwargs", "revision", commit, "the checkpoint") if isinstance(commit, str) else recipe


def _checkpoint_to_resume(folder: Path, resume: bool | str | Path) -> Path | None:
    """The checkpoint that is asked for; None for a run from the beginning."""
    if not resume:
        return None
    if resume is not True:
        if not Path(resume).is_dir():
            raise CheckpointError(str(resume), "no such checkpoint", "give a checkpoint-N folder, or --resume alone")
        return Path(resume)
    checkpoint = newest_whole_checkpoint(folder)
    if checkpoint is None and (list_checkpoints(folder) or (folder / "summary.json").exists()):
        what = "no checkpoint in it is whole" if list_checkpoints(folder) else "a finished run without checkpoints"
        raise CheckpointError(str(folder), f"can't be resumed: {what}", "start again with --overwrite")
    if checkpoint is None:
        log.warning(f"no checkpoint in {folder} yet: starting from the beginning")
    return checkpoint


def _check_identity(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Raises CheckpointError if the checkpoint was written by a run that would make other updates."""
    then, now = read_state(checkpoint).get("identity", {}), json.loads(json.dumps(identity))
    changed = [f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in now if then.get(name) != now[name]]
    if changed:
        what = f"belongs to another run ({'; '.join(changed[:5])})"
        raise CheckpointError(str(checkpoint), what, "resume with its own recipe and data")


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


def largest_batch(data: Prepared, max_batch_tokens: int) -> Batch:
    """As long as a run's flat batches can get, and the longest row in them."""
    longest = int(data.train.lengths.max())
    return Batch(max(longest, min(int(data.train.lengths.sum()), max_batch_tokens)), longest)


def _layers_to_recompute(model: Any, config: TrainingConfig, batch: Batch) -> int:
    """As the recipe says, or as few as its memory allows."""
    count = len(decoder_layers(model))
    if config.gradient_checkpointing and not count:
        log.warning(f"gradient_checkpointing is ignored: {model.config.model_type} models can't recompute their layers")
    if config.gradient_checkpointing:
        return count
    if config.gradient_checkpointing_layers != "auto":
        return min(count, config.gradient_checkpointing_layers)
    if config.max_memory_gb is not None:
        return layers_to_recompute(model, batch, config.max_memory_gb * 1e9 - memory_in_use(model.device))
    return layers_to_recompute(model, batch, memory_free(model.device) - mapped_bytes(model))


def _announce(loop: Loop, data: Prepared, threads: str, expected: float) -> None:
    """Rows, supervised tokens, steps, expected time and memory (10⁹ bytes), before the first step."""
    model, batch = loop.model, loop.largest_batch
    for name, ledger in data.ledgers.items():
        log.info(
            f"{name}: {ledger.used:,} rows of {ledger.source} used, {ledger.rejected:,} rejected; "
            f"{ledger.tokens:,} tokens, {ledger.supervised:,} of them supervised"
        )
        for rejected in ledger.first_rejected[:5]:
            log.warning(f"left out {rejected.where}: {rejected.reason}")
        for words, count in ledger.dropped.items():
            log.warning(f"left out {count:,} rows that {words}")
        for finding, (count, places) in ledger.findings.items():
            log.warning(f"{count:,} rows {finding.words} ({places[0]}{' …' if count > 1 else ''})")
    layers = len(list(lora_layers(model)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = loop.recipe.model_kwargs.dtype
    log.info(f"model: {loop.base.model} in {dtype}, {layers} layers adapted, {trained:,} trainable parameters")
    if model.device.type == "cpu":
        kernels = native.kernels_for(model.dtype)
        log.info(f"device: cpu, {threads}{'; C++ kernels: ' + ', '.join(kernels) if kernels else ''}")
    if (quantised := quantised_layers(model)).names:
        names, plain = quantised.names, quantised.plain
        log.info(
            f"{' and '.join(quantised.kinds)}: {len(names)} of {len(names) + len(plain)} linear layers, "
            f"{quantised.nbytes / 1e9:.2f} GB" + (f"; in {dtype} stay {', '.join(plain)}" if plain else "")
        )
    if loop.recipe.training_config.save_total_limit == 1:
        log.info("save_total_limit=1: the two newest checkpoints are kept, so that a damaged one has one behind it")
    if not takes_flat_batches(model):
        log.info(f"{model.config.model_type} models take the general path: a row at a time")

    left = loop.steps.rows_from(loop.step)
    tokens = int(data.train.lengths[left].sum())
    supervised = int(data.train.supervised[left].sum())
    limit = loop.recipe.training_config.max_memory_gb
    log.info(
        f"{len(loop.steps) - loop.step:,} steps, {tokens:,} tokens, {supervised:,} of them supervised; expected: "
        f"{expected_seconds(model, tokens, supervised):.0f} s, {expected:.1f} GB"
    )
    if recomputed := recomputed_layers(model):
        log.info(f"{recomputed} of {len(decoder_layers(model))} layers are recomputed in the backward pass")
    if limit is not None and expected > limit:
        log.warning(f"max_memory_gb={limit:g} is less than a batch of {batch.tokens:,} tokens takes: lower max_length")


def _write_report(folder: Path) -> None:
    """The report is made of what is written; that it can't be is no fault of the run's."""
    try:
        write_report(folder)
    except InputError as error:
        log.warning(f"there is no report.html: {error}")


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
