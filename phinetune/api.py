"""phinetune from Python: one call, with paths or objects."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from phinetune.recipe import make_recipe
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
    **sections: Any,
) -> Result:
    """Fine-tunes a model on chats.

    Args:
        model: Hub id, local folder, .gguf file, or "smollm2".
        train: a path, a list of paths, a list of rows (`{"messages": [...]}`), or a `datasets.Dataset`.
        eval: held-out rows in the same forms, or a share of `train`.
        data: further settings of the recipe's data section, such as `{"max_length": 1024}`.
        training_config: a dictionary with the names of TrainingArguments, or such an object.
        peft_config: a dictionary with the names of LoraConfig, or such an object.
        resume, overwrite: as `--resume` and `--overwrite` of `phinetune train`.
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
    recipe, words = make_recipe(given, where="finetune()")
    return train_recipe(
        recipe, train_rows=train_rows, eval_rows=eval_rows, resume=resume, overwrite=overwrite, words=words
    )


def _path_or_rows(source: Any) -> tuple[Any, list[Any] | None]:
    """(what the recipe says, the rows themselves if they came as objects)"""
    if isinstance(source, str | Path):
        return str(source), None
    items = list(source)
    if items and all(isinstance(item, str | Path) for item in items):
        return [str(item) for item in items], None
    return f"{len(items)} rows from Python", items
