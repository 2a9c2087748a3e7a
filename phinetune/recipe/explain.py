"""Every setting of a recipe: its value, where that came from, what it does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from phinetune.recipe.names import SECTIONS
from phinetune.recipe.schema import Recipe


class Setting(NamedTuple):
    path: str
    """`section.name`, or `model`."""
    value: Any
    origin: str
    """default, recipe, command line, each with the older name where one was used; or what it is derived from."""
    what: str


# Settings that say nothing themselves follow others: what they are then, and whom they follow.
DERIVED: dict[str, tuple[str, Callable[[Recipe], Any]]] = {
    "training_config.data_seed": ("training_config.seed", lambda recipe: recipe.training_config.seed_of_rows),
    "training_config.eval_steps": (
        "training_config.logging_steps",
        lambda recipe: recipe.training_config.logging_steps,
    ),
    "training_config.logging_dir": (
        "training_config.output_dir",
        lambda recipe: str(Path(recipe.training_config.output_dir) / "tensorboard"),
    ),
    "training_config.run_name": ("training_config.output_dir", lambda recipe: recipe.training_config.name),
}
SECRET, HIDDEN = ("model_kwargs.token",), "(given, not shown)"


def explain(recipe: Recipe) -> list[Setting]:
    """All settings of a recipe in the schema's order."""
    settings = []
    for key, field in Recipe.model_fields.items():
        value = getattr(recipe, key)
        if key not in SECTIONS:
            settings.append(Setting(key, value, recipe.origins.get(key, "default"), field.description or ""))
            continue
        for name, own in SECTIONS[key].model_fields.items():
            place = f"{key}.{name}"
            value, origin = getattr(getattr(recipe, key), name), recipe.origins.get(place, "default")
            if value is None and place in DERIVED:
                source, derive = DERIVED[place]
                value, origin = derive(recipe), f"derived from {source.rpartition('.')[2]}"
            value = HIDDEN if place in SECRET and value is not None else value
            settings.append(Setting(place, value, origin, " ".join((own.description or "").split())))
    return settings
