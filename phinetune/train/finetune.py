"""A whole fine-tune: load, adapt, batches, optimiser, resume, loop, evaluate."""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from phinetune.adapter import save_adapter
from phinetune.data import Prepared, plan_run, prepare, supervised_tokens, write_ledgers
from phinetune.errors import CheckpointError, RecipeError
from phinetune.evaluate import Comparison, compare
from phinetune.lora import lora_layers
from phinetune.model import adapt_model, load_model, load_tokenizer, pick_device, resolve_dtype, takes_flat_batches
from phinetune.recipe import Recipe, dump_recipe
from phinetune.train.checkpoint import Base, load_checkpoint, newest_whole_checkpoint, read_state
from phinetune.train.estimate import expected_gb, expected_seconds
from phinetune.train.log import ProgressBar, run_log
from phinetune.train.loop import Counters, Loop
from phinetune.train.memory import MemoryPeak
from phinetune.train.optimiser import learning_rates, make_optimizer

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
        ),
        *("log_level", "disable_tqdm", "report_to", "run_name", "eval_strategy", "eval_steps", "eval_on_start"),
        *("save_strategy", "save_steps", "save_total_limit", "per_device_eval_batch_size"),
    },
    "data": {"train", "eval", "max_rejected"},
    "model_kwargs": {"token", "cache_dir"},
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
    train_rows: Sequence[Any] | None = None,
    eval_rows: Sequence[Any] | None = None,
    resume: bool | str | Path = False,
    overwrite: bool = False,
    words: Sequence[str] = (),
) -> Result:
    """Fine-tunes as a recipe says and writes the output folder.

    Args:
        recipe: what to do.
        train_rows, eval_rows: chats that take the place of `recipe.data.train` and `recipe.data.eval`.
        resume: True for the newest whole checkpoint of the output folder, or a checkpoint.
        overwrite: empties an output folder that isn't empty.
        words: said at the beginning, such as what names were mapped.

    Raises:
        PhinetuneError: its kinds say what; bad input is found before the model is loaded.
    """
    config = recipe.training_config
    folder = Path(config.output_dir)
    _check_folder(folder, bool(resume), overwrite or config.overwrite_output_dir)
    tokenizer = load_tokenizer(recipe.model, recipe.model_kwargs, recipe.tokenizer_kwargs)
    seed = config.seed if config.data_seed is None else config.data_seed
    data = prepare(
        recipe.data,
        tokenizer,
        seed,
        None if train_rows is None else list(train_rows),
        None if eval_rows is None else list(eval_rows),
    )
    steps = plan_run([len(example.ids) for example in data.train], seed, config, recipe.data.max_length)
    learning_rate_at = learning_rates(config, len(steps))

    device = pick_device(config.use_cpu)
    recipe.model_kwargs.dtype = str(resolve_dtype(recipe.model_kwargs.dtype, device)).removeprefix("torch.")

    with MemoryPeak() as memory, _output(folder, recipe, data, tokenizer, resume):
        for word in words:
            log.warning(word)
        began = time.perf_counter()
        model = load_model(recipe.model, recipe.model_kwargs, device)
        adapt_model(model, recipe.peft_config, config.seed)
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        optimizer = make_optimizer(model, config)
        base = Base(recipe.model, recipe.model_kwargs.revision, recipe.peft_config)
        identity = _identity(recipe, data)
        loop = Loop(*(recipe, model, optimizer, learning_rate_at, steps, data.train, data.eval, folder, base, identity))
        if resume:
            _resume(loop, resume)
        _announce(loop, data)
        model.train()
        loop.run()

        save_adapter(model, folder, recipe.peft_config, base.model, base.revision)
        comparison = _compare(recipe, model, tokenizer, data, folder) if data.eval else None
        summary = {
            "model": recipe.model,
            "rows": len(data.train),
            "steps": len(steps),
            "seconds": round(time.perf_counter() - began, 1),
            "peak_gb": round(memory.gb, 3),
            **(comparison.summary() if comparison else {}),
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        log.info(
            "done: %d steps in %.0f s, peak memory %.2f GB, %s", *(len(steps), summary["seconds"], memory.gb, folder)
        )
    return Result(folder, summary, comparison)


def _check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    if folder.is_file():
        raise RecipeError(f"output_dir {folder}", "is a file", "give a folder")
    if resume or not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise RecipeError(f"output_dir {folder}", "is not empty", "use --resume, --overwrite or another output_dir")


def _output(folder: Path, recipe: Recipe, data: Prepared, tokenizer: Any, resume: bool | str | Path) -> Any:
    """Opens the output folder: what is known before training is written first. Returns the log's context."""
    if not resume and folder.exists():
        shutil.rmtree(folder)  # empty, or to be overwritten
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    write_ledgers(folder, data.ledgers)
    tokenizer.save_pretrained(folder)
    return run_log(folder, recipe.training_config.log_level)


def _identity(recipe: Recipe, data: Prepared) -> dict[str, Any]:
    """Everything an update depends on: a checkpoint is resumed only by a run that agrees with it."""
    settings = {
        f"{section}.{name}" if isinstance(value, BaseModel) else section: item
        for section, value in recipe
        for name, item in (value if isinstance(value, BaseModel) else [("", value)])
        if name not in FREE_TO_CHANGE.get(section, ()) and section != "evaluation"
    }
    return {**settings, "data": data.fingerprint, "rows": len(data.train)}


def _resume(loop: Loop, resume: bool | str | Path) -> None:
    checkpoint = newest_whole_checkpoint(loop.folder) if resume is True else Path(str(resume))
    if checkpoint is None:
        log.info("no checkpoint in %s yet: starting from the beginning", loop.folder)
        return
    if not checkpoint.is_dir():
        raise CheckpointError(str(checkpoint), "no such checkpoint", "give a checkpoint-N folder, or --resume alone")
    state = read_state(checkpoint)
    then, now = state["identity"], json.loads(json.dumps(loop.identity))
    changed = [name for name in now if then.get(name) != now[name]]
    if changed:
        listed = ", ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in changed[:5])
        raise CheckpointError(
            str(checkpoint), f"belongs to another run ({listed})", "resume with its own recipe and data"
        )
    load_checkpoint(checkpoint, loop.model, loop.optimizer)
    loop.step, loop.counters = state["step"], Counters(**state["counters"])
    log.info("resuming behind step %d from %s", loop.step, checkpoint)


def _announce(loop: Loop, data: Prepared) -> None:
    """Rows, supervised tokens, steps, expected time and memory, before the first step."""
    model, steps_left = loop.model, loop.steps[loop.step :]
    for name, ledger in data.ledgers.items():
        log.info(
            "%s: %s rows of %s used, %s rejected; %s tokens, %s of them supervised",
            *(name, f"{ledger.used:,}", ledger.source, f"{len(ledger.rejected):,}"),
            *(f"{ledger.tokens:,}", f"{ledger.supervised:,}"),
        )
    for ledger in data.ledgers.values():
        for rejected in ledger.rejected[:5]:
            log.warning("left out %s: %s", rejected.where, rejected.reason)
    layers = list(lora_layers(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(
        "model: %s in %s, %s layers adapted, %s trainable parameters",
        *(loop.base.model, loop.recipe.model_kwargs.dtype, len(layers), f"{trained:,}"),
    )
    if not takes_flat_batches(model):
        log.info("%s models take the general path: a row at a time", model.config.model_type)
    tokens = sum(len(loop.train[row].ids) for rows in steps_left for row in rows)
    supervised = sum(supervised_tokens([loop.train[row] for row in rows]) for rows in steps_left)
    largest = max((sum(len(loop.train[row].ids) for row in rows) for rows in loop.steps), default=0)
    longest = max(len(example.ids) for example in loop.train)
    batch_tokens = max(longest, min(largest, loop.recipe.data.max_batch_tokens))
    log.info(
        "%s steps, %s tokens, %s of them supervised; expected: %.0f s, %.1f GB",
        *(f"{len(steps_left):,}", f"{tokens:,}", f"{supervised:,}"),
        *(expected_seconds(model, loop.train, tokens), expected_gb(model, batch_tokens)),
    )


def _compare(recipe: Recipe, model: Any, tokenizer: Any, data: Prepared, folder: Path) -> Comparison:
    """Base against tuned on the held-out rows; their answers go to answers.jsonl."""
    total = 2 * len(data.eval_rows) if recipe.evaluation.metrics else 0
    with ProgressBar("evaluating", total, bool(total) and not recipe.training_config.disable_tqdm) as bar:
        comparison = compare(
            model,
            tokenizer,
            data.eval,
            data.eval_rows,
            recipe.evaluation,
            recipe.data.max_batch_tokens,
            recipe.training_config.per_device_eval_batch_size,
            lambda who, done: bar.advance(done, what=f"evaluating {who}"),
        )
    for who, measured in (("base ", comparison.base), ("tuned", comparison.tuned)):
        log.info("%s  %s", who, "  ".join(f"{name} {value:.4f}" for name, value in measured.items()))
    if recipe.evaluation.metrics:
        with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in comparison.answers)
    return comparison
