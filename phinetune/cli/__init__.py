"""The command line: verbs, each a few lines that call a room."""

from phinetune.cli.app import main

__all__ = ["main"]
