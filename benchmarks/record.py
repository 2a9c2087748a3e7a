"""How figures are kept: JSON in benchmarks/results, with the machine and the versions that they are of.

It needs no package at all, since it also runs in the environments of the peers.
"""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def read(path: Path) -> dict[str, Any]:
    """Nothing where there is no such file."""
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return held


def write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def merge(path: Path, found: dict[str, Any]) -> None:
    """Adds keys to those of a file, or replaces them."""
    write(path, {**read(path), **found})


def versions(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}


def machine() -> dict[str, Any]:
    """What is measured on, in words."""
    facts: dict[str, Any] = {"cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}
    file = Path("/proc/cpuinfo")
    if file.is_file():
        lines = [line.partition(":") for line in file.read_text(encoding="utf-8").splitlines()]
        about = {name.strip(): value.strip() for name, _, value in lines}
        flags = set(about.get("flags", "").split())
        facts["cpu"] = f"{about.get('model name')}, family {about.get('cpu family')}, model {about.get('model')}"
        facts["instructions"] = sorted(
            flags & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"}
        )
        facts["gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return facts
