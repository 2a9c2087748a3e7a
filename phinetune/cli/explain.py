"""`phinetune explain`"""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from phinetune.recipe import load_recipe
from phinetune.recipe.explain import explain

WIDTHS = 32, 24, 34  # of names, values, origins


def run_explain(recipe: Path, overrides: Sequence[str], changed: bool, as_json: bool) -> None:
    loaded, words = load_recipe(recipe, overrides)
    settings = explain(loaded)
    if as_json:
        found = [setting._asdict() for setting in settings]
        print(json.dumps({"settings": found, "words": words}, default=lambda value: value.model_dump()))
        return
    section = None
    for setting in settings:
        if changed and setting.origin == "default":
            continue
        owner, _, name = setting.path.rpartition(".")
        if owner != section:
            print(f"\n{owner}" if owner else "", end="\n" if owner else "")
            section = owner
        cells = [f"{'  ' * bool(owner)}{name}", _short(setting.value), setting.origin]
        print(" ".join(f"{cell:{width}}" for cell, width in zip(cells, WIDTHS, strict=True)), setting.what)
    for word in words:
        print(f"\n{word}")


def _short(value: object) -> str:
    """As YAML writes it on one line, cut where it is long."""
    dumped = [item.model_dump() if hasattr(item, "model_dump") else item for item in _as_list(value)]
    plain = dumped if isinstance(value, list) else dumped[0]
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    text = text.removesuffix("...\n").strip()
    return text if len(text) <= WIDTHS[1] else text[: WIDTHS[1] - 1] + "…"


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
