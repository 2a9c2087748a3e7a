"""Proof that a recipe's run can be killed: a short run, the same one killed and resumed, and both compared.

whole    ●──●──●──●──●──●                    every process is the command line's own
cut      ●──●──●─✗                            SIGKILL behind a step of our choosing, between two checkpoints
resumed      └───●──●──●──●                  from the newest checkpoint
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phinetune.errors import RunError
from phinetune.files import sha256_of
from phinetune.train.checkpoint import OPTIMIZER, PARAMETERS, read_state
from phinetune.train.log import METRICS

STEPS, SAVED_EVERY = 6, 2
# Of each line of metrics.jsonl what is compared, and how far it may be off, as a share, where sums have no fixed order.
COMPARED = {"loss": 1e-3, "grad_norm": 1e-2, "learning_rate": 0.0, "tokens": 0.0, "supervised_tokens": 0.0}
FINAL = ["adapter_model.safetensors", f"checkpoint-{STEPS}/{PARAMETERS}", f"checkpoint-{STEPS}/{OPTIMIZER}"]
SHORT = {
    "training_config.max_steps": STEPS,
    "training_config.logging_steps": 1,
    "training_config.logging_strategy": "steps",
    "training_config.save_strategy": "steps",
    "training_config.save_steps": SAVED_EVERY,
    "training_config.eval_strategy": '"no"',
    "training_config.metric_for_best_model": "null",  # since nothing is evaluated
    "training_config.early_stopping_patience": "null",
    "training_config.load_best_model_at_end": "false",
    "training_config.report_to": "[]",
    "evaluation.metrics": "[]",
}


def verify_resume(
    recipe: Path, overrides: Sequence[str], folder: Path, seed: int | None = None, exactly: bool = True
) -> dict[str, Any]:
    """Runs, kills, resumes and compares; `folder` holds both runs.

    Args:
        exactly: False on a GPU, whose sums have no fixed order: losses may differ by 1e-3 then, gradients' norms by
            1e-2, and the final bytes are not compared.

    Returns:
        `killed_behind` (step), `resumed_behind`, `exactly`, `steps` (what each line of both runs says, and whether it
        is equal), `batches` (the digest of all tokens trained on, in their order, at the end of both), `files` (the
        final bytes' sha256 in both), and `equal`, whether all is that is compared.

    Raises:
        RunError: if a run fails by itself.
    """
    kill_behind = random.Random(seed).randint(SAVED_EVERY, STEPS - 1)
    whole, cut = folder / "whole", folder / "cut"
    with _started(recipe, overrides, whole) as process:
        _finish(process, whole)
    with _started(recipe, overrides, cut) as process:
        killed_behind = _kill(process, cut, kill_behind)
    before = _lines(cut)
    checkpoints = [int(path.name.rpartition("-")[2]) for path in cut.glob("checkpoint-*")]
    with _started(recipe, overrides, cut, "--resume") as process:
        _finish(process, cut)

    steps = []
    for step, line in sorted(_lines(whole).items()):
        again = _lines(cut).get(step, {})
        equal = _same(line, again, exactly)
        steps.append({"step": step, "loss": line["loss"], "resumed_loss": again.get("loss"), "equal": equal})
    unlike = [step for step, line in before.items() if not _same(line, _lines(whole).get(step, {}), exactly)]
    batches = [read_state(run / f"checkpoint-{STEPS}")["counters"]["digest"] for run in (whole, cut)]
    files = {name: [sha256_of(run / name) for run in (whole, cut)] for name in FINAL}
    return {
        "killed_behind": killed_behind,
        "resumed_behind": max(checkpoints, default=0),
        "exactly": exactly,
        "steps": steps,
        "batches": batches,
        "files": files,
        "equal": not unlike
        and all(step["equal"] for step in steps)
        and all(one == other for one, other in (batches, *(files.values() if exactly else ()))),
    }


@contextmanager
def _started(recipe: Path, overrides: Sequence[str], output: Path, *more: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A run, which ends with the block, whatever ends that."""
    settings = [f"{name}={value}" for name, value in SHORT.items()]
    command = [sys.executable, "-m", "phinetune", "train", str(recipe), *overrides, *settings]
    command += [f"training_config.output_dir={json.dumps(str(output), ensure_ascii=False)}", *more]
    with _said(output).open("w") as said:  # a file, since nobody reads a pipe while the run goes on
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _said(output: Path) -> Path:
    """What the run into a folder says."""
    return output.with_name(f"{output.name}.said")


def _finish(process: "subprocess.Popen[bytes]", output: Path) -> None:
    if process.wait() != 0:
        what = f"the run failed: {_last(_said(output))}"
        raise RunError(f"verify-resume, {output.name}", what, "mend what `train` says first")


def _kill(process: "subprocess.Popen[bytes]", output: Path, behind: int) -> int:
    """SIGKILL as soon as the run has logged a step; returns the last step that it logged."""
    while behind not in _lines(output):
        if process.poll() is not None:
            what = f"the run ended before it was killed: {_last(_said(output))}"
            raise RunError("verify-resume, cut", what, "try it again")
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return max(_lines(output))


def _lines(run: Path) -> dict[int, dict[str, Any]]:
    """The training lines of metrics.jsonl by step; a line that is being written isn't there yet."""
    try:
        text = (run / METRICS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def _same(one: dict[str, Any], other: dict[str, Any], exactly: bool) -> bool:
    return all(
        name in one and name in other and _alike(one[name], other[name], 0.0 if exactly else off)
        for name, off in COMPARED.items()
    )


def _alike(one: Any, other: Any, off: float) -> bool:
    return bool(one == other or (off and abs(one - other) <= off * abs(one)))


def _last(said: Path) -> str:
    lines = [line for line in said.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
