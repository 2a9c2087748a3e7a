"""What a run's folder tells of it: read, never trusted."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.errors import InputError
from phinetune.recipe import FROM_PYTHON
from phinetune.untrusted import Untrusted, check_file, read_json

LARGEST = 1 << 28  # bytes of metrics.jsonl or answers.jsonl
ABOUT = "run.json"


@dataclass(frozen=True)
class Run:
    """A run that goes on, or was killed, has no summary yet."""

    folder: Path
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    ledger: dict[str, Any]
    answers: list[dict[str, Any]]
    about: dict[str, Any]
    """`settings` with their origins, `versions`, `begun` and the machine: what was known when it began."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def settings(self) -> dict[str, Any]:
        """{section.name: value}"""
        return {setting["path"]: setting["value"] for setting in self.about.get("settings", [])}

    @property
    def can_be_repeated(self) -> bool:
        """Whether its rows can be read again, which standard input and objects from Python can't."""
        source = str(self.settings.get("data.train", ""))
        return source != "-" and not source.endswith(FROM_PYTHON)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one of the names in metrics.jsonl."""
        lines = [line for line in self.metrics if isinstance(line.get(key), int | float)]
        return [line["step"] for line in lines], [line[key] for line in lines]


def read_run(folder: Path) -> Run:
    """
    Raises:
        InputError: if it holds no run, or files in it can't be read.
    """
    if not (folder / "metrics.jsonl").is_file() or not (folder / "recipe.yaml").is_file():
        what = "holds no run of phinetune's" if folder.is_dir() else "no such folder"
        raise InputError(str(folder), what, "give the output folder of a run")
    try:
        return Run(
            folder,
            metrics=[line for line in _lines(folder / "metrics.jsonl") if isinstance(line.get("step"), int)],
            summary=_object(folder / "summary.json"),
            ledger=_object(folder / "ledger.json"),
            answers=_lines(folder / "answers.jsonl"),
            about=_object(folder / ABOUT),
        )
    except (Untrusted, OSError) as error:
        raise InputError(str(folder), str(error), "give the output folder of a run") from None


@contextmanager
def naming_damage(*folders: Path) -> Iterator[None]:
    """JSON of another form than a run writes is the folder's fault, in a `with` block that reads it."""
    from jinja2 import UndefinedError

    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, UndefinedError) as error:
        where = ", ".join(map(str, folders))
        what = f"a file in it holds something else than a run writes ({error})"
        raise InputError(where, what, "give the output folder of a run") from error


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none yet."""
    if not path.exists():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise Untrusted(f"{path.name} is not a JSON object")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects, one a line; a last one that is cut short is one that a killed run was writing."""
    if not path.exists():
        return []
    check_file(path, path.parent)
    if path.stat().st_size > LARGEST:
        raise Untrusted(f"{path.name} has more than {LARGEST:,} bytes")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # not at U+2028, as splitlines does
    try:
        found = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise Untrusted(f"{path.name} is not JSON Lines ({error})") from None
    if not all(isinstance(line, dict) for line in found):
        raise Untrusted(f"{path.name} holds something else than JSON objects")
    return found
