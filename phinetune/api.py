"""phinetune from Python: fine-tune, load, merge and push, with paths or objects."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from phinetune.adapter import (
    check_repository,
    files_to_publish,
    is_adapter,
    load_tuned,
    merge_adapter,
    publish,
    recipe_of,
)
from phinetune.data import is_table
from phinetune.errors import RecipeError
from phinetune.evaluate import dequantised_is_better
from phinetune.files import named
from phinetune.model import load_model, load_tokenizer, pick_device, stop_ids
from phinetune.recipe import FROM_PYTHON, DataSource, ModelKwargs, make_model_kwargs, make_recipe
from phinetune.report import model_card
from phinetune.train import Result
from phinetune.train import train as train_recipe


def finetune(
    *,
    model: str,
    train: str | Path | Iterable[Any],
    eval: float | str | Path | Iterable[Any] | None = None,
    data: dict[str, Any] | None = None,
    training_config: Any = None,
    peft_config: Any = None,
    resume: bool | str | Path = False,
    overwrite: bool = False,
    rehearsal: bool = True,
    **sections: Any,
) -> Result:
    """Fine-tunes a model on chats.

    Args:
        model: Hub id, local folder, .gguf file, or "smollm2".
        train: a path (file, folder, pattern, Hub id), a mapping with `path` and more, a list of these, or rows as
            objects: a list, a `datasets.Dataset`, a frame of pandas' or polars', or any iterable. The first row is
            called `row:1`.
        eval: held-out rows in the same forms, or a share of `train`.
        data: further settings of the recipe's data section, such as `{"max_length": 1024}`.
        training_config: a dictionary with the names of TrainingArguments, or such an object.
        peft_config: a dictionary with the names of LoraConfig, or such an object.
        resume: goes on from the newest whole checkpoint of the output folder, or from the one that is named.
        overwrite: empties an output folder that holds an earlier run.
        rehearsal: tries everything once, with the longest rows, before the first step.
        **sections: `model_kwargs`, `tokenizer_kwargs`, `evaluation`.

    Returns:
        The output folder, its summary, and the held-out answers where metrics were asked for.

    Raises:
        phinetune.errors.PhinetuneError: what it says; `InputError` for what was given.
    """
    train_source, train_rows = _path_or_rows(train)
    eval_source, eval_rows = (eval, None) if isinstance(eval, float | int | None) else _path_or_rows(eval)
    given = {
        "model": str(model),
        "data": {**(data or {}), "train": train_source, **({} if eval is None else {"eval": eval_source})},
        "training_config": training_config,
        "peft_config": peft_config,
        **sections,
    }
    recipe, words = make_recipe(given, where="finetune()", by="Python")
    return train_recipe(
        recipe,
        train_rows=train_rows,
        eval_rows=eval_rows,
        resume=resume,
        overwrite=overwrite,
        rehearsal=rehearsal,
        words=words,
    )


def load(source: str | Path, *, allow_template_mismatch: bool = False, **model_kwargs: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a base model or of a run, for transformers' own `generate` and `pipeline`.

    The model is in evaluation mode, and its generation config stops where the template's turns end.

    Args:
        source: a run's output folder, a checkpoint or another adapter folder; or a model, as in `finetune`.
        allow_template_mismatch: even with another chat template than the adapter was tuned with.
        **model_kwargs: as in a recipe; by default those that the run was tuned with.

    Raises:
        phinetune.errors.InputError: if it can't be had.
    """
    if is_adapter(source := Path(source).expanduser() if str(source).startswith("~") else source):
        recipe = recipe_of(Path(source))
        kwargs = make_model_kwargs(model_kwargs, recipe.model_kwargs if recipe else ModelKwargs())
        model, tokenizer = load_tuned(source, kwargs, allow_template_mismatch=allow_template_mismatch)
    else:
        kwargs = make_model_kwargs(model_kwargs, ModelKwargs())
        tokenizer = load_tokenizer(str(source), kwargs)
        model = load_model(str(source), kwargs, pick_device(use_cpu=False))
    stops = stop_ids(model, tokenizer)
    model.generation_config.update(eos_token_id=stops, pad_token_id=stops[0], use_cache=True)
    return model, tokenizer


_NONE = object()
MERGED_DTYPES = ("auto", "bfloat16", "float16", "float32")
ONTO = ("auto", "base", "dequantised")


def merge(
    run: str | Path,
    output: str | Path | None = None,
    *,
    dtype: str = "auto",
    onto: str = "auto",
    data: str | None = None,
    allow_template_mismatch: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Folds an adapter into its base: a folder that plain transformers loads. Returns that folder.

    Args:
        run: a run's output folder, a checkpoint, or another adapter folder.
        output: a new folder; `RUN-merged` by default.
        dtype: what is rounded to, once: auto (that of the base's files), bfloat16, float16 or float32.
        onto: of a run with `load_in_4bit`: base (as it was), dequantised (as 4 bits leave it), or auto, the better one
            by the held-out loss.
        data: held-out chats for that; the run's own by default.
        overwrite: replaces a merged model that is there.
        say: is told the losses, and what was written.

    Raises:
        phinetune.errors.PhinetuneError: what it says.
    """
    for option, value, known in (("onto", onto, ONTO), ("dtype", dtype, MERGED_DTYPES)):
        if value not in known:
            raise RecipeError(option, f"is {value!r}", f"give one of {', '.join(known)}")
    run = named(run)
    recipe = recipe_of(run)
    kwargs = recipe.model_kwargs if recipe else ModelKwargs()
    if onto == "dequantised" and not kwargs.load_in_4bit:
        raise RecipeError("onto dequantised", "this run's base was not in 4 bits", "leave it out")
    dequantised = onto == "dequantised"
    if onto == "auto" and recipe is not None and kwargs.load_in_4bit:
        dequantised = dequantised_is_better(run, recipe, data, allow_template_mismatch, say)
    folder = merge_adapter(
        run,
        output or run.with_name(f"{run.name}-merged"),
        kwargs,
        dtype,
        dequantised=dequantised,
        allow_template_mismatch=allow_template_mismatch,
        overwrite=overwrite,
    )
    say(f"wrote {folder}, onto the {'dequantised base' if dequantised else 'base'}")
    return folder


def push(
    run: str | Path,
    repository: str,
    *,
    merged: str | Path | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Puts a run's adapter, or its merged model, on the Hub with a model card. Returns its address.

    Args:
        run: a run's output folder.
        repository: owner/name.
        merged: the folder that `merge` wrote, to push in place of the adapter.
        private: makes a repository that only you see.
        token: access token; HF_TOKEN by default.

    Raises:
        phinetune.errors.PhinetuneError: without a token or the Hub, or if that refuses.
    """
    check_repository(repository)
    run, merged = Path(run).expanduser(), merged and Path(merged).expanduser()
    card = model_card(run, repository, merged=merged is not None)
    files = files_to_publish(Path(merged or run), merged=merged is not None)
    return publish(files, card, repository, private, token)


def _path_or_rows(source: Any) -> tuple[Any, Iterable[Any] | None]:
    """(what the recipe says, the rows themselves if they came as objects, read as they are needed)"""
    if isinstance(source, str | Path):
        return str(source), None
    if isinstance(source, Mapping):
        return dict(source), None
    if is_table(source):
        return f"{len(source):,} {FROM_PYTHON}", source
    rows = iter(source)
    first = next(rows, _NONE)
    is_source = isinstance(first, Mapping) and "path" in first and set(first) <= set(DataSource.model_fields)
    if isinstance(first, str | Path) or is_source:
        items = [first, *rows]
        return [str(item) if isinstance(item, Path) else item for item in items], None
    count = f"{len(source):,} " if hasattr(source, "__len__") else ""
    return f"{count}{FROM_PYTHON}", itertools.chain([] if first is _NONE else [first], rows)
