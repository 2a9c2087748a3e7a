"""`phinetune plan`"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from phinetune.recipe import load_recipe

HEADINGS = {"process": "Python, libraries, data", "optimizer": "optimiser"}


def run_plan(recipe: Path, overrides: Sequence[str], device: str | None, as_json: bool) -> None:
    loaded, words = load_recipe(recipe, overrides)
    for word in words:
        print(word, file=sys.stderr)

    from phinetune.cli.quiet import quiet_libraries
    from phinetune.cli.signals import tidied_up
    from phinetune.measure.forecast import forecast

    quiet_libraries()
    with tidied_up():
        found = forecast(loaded, device)
    print(json.dumps(found) if as_json else "\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    few, more = found["measured_with_layers"]
    yield f"{found['model']} on {found['device']}, measured with {few} and {more} of its {found['layers']} layers"
    yield ""
    for name, size in found["gb"].items():
        heading = HEADINGS.get(name, name)
        if name == "process" and found["share_of_gpu_rate"]:
            heading = "CUDA"
        if name == "activations":
            heading += f" of {found['batch_tokens']:,} tokens"
            if found["recomputed_layers"]:
                heading += f", {found['recomputed_layers']} layers recomputed"
            if found["merges_for_answers"]:
                heading += ", or weights merged for answers"
        yield f"  {heading:64} {size:8.2f} GB"
    yield f"  {'peak':64} {found['peak_gb']:8.2f} GB"
    if found["mapped_gb"]:
        yield f"  {'beside it, weights read from their file':64} {found['mapped_gb']:8.2f} GB"
    yield f"  {'free':64} {found['free_gb']:8.2f} GB"
    yield ""
    a_step = f"{found['seconds_a_step']:.2g}" if found["seconds_a_step"] < 10 else f"{found['seconds_a_step']:,.0f}"
    yield f"  {found['steps']:,} steps of {a_step} s: {_duration(found['seconds'])}"
    if found["share_of_gpu_rate"]:
        yield f"  (by the device's data sheet, at {found['share_of_gpu_rate']} of its rate; a small model takes longer)"
    yield f"  checkpoints {found['disk_gb']:.2f} GB, of {found['disk_free_gb']:,.0f} GB free"
    yield ""
    yield "It fits." if found["fits"] else "It doesn't fit. What helps, the mildest first:"
    for line in found["advice"]:
        yield f"  {line}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
