"""`phinetune evaluate`"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from phinetune.errors import DataError, RecipeError
from phinetune.recipe import ANSWER_METRICS, DataConfig, EvaluationConfig, ModelKwargs, Recipe, load_recipe


def run_evaluate(
    run: Path,
    data: str | None,
    max_new_tokens: int,
    answers: bool,
    metrics: Sequence[str],
    allow_mismatch: bool,
    as_json: bool,
) -> None:
    from phinetune.adapter import load_tuned
    from phinetune.cli.quiet import quiet_libraries
    from phinetune.data import Renderer
    from phinetune.evaluate import compare

    quiet_libraries()
    recipe = recipe_of(run)
    evaluation = _evaluation(recipe, metrics if answers else None, max_new_tokens)
    model, tokenizer = load_tuned(
        run, recipe.model_kwargs if recipe else ModelKwargs(), allow_template_mismatch=allow_mismatch
    )
    config = recipe.training_config if recipe else None
    examples, rows = rows_of(run, recipe, tokenizer, data)
    comparison = compare(
        model,
        tokenizer,
        Renderer.of(tokenizer, recipe.data if recipe else None),
        examples,
        rows,
        evaluation,
        recipe.data.max_batch_tokens if recipe else 1024,
        config.per_device_eval_batch_size if config else 32,
    )
    if as_json:
        print(json.dumps({"run": str(run), **comparison.summary()}))
        return
    print(f"{'':14}{'base':>9}{'tuned':>9}   on {comparison.eval_rows} rows")
    for name in comparison.tuned:
        line = f"{name:14}{comparison.base[name]:9.4f}{comparison.tuned[name]:9.4f}"
        if found := comparison.metrics.get(name):
            line += f"   tuned {_between(found.tuned_interval)}, tuned - base {_between(found.difference_interval)}"
        print(line)
    if comparison.metrics:
        print("(in brackets: 95 % confidence, by resampling the rows)")


def rows_of(run: Path, recipe: Recipe | None, tokenizer: Any, data: str | None = None) -> tuple[Any, Any]:
    """(examples, rows) of some data, or those that a run has held out.

    Raises:
        DataError: if it has held out none, or its data isn't what it was.
    """
    from phinetune.adapter import run_folders
    from phinetune.data import prepare

    if data is not None:
        # Every row of the file is measured, the longest too, rendered as the run's own were.
        like = recipe.data if recipe else DataConfig(train=data)
        asked = like.model_copy(update={"train": data, "eval": None, "max_length": 1 << 20, "duplicates": "keep"})
        prepared = prepare(asked, tokenizer, seed=0)
        return prepared.train, prepared.train_rows
    if recipe is None or recipe.data.eval in (None, 0) or "-" in _paths(recipe):
        raise DataError(str(run), "this run has no held-out rows", "give some with --data chats.jsonl")
    prepared = prepare(recipe.data, tokenizer, recipe.training_config.seed_of_rows)
    ledger = next(f / "ledger.json" for f in run_folders(run) if (f / "ledger.json").is_file())
    if prepared.fingerprint != json.loads(ledger.read_text(encoding="utf-8")).get("fingerprint"):
        what = "the data has changed since the run, so what was held out then is not known"
        raise DataError(str(run), what, "give held-out rows with --data chats.jsonl")
    return prepared.eval, prepared.eval_rows


def _between(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def _evaluation(recipe: Recipe | None, metrics: Sequence[str] | None, max_new_tokens: int) -> EvaluationConfig:
    """What is measured: as asked, or as the run's recipe has it, but for functions, which are a stranger's there."""
    if metrics is None:
        return EvaluationConfig(max_new_tokens=max_new_tokens)
    own = [name for name in recipe.evaluation.metrics if name in ANSWER_METRICS] if recipe else []
    try:
        return EvaluationConfig(metrics=list(metrics or own or ["exact_match"]), max_new_tokens=max_new_tokens)
    except ValidationError as error:
        raise RecipeError("--metric", str(error.errors()[0]["msg"]), "see `phinetune evaluate --help`") from None


def _paths(recipe: Recipe) -> list[str]:
    """What the recipe names as data; `-` can't be read again."""
    given = [recipe.data.train, recipe.data.eval]
    items = [item for source in given for item in (source if isinstance(source, list) else [source])]
    return [item if isinstance(item, str) else getattr(item, "path", "") for item in items]


def recipe_of(run: Path) -> Recipe | None:
    """The resolved recipe of a run's folder, or of the run a checkpoint belongs to."""
    from phinetune.adapter import run_folders

    for folder in run_folders(run):
        if (folder / "recipe.yaml").is_file():
            return load_recipe(folder / "recipe.yaml")[0]
    return None
