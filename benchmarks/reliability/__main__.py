"""The scoreboard: runs are killed, starved of disk, damaged, interrupted and attacked; what is lost is counted.

    make scoreboard                                  everything but `plan` (within the hour)
    python benchmarks/reliability kills --kills 30   a part, with other numbers

    kills        SIGKILL at random instants of runs, a third of them SmolLM2-135M's, and of their resumptions
    calls        SIGKILL before every system call of a save, and the order of durability (needs strace)
    disk         no space at every write of a save, and on a small disk (needs strace, and `unshare -rm` around it)
    corruption   every file of a checkpoint missing, empty, truncated, with a bit flipped
    hostile      models, adapters, checkpoints, templates and data that mean harm
    plan         what `phinetune plan` says beside what runs take, Phi-3-mini at full size among them
    signals      SIGTERM and SIGINT at random instants

A section's keys are merged into benchmarks/results/reliability.json, with the versions that they are of.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import corruption as corruption_trials
import disk as disk_trials
import forked
import hostile as hostile_trials
import kills as kill_trials
import plans as plan_trials
import record
import signals as signal_trials
import small_phi3
from subject import Subject


class Bench:
    """The subjects, made when they are first needed."""

    def __init__(self, folder: Path, asked: argparse.Namespace) -> None:
        self.folder, self.asked = folder, asked
        self._made: dict[str, Subject] = {}

    def real(self) -> Subject:
        """The embedded model, SmolLM2-135M."""
        return self._subject(self.asked.model or "smollm2")

    def small(self) -> Subject:
        """A two-layer Phi-3 of random weights, for what a model's size doesn't touch."""
        path = self.folder / "small-phi3"
        if not path.is_dir():
            made = forked.start(partial(small_phi3.make, path), self.folder / "small-phi3.txt")
            assert made.wait() == 0, made.text()
        return self._subject(str(path))

    def _subject(self, model: str) -> Subject:
        if model not in self._made:
            self._made[model] = Subject(self.folder / f"subject-{len(self._made)}", model)
        return self._made[model]


def kills(bench: Bench) -> dict[str, Any]:
    def of(subject: Subject, count: int) -> dict[str, Any]:
        return kill_trials.random_kills(subject, count, bench.asked.seed)

    return on_both(bench, of, bench.asked.kills)


def calls(bench: Bench) -> dict[str, Any]:
    found = kill_trials.calls_of_a_save(bench.small())
    killed = kill_trials.kills_at_calls(bench.small(), found[:: bench.asked.every])
    return {**killed, **kill_trials.order_of_durability(found)}


def disk(bench: Bench) -> dict[str, Any]:
    found = kill_trials.calls_of_a_save(bench.small())
    return disk_trials.starve(bench.small(), found, bench.asked.every)


def corruption(bench: Bench) -> dict[str, Any]:
    return corruption_trials.corrupt(bench.small(), bench.asked.seed, bench.asked.truncations, bench.asked.flips)


def signals(bench: Bench) -> dict[str, Any]:
    def of(subject: Subject, count: int) -> dict[str, Any]:
        return signal_trials.interrupt(subject, count, bench.asked.seed)

    return on_both(bench, of, bench.asked.signals)


def on_both(bench: Bench, trials: Callable[[Subject, int], dict[str, Any]], count: int) -> dict[str, Any]:
    """A third of the trials on the real model, whose steps are long, the rest on the small one."""
    if bench.asked.model == "small":
        return trials(bench.small(), count)
    real, small = trials(bench.real(), count // 3), trials(bench.small(), count - count // 3)
    return {name: together(name, real[name], small[name]) for name in real}


def together(name: str, one: Any, other: Any) -> Any:
    """Counts add up, by their kind too; of what is the most the larger is kept."""
    if isinstance(one, dict):
        return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
    return max(one, other) if "most" in name or "slowest" in name else one + other


def hostile(bench: Bench) -> dict[str, Any]:
    return hostile_trials.attack(bench.small(), bench.folder / "small-phi3", bench.asked.every)


def plan(bench: Bench) -> dict[str, Any]:
    return plan_trials.plans(bench.folder, phi3=bench.asked.model is None)


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "calls": calls,
    "disk": disk,
    "corruption": corruption,
    "hostile": hostile,
    "plan": plan,
    "signals": signals,
    "kills": kills,
}

# Of `make scoreboard`: what takes as long as the rest.
LANES = (["kills"], ["signals", "calls", "disk", "corruption", "hostile"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], metavar="SECTION", default=[])
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--model", help="in place of smollm2, for kills and signals: `small`, or a folder")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--signals", type=int, default=100)
    parser.add_argument("--truncations", type=int, default=20, help="a file")
    parser.add_argument("--flips", type=int, default=50, help="of bits, a file")
    parser.add_argument("--every", type=int, default=1, help="N-th system call only")
    parser.add_argument("--results", type=Path, default=record.RESULTS / "reliability.json")
    asked = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    importlib.import_module("imported")  # what every run imports
    with forked.temporary_folder("phinetune-scoreboard-") as folder:
        if asked.sections:
            run(asked.sections, Bench(folder, asked), asked.results)
        else:
            in_lanes(folder, asked)


def in_lanes(folder: Path, asked: argparse.Namespace) -> None:
    """Everything, in as many processes at once as there are lanes, each on cores of its own."""
    cores, lanes = sorted(os.sched_getaffinity(0)), []
    for number, sections in enumerate(LANES):
        own, results_of_lane = cores[number :: len(LANES)] or cores, folder / f"lane-{number}.json"
        pid = os.fork()
        if not pid:
            os.sched_setaffinity(0, own)
            (folder / f"lane-{number}").mkdir()
            run(sections, Bench(folder / f"lane-{number}", asked), results_of_lane)
            os._exit(0)
        lanes.append((pid, results_of_lane))
    ended = [os.waitpid(pid, 0)[1] for pid, _ in lanes]
    assert not any(ended), "a section has failed; it says above why"
    for _, results_of_lane in lanes:
        record.merge(asked.results, record.read(results_of_lane))


def run(sections: list[str], bench: Bench, merged_into: Path) -> None:
    for name in sections:
        begin = time.monotonic()
        found = SECTIONS[name](bench)
        found |= {f"{name}_seconds": round(time.monotonic() - begin), f"{name}_seed": bench.asked.seed}
        if name in ("kills", "signals"):
            found[f"{name}_model"] = Path(bench.asked.model).name if bench.asked.model else "smollm2, small"
        print(json.dumps({name: found}), flush=True)
        found[f"{name}_versions"] = record.versions("phinetune", "torch", "transformers", "safetensors")
        record.merge(merged_into, found)


if __name__ == "__main__":
    main()
