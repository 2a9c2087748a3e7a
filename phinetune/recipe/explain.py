"""Every setting of a recipe: its value, where that came from, what it does."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from phinetune.recipe.load import FREE_SECTIONS, apply_override, make_recipe, read_recipe
from phinetune.recipe.names import SECTIONS, current_name
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
}
SECRET, HIDDEN = ("model_kwargs.token",), "(given, not shown)"


def explain(path: str | Path, overrides: Sequence[str] = ()) -> tuple[list[Setting], list[str]]:
    """All settings in the schema's order, and the words said of names that were mapped or ignored.

    Raises:
        RecipeError: as `load_recipe`.
    """
    given = read_recipe(path)
    origins: dict[str, str] = {key: "recipe" for key in ("model", *FREE_SECTIONS) if key in given}
    for section in SECTIONS:
        values = given.get(section)
        for name, value in values.items() if isinstance(values, dict) else ():
            new = current_name(section, str(name), value)[0]
            origins[new] = _said("recipe", new, f"{section}.{name}")
    for override in overrides:
        old, new = apply_override(given, override)
        origins[new] = _said("command line", new, old)
    recipe, words = make_recipe(given, where=str(path))

    settings = []
    for key, field in Recipe.model_fields.items():
        value = getattr(recipe, key)
        if key not in SECTIONS:
            settings.append(Setting(key, value, origins.get(key, "default"), field.description or ""))
            continue
        for name, own in SECTIONS[key].model_fields.items():
            place = f"{key}.{name}"
            value, origin = getattr(getattr(recipe, key), name), origins.get(place, "default")
            if value is None and place in DERIVED:
                source, derive = DERIVED[place]
                value, origin = derive(recipe), f"derived from {source.rpartition('.')[2]}"
            value = HIDDEN if place in SECRET and value is not None else value
            settings.append(Setting(place, value, origin, " ".join((own.description or "").split())))
    return settings, words


def _said(where: str, new: str, old: str) -> str:
    """An old name is said, with its section where that has changed too."""
    if old == new:
        return where
    same = old.rpartition(".")[0] == new.rpartition(".")[0]
    return f"{where}, as {old.rpartition('.')[2] if same else old}"
