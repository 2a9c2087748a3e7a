"""`phinetune evaluate`"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from phinetune.errors import AdapterError, RecipeError
from phinetune.recipe import (
    ANSWER_METRICS,
    EvaluationConfig,
    ModelKwargs,
    Recipe,
    apply_override,
    make_section,
)


def run_evaluate(
    run: Path,
    settings: Sequence[str],
    data: str | None,
    answers: bool,
    metrics: Sequence[str],
    seed: int,
    allow_mismatch: bool,
    as_json: bool,
) -> None:
    from phinetune.adapter import is_adapter, load_tuned, recipe_of
    from phinetune.cli.quiet import quiet_libraries
    from phinetune.data import Renderer
    from phinetune.evaluate import check_held_out, compare, held_out
    from phinetune.train.estimate import has_room_to_fold

    quiet_libraries()
    if not is_adapter(run):
        raise AdapterError(str(run), "holds no adapter" if run.exists() else "no such folder", "give a run's folder")
    recipe = recipe_of(run)
    for function in _functions_of(recipe) if answers and not metrics else ():
        print(f"{function} isn't run from a recipe: --metric {function}", file=sys.stderr)
    evaluation = evaluation_of(recipe, metrics if answers else None, settings)
    check_held_out(run, recipe, data)
    model, tokenizer = load_tuned(
        run, recipe.model_kwargs if recipe else ModelKwargs(), allow_template_mismatch=allow_mismatch
    )
    config = recipe.training_config if recipe else None
    examples, rows = held_out(run, recipe, tokenizer, data)
    comparison = compare(
        model,
        tokenizer,
        Renderer.of(tokenizer, recipe.data if recipe else None),
        examples,
        rows,
        evaluation,
        recipe.data.max_batch_tokens if recipe else 1024,
        config.per_device_eval_batch_size if config else 32,
        fold=has_room_to_fold(model),
        seed=seed,
    )
    if as_json:
        print(json.dumps({"run": str(run), **comparison.summary()}))
        return
    print(f"{'':14}{'base':>9}{'tuned':>9}   on {comparison.eval_rows} rows")
    for name, found in comparison.metrics.items():
        intervals = f"tuned {_between(found.tuned_interval)}, tuned - base {_between(found.difference_interval)}"
        print(f"{name:14}{found.base:9.4f}{found.tuned:9.4f}   {intervals}")
    print("(in brackets: 95 % confidence, by resampling the rows)")


def _functions_of(recipe: Recipe | None) -> list[str]:
    """The run's own functions of answers, which are code, and whose folder may be a stranger's."""
    return [name for name in recipe.evaluation.metrics if name not in ANSWER_METRICS] if recipe else []


def _between(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def evaluation_of(recipe: Recipe | None, metrics: Sequence[str] | None, settings: Sequence[str]) -> EvaluationConfig:
    """What is measured: as asked, or as the run's recipe has it, but for functions, which are a stranger's there.

    Args:
        metrics: that were asked for; None for no answers at all.
        settings: key=value over the recipe's evaluation section.

    Raises:
        RecipeError: for what isn't a metric or a setting of answers.
    """
    own = recipe.evaluation.model_dump(exclude_unset=True) if recipe else {}
    measured = [name for name in own.pop("metrics", []) if name in ANSWER_METRICS]
    if metrics is not None:
        own["metrics"] = list(metrics or measured or ["exact_match"])
    given = {"evaluation": own}
    for setting in settings:
        if not apply_override(given, setting)[1].startswith("evaluation."):
            raise RecipeError(f"override {setting!r}", "says nothing about answers", "tune again with it")
    section: EvaluationConfig = make_section("evaluation", given["evaluation"], "evaluate")
    return section
