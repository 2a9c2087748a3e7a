"""`phinetune merge`"""

from pathlib import Path

from phinetune.cli.evaluate import recipe_of, rows_of
from phinetune.errors import RecipeError
from phinetune.recipe import ModelKwargs, Recipe

ONTO = ("auto", "base", "dequantised")
DTYPES = ("auto", "bfloat16", "float16", "float32")


def run_merge(run: Path, output: Path | None, dtype: str, onto: str, data: str | None, allow_mismatch: bool) -> None:
    from phinetune.adapter import merge_adapter
    from phinetune.cli.quiet import quiet_libraries

    for option, value, known in (("--onto", onto, ONTO), ("--dtype", dtype, DTYPES)):
        if value not in known:
            raise RecipeError(option, f"is {value!r}", f"give one of {', '.join(known)}")
    quiet_libraries()
    recipe = recipe_of(run)
    kwargs = recipe.model_kwargs if recipe else ModelKwargs()
    if onto == "dequantised" and not kwargs.load_in_4bit:
        raise RecipeError("--onto dequantised", "this run's base was not in 4 bits", "leave it out")
    dequantised = onto == "dequantised"
    if onto == "auto" and recipe is not None and kwargs.load_in_4bit:
        dequantised = _dequantised_is_better(run, recipe, data, allow_mismatch)
    folder = merge_adapter(
        run,
        output or run.with_name(f"{run.name}-merged"),
        kwargs,
        dtype,
        dequantised=dequantised,
        allow_template_mismatch=allow_mismatch,
    )
    print(f"wrote {folder}, onto the {'dequantised base' if dequantised else 'base'}")
    print(f"Talk to it:   phinetune chat {folder}")


def _dequantised_is_better(run: Path, recipe: Recipe, data: str | None, allow_mismatch: bool) -> bool:
    """By the loss of held-out rows, shown for both: a QLoRA adapter has learnt to mend what 4 bits do to the base, and
    where it hasn't, the base as it was is better."""
    from phinetune.adapter import load_tuned
    from phinetune.evaluate import evaluate_loss

    losses = {}
    for name, in_4bit in (("the base as it was", False), ("the base as 4 bits leave it", True)):
        kwargs = recipe.model_kwargs.model_copy(update={"load_in_4bit": in_4bit})
        model, tokenizer = load_tuned(run, kwargs, allow_template_mismatch=allow_mismatch)
        examples, _ = rows_of(run, recipe, tokenizer, data)
        losses[in_4bit] = evaluate_loss(model, examples, recipe.data.max_batch_tokens)["eval_loss"]
        print(f"held-out loss on {name + ':':30} {losses[in_4bit]:.4f}")
        del model
    return losses[True] <= losses[False]
