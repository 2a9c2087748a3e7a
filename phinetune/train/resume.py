"""Going on from a checkpoint: which one, what it settles of the recipe, whether this run is its run."""

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import torch

from phinetune.data import Prepared, writes_date
from phinetune.errors import CheckpointError, RecipeError
from phinetune.model import is_on_hub, load_config, resolve_dtype, version_of
from phinetune.recipe import Recipe, TrainingConfig
from phinetune.train.checkpoint import list_checkpoints, newest_whole_checkpoint, prove
from phinetune.train.progress import Progress

log = logging.getLogger(__name__)

# What may differ between a run and its resumption, since no update depends on it.
FREE_TO_CHANGE = {
    "training_config": {
        "output_dir", "overwrite_output_dir", "logging_strategy", "logging_steps", "logging_first_step", "logging_dir",
        "run_name", "project", "log_level", "disable_tqdm", "report_to", "eval_strategy", "eval_steps", "eval_on_start",
        "save_strategy", "save_steps", "save_total_limit", "per_device_eval_batch_size", "load_best_model_at_end",
        "early_stopping_patience", "early_stopping_threshold", "gradient_checkpointing",
        "gradient_checkpointing_layers", "max_memory_gb",
    },
    "data": {"train", "eval", "max_rejected", "num_proc", "duplicates", "held_out_in_train", "max_batch_tokens"},
    "model_kwargs": {"token", "cache_dir", "revision"},  # whose commit is compared
}  # fmt: skip
VERSION = "version of the model"


def progress_to_resume(folder: Path, resume: bool | str | Path, config: TrainingConfig) -> Progress | None:
    """What a run goes on from: its newest whole checkpoint, or the one that is named; None from the beginning.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    if not resume:
        return None
    if resume is not True:
        if not Path(resume).is_dir():
            raise CheckpointError(str(resume), "no such checkpoint", "give a checkpoint-N folder, or --resume alone")
        prove(Path(resume))
        return Progress.of(Path(resume), config)
    checkpoint = newest_whole_checkpoint(folder)
    if checkpoint is not None:
        return Progress.of(checkpoint, config)
    if list_checkpoints(folder) or (folder / "summary.json").exists():
        what = "no checkpoint in it is whole" if list_checkpoints(folder) else "a finished run without checkpoints"
        raise CheckpointError(str(folder), f"can't be resumed: {what}", "start again with --overwrite")
    log.warning(f"no checkpoint in {folder} yet: starting from the beginning")
    return None


def with_revision(recipe: Recipe, progress: Progress | None) -> Recipe:
    """The recipe with the version of a Hub's model that a checkpoint was made with, where it names none: a branch may
    have moved since."""
    if progress is None or recipe.model_kwargs.revision is not None or not is_on_hub(recipe.model):
        return recipe
    commit = progress.identity.get(VERSION)
    return recipe.derived("model_kwargs", "revision", commit, "the checkpoint") if isinstance(commit, str) else recipe


def with_today(recipe: Recipe, tokenizer: Any, progress: Progress | None) -> Recipe:
    """The recipe with the day that a template which writes the date is told: that on which the run began."""
    if recipe.data.today is not None or not writes_date(tokenizer):
        return recipe
    begun = progress.identity.get("data.today") if progress else None
    today = begun or datetime.date.today().isoformat()
    return recipe.derived("data", "today", today, "the day the run began")


def with_dtype(recipe: Recipe, device: torch.device, progress: Progress | None) -> Recipe:
    """The recipe with `dtype: auto` resolved: as the checkpoint has it, else by what this machine is faster in."""
    dtype = recipe.model_kwargs.dtype
    for name in ("dtype", "bnb_4bit_compute_dtype"):
        if getattr(recipe.model_kwargs, name) == "float16":
            what = "is not for training: gradients in it need loss scaling, which there is none of"
            raise RecipeError(f"model_kwargs.{name}=float16", what, "use bfloat16 or float32")
    if dtype != "auto":
        model_type = load_config(recipe.model, recipe.model_kwargs).model_type
        resolve_dtype(dtype, device, model_type)  # which says where it is slow here
        return recipe
    if progress is not None:
        dtype = progress.identity.get("model_kwargs.dtype", dtype)
    return recipe.derived("model_kwargs", "dtype", resolve_dtype(dtype, device), "this machine, for auto")


def identity_of(recipe: Recipe, data: Prepared) -> dict[str, Any]:
    """All that an update depends on, as JSON reads it back."""
    settings: dict[str, Any] = {"model": recipe.model, "tokenizer_kwargs": recipe.tokenizer_kwargs}
    settings[VERSION] = version_of(recipe.model, recipe.model_kwargs)
    for section in ("model_kwargs", "data", "training_config", "peft_config"):
        for name, value in getattr(recipe, section):
            if name not in FREE_TO_CHANGE.get(section, ()):
                settings[f"{section}.{name}"] = value
    settings |= {"rows": len(data.train), "tokens of the rows": data.fingerprint}
    found: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return found


def check_identity(progress: Progress, now: dict[str, Any]) -> None:
    """Raises CheckpointError if the checkpoint is of a run that would make other updates."""
    then = progress.identity
    # A model is known by what it is, where that is known: its folder may have moved.
    is_known = now[VERSION] not in (None, "main") and then.get(VERSION) == now[VERSION]
    compared = [name for name in now if not (is_known and name == "model")]
    changed = [f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in compared if then.get(name) != now[name]]
    if changed:
        what = f"belongs to another run ({'; '.join(changed[:5])})"
        raise CheckpointError(str(progress.checkpoint), what, "resume with its own recipe and data")
