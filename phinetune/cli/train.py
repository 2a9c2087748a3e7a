"""`phinetune train`"""

from collections.abc import Sequence
from pathlib import Path

from phinetune.cli.paths import existing
from phinetune.cli.signals import leave_to_the_system
from phinetune.recipe import load_recipe


def run_train(recipe: Path, overrides: Sequence[str], resume: bool, overwrite: bool, rehearsal: bool) -> None:
    leave_to_the_system()
    checkpoints = [argument for argument in overrides if resume and _is_checkpoint(argument)][:1]
    settings = [argument for argument in overrides if argument not in checkpoints]  # a second folder is no setting
    loaded, words = load_recipe(recipe, settings)

    from phinetune.cli.quiet import quiet_libraries
    from phinetune.train import train

    quiet_libraries()
    from_where = checkpoints[0] if checkpoints else resume
    result = train(loaded, resume=from_where, overwrite=overwrite, rehearsal=rehearsal, words=words)
    print(f"\nTalk to it:   phinetune chat {result.folder}")
    if result.comparison:
        print(f"Measure it:   phinetune evaluate {result.folder}")


def _is_checkpoint(argument: str) -> bool:
    """A folder may have a `=` in its name."""
    path = existing(argument)
    return "=" not in argument or (path is not None and path.is_dir())
