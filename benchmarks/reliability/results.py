"""benchmarks/results/reliability.json."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "results" / "reliability.json"


def merge(path: Path, found: dict[str, Any]) -> None:
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**held, **found}, indent=2) + "\n", encoding="utf-8")


def versions(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}
