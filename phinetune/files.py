"""Files that several rooms need: where downloads, kernels and tokenised data are kept, a digest."""

import hashlib
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

KEPT_UNUSED = 30 * 86400  # seconds after which what nobody used is removed from the cache


def cache_folder() -> Path:
    """`$PHINETUNE_CACHE`, else `$XDG_CACHE_HOME/phinetune`, else `~/.cache/phinetune`."""
    if os.environ.get("PHINETUNE_CACHE"):
        return Path(os.environ["PHINETUNE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phinetune"


def named(path: str | Path) -> Path:
    """A path that ends in a name, beside which others can lie: `.`, `..` and `~` are the folders that they mean."""
    path = Path(path).expanduser()
    return path if path.name not in ("", "..") else path.resolve()


def remove_unused(folder: Path, own: re.Pattern[str]) -> None:
    """Removes what nobody has used for a month and what a killed process left behind then, of entries of a cache that
    are called like our `own`: others are the user's."""
    for path in folder.iterdir():
        with suppress(OSError):  # another process's, renamed or removed just now
            if own.fullmatch(path.name) and time.time() - path.stat().st_mtime > KEPT_UNUSED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def mark_used(path: Path) -> None:
    """An entry of a cache, for `remove_unused`."""
    with suppress(OSError):  # somebody else's, whom it is to be read by all the same
        os.utime(path)


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
