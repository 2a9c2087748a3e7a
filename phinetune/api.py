"""phinetune from Python: one call, with paths or objects."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phinetune.recipe import DataSource, make_recipe
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
            objects: a list, a `datasets.Dataset`, or any iterable. The first row is called `row:1`.
        eval: held-out rows in the same forms, or a share of `train`.
        data: further settings of the recipe's data section, such as `{"max_length": 1024}`.
        training_config: a dictionary with the names of TrainingArguments, or such an object.
        peft_config: a dictionary with the names of LoraConfig, or such an object.
        resume, overwrite, rehearsal: as `--resume`, `--overwrite` and `--no-rehearsal` of `phinetune train`.
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


def _path_or_rows(source: Any) -> tuple[Any, Iterable[Any] | None]:
    """(what the recipe says, the rows themselves if they came as objects, read as they are needed)"""
    if isinstance(source, str | Path):
        return str(source), None
    if isinstance(source, Mapping):
        return dict(source), None
    rows = iter(source)
    first = next(rows, None)
    if isinstance(first, str | Path) or (isinstance(first, Mapping) and set(first) <= set(DataSource.model_fields)):
        items = [first, *rows]
        return [str(item) if isinstance(item, Path) else item for item in items], None
    count = f"{len(source):,} rows" if hasattr(source, "__len__") else "rows"
    return f"{count} from Python", itertools.chain([] if first is None else [first], rows)
