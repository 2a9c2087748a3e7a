"""Files that several rooms need: where downloads and tokenised data are kept, and a digest."""

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """`$PHINETUNE_CACHE`, else `$XDG_CACHE_HOME/phinetune`, else `~/.cache/phinetune`."""
    if os.environ.get("PHINETUNE_CACHE"):
        return Path(os.environ["PHINETUNE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phinetune"


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
