"""The command line: verbs, each a few lines that call a room."""

import os

# torch reads it when it is imported: large blocks lie in large pages, so that fewer of their addresses are looked up.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from phinetune.cli.app import main

__all__ = ["main"]
