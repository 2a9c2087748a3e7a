"""What a finished run has held out, and what its adapter is worth on another base."""

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from phinetune.adapter import load_tuned, run_folders
from phinetune.data import prepare
from phinetune.errors import DataError
from phinetune.evaluate.loss import evaluate_loss
from phinetune.kernels.allocator import is_out_of_memory
from phinetune.recipe import FROM_PYTHON, DataConfig, ModelKwargs, Recipe
from phinetune.untrusted import Untrusted, read_json

log = logging.getLogger(__name__)


def held_out(run: Path, recipe: Recipe | None, tokenizer: Any, data: str | None = None) -> tuple[Any, Any]:
    """(examples, rows) of some data, or those that a run has held out.

    Raises:
        DataError: if it has held out none, or a share of data that isn't what it was. A file of its own is measured as
            it is now.
    """
    if data is not None:
        # Every row of the file is measured, the longest too, rendered as the run's own were.
        like = recipe.data if recipe else DataConfig(train=data)
        asked = like.model_copy(update={"train": data, "eval": None, "max_length": 1 << 20, "duplicates": "keep"})
        prepared = prepare(asked, tokenizer, seed=0)
        return prepared.train, prepared.train_rows
    check_held_out(run, recipe, data)
    assert recipe is not None
    is_share = isinstance(recipe.data.eval, float | int)
    mend = "give held-out rows with --data chats.jsonl"
    source = recipe.data.train if is_share else recipe.data.eval
    if gone := [path for path in _paths(source) if path == "-" or path.endswith(FROM_PYTHON)]:
        what = f"its rows ({gone[0]}) can't be read again, so what was held out is not known"
        raise DataError(str(run), what, mend)
    if not is_share:  # files of their own
        prepared = prepare(recipe.data.model_copy(update={"train": source, "eval": None}), tokenizer, seed=0)
        if prepared.fingerprint != _noted(run, "held_out_fingerprint"):
            paths = ", ".join(_paths(source))
            log.warning(f"{paths} has changed since {run}: other rows are measured than it held out")
        return prepared.train, prepared.train_rows
    prepared = prepare(recipe.data, tokenizer, recipe.training_config.seed_of_rows)
    if prepared.fingerprint != _noted(run, "fingerprint"):
        what = "the data has changed since the run, so what was held out then is not known"
        raise DataError(str(run), what, mend)
    return prepared.eval, prepared.eval_rows


def _noted(run: Path, fingerprint: str) -> str | None:
    """What a run's ledger says of the rows that it was trained on, or held out."""
    for folder in run_folders(run):
        with suppress(FileNotFoundError, Untrusted):
            found = read_json(folder / "ledger.json")
            return found.get(fingerprint) if isinstance(found, dict) else None
    return None


def check_held_out(
    run: Path, recipe: Recipe | None, data: str | None, mend: str = "give some with --data chats.jsonl"
) -> None:
    """Raises DataError, before anything is loaded, if neither the run nor `data` has rows to measure."""
    if data is None and (recipe is None or recipe.data.eval in (None, 0)):
        raise DataError(str(run), "this run has no held-out rows", mend)


def _paths(source: Any) -> list[str]:
    """What is named as data."""
    items = source if isinstance(source, list) else [source]
    return [item if isinstance(item, str) else getattr(item, "path", "") for item in items]


def dequantised_is_better(
    run: Path, recipe: Recipe, data: str | None, allow_template_mismatch: bool, say: Callable[[str], None]
) -> bool:
    """Whether a 4-bit run's adapter does better on the base as 4 bits leave it than on the base as it was, by the loss
    of held-out rows, which is said for both: it has learnt to mend what 4 bits do, as far as it has."""
    mend = "give some with --data chats.jsonl, or choose by --onto base or --onto dequantised"
    check_held_out(run, recipe, data, mend)
    losses = {}
    for name, in_4bit in (("the base as it was", False), ("the base as 4 bits leave it", True)):
        kwargs = recipe.model_kwargs.model_copy(update={"load_in_4bit": in_4bit})

        def loss(device: torch.device | None, kwargs: ModelKwargs = kwargs) -> float:
            model, tokenizer = load_tuned(run, kwargs, None, allow_template_mismatch, device)
            examples, _ = held_out(run, recipe, tokenizer, data)
            return evaluate_loss(model, examples, recipe.data.max_batch_tokens)["eval_loss"]

        try:
            losses[in_4bit] = loss(None)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            losses[in_4bit] = loss(torch.device("cpu"))  # a GPU that holds 4 bits may not hold 16
        say(f"held-out loss on {name + ':':30} {losses[in_4bit]:.4f}")
    return losses[True] <= losses[False]
