"""What the command line makes of paths that it is given."""

from pathlib import Path

from phinetune.errors import InputError


def check_output(path: Path) -> None:
    """Raises InputError for a file that can't be written, before anything is read for it."""
    if path.is_dir():
        raise InputError(str(path), "is a folder", "give the path of a file")
    if not path.parent.is_dir():
        raise InputError(str(path), f"the folder {path.parent} isn't there", "make the folder, or give another path")


def existing(argument: str) -> Path | None:
    """The path that an argument is; None where there is nothing of that name, or none can be called so."""
    try:
        return Path(argument) if Path(argument).exists() else None
    except OSError:  # a setting may be longer than any name
        return None
