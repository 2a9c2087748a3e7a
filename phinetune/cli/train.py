"""`phinetune train`"""

from collections.abc import Sequence
from pathlib import Path

from phinetune.errors import RecipeError
from phinetune.recipe import load_recipe


def run_train(recipe: Path, overrides: Sequence[str], resume: bool, overwrite: bool, rehearsal: bool) -> None:
    settings = [argument for argument in overrides if "=" in argument]
    checkpoints = [argument for argument in overrides if "=" not in argument]
    if checkpoints and not (resume and len(checkpoints) == 1):
        raise RecipeError(f"override {checkpoints[0]!r}", "has no `=`", "write key=value, such as learning_rate=1e-4")
    loaded, words = load_recipe(recipe, settings)

    from phinetune.cli.quiet import quiet_libraries
    from phinetune.train import train

    quiet_libraries()
    from_where = checkpoints[0] if checkpoints else resume
    result = train(loaded, resume=from_where, overwrite=overwrite, rehearsal=rehearsal, words=words)
    print(f"\nTalk to it:   phinetune chat {result.folder}")
    if result.comparison:
        print(f"Measure it:   phinetune evaluate {result.folder}")
