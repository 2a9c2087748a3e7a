"""How the benchmark talks to its children: a file of JSON in, a line of JSON out.  Needs no package at all."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def read() -> dict[str, Any]:
    """In a child: what it is asked to do."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return job


def answer(result: dict[str, Any]) -> None:
    """In a child: its result, the last line of standard output."""
    print(json.dumps(result), flush=True)


def versions(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}


def ask(python: Path, script: str, job: dict[str, Any], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a child to its end and gives its result, with `gb`: the peak of its process tree's memory.

    The parent only waits meanwhile, so what it holds itself is taken off.
    """
    from phinetune.machine.memory import MemoryPeak, memory_in_use

    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        own = memory_in_use()
        with MemoryPeak() as memory:
            ran = subprocess.run(
                [str(python), str(HERE / script), str(file)],
                capture_output=True,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(environment or {})},
                cwd=work,  # trainers leave things where they run
            )
        gb = memory.gb - own / 1e9
    if ran.returncode:
        raise RuntimeError(f"{script}: {ran.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return {**result, "gb": gb}
