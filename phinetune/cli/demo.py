"""`phinetune demo`: the embedded model learns the shipped example, before and after shown."""

import json
import shlex
from importlib import resources
from pathlib import Path

from phinetune.recipe import Recipe, load_recipe

SHOWN = 3


def run_demo(output_dir: Path, seed: int | None, overwrite: bool) -> None:
    overrides = [f"output_dir={json.dumps(str(output_dir), ensure_ascii=False)}"]
    overrides += [] if seed is None else [f"seed={seed}"]
    recipe, words = load_recipe(_demo_recipe(), overrides)

    from phinetune.cli.quiet import quiet_libraries
    from phinetune.train import train

    quiet_libraries()
    result = train(recipe, overwrite=overwrite, words=words)
    comparison = result.comparison
    assert comparison is not None, "the demo's recipe has held-out rows"

    print("\nHeld-out orders, in sentences and for items that training never had:")
    for answer in comparison.answers[:SHOWN]:
        print(f"\n  customer  {answer.question}")
        print(f"  base      {_one_line(answer.base)}")
        print(f"  tuned     {_one_line(answer.tuned)}")
    base, tuned = comparison.base, comparison.tuned
    print(f"\n{'':14}{'base':>8}{'tuned':>8}   on {comparison.eval_rows} held-out rows")
    for name in tuned:
        print(f"{name:14}{base[name]:8.3f}{tuned[name]:8.3f}")
    summary = result.summary
    print(f"\n{summary['steps']} steps; in all {summary['seconds']:.0f} s and {summary['peak_gb']:.2f} GB of memory.")
    print(f"Talk to it:     {_chat(result.folder, recipe)}")
    print("Your own data:  phinetune init chats.jsonl && phinetune train recipe.yaml")


def _demo_recipe() -> Path:
    """Inside an installed package, or beside it in a source checkout."""
    package = Path(str(resources.files("phinetune")))
    inside = package / "recipes" / "demo.yaml"
    return inside if inside.is_file() else package.parent / "recipes" / "demo.yaml"


def _chat(folder: Path, recipe: Recipe) -> str:
    """The command that talks to it as it was trained: behind the system message of all its rows."""
    from phinetune.data import Row, read_rows

    first = next(read_rows(recipe.data.train))
    assert isinstance(first, Row)
    return f"phinetune chat {folder} --compare \\\n  --system {shlex.quote(first.messages[0]['content'])}"


def _one_line(text: str, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
