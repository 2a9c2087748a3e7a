"""The scoreboard's kills, of TRL's trainer with PEFT; run in their environment, on the model of small_phi3.py.

    make scoreboard-full                                                             behind ours
    .venv-trl/bin/python benchmarks/reliability/beside_trl.py MODEL calls --every 10   a part, with other numbers

    kills   SIGKILL at random instants of runs, and of their resumptions
    calls   SIGKILL before every system call of a save (needs strace)

The keys begin with `trl_` and are merged into benchmarks/results/reliability.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import kills as kill_trials
import record
from subject import SAVED_EVERY, STEPS
from trl_subject import TrlSubject


def kills(given: TrlSubject, asked: argparse.Namespace) -> dict[str, Any]:
    return kill_trials.random_kills(given, asked.kills, asked.seed)


def calls(given: TrlSubject, asked: argparse.Namespace) -> dict[str, Any]:
    return kill_trials.kills_at_calls(given, kill_trials.calls_of_a_save(given)[:: asked.every])


SECTIONS = {"kills": kills, "calls": calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], metavar="SECTION", default=[])
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--every", type=int, default=1, help="N-th system call only")
    parser.add_argument("--results", type=Path, default=record.RESULTS / "reliability.json")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="phinetune-scoreboard-") as folder:
        given = TrlSubject(Path(folder) / "subject", str(asked.model.absolute()))
        check_clean_stops(given)
        for name in asked.sections or SECTIONS:
            begin = time.monotonic()
            found = SECTIONS[name](given, asked)
            found |= {f"{name}_seconds": round(time.monotonic() - begin), f"{name}_seed": asked.seed}
            found[f"{name}_versions"] = record.versions("trl", "peft", "transformers", "torch")
            found = {f"trl_{key}": value for key, value in found.items()}
            print(json.dumps({name: found}), flush=True)
            record.merge(asked.results, found)


def check_clean_stops(given: TrlSubject) -> None:
    """A run that stops behind any of its saves and is resumed ends in the same bytes: what is lost, a kill has lost."""
    for number in range(1, STEPS // SAVED_EVERY + 1):
        out, said = given.folder / f"stopped-{number}", given.folder / f"stopped-{number}.txt"
        assert given.start(out, said, before=end_behind_save(given, number)).wait() == 0, said.read_text()
        assert given.resumable(out) == number * SAVED_EVERY
        assert given.start(out, said, resume=True).wait() == 0, said.read_text()
        assert given.digests(out) == given.whole, f"resumed at save {number}, a run ends otherwise"


def end_behind_save(given: TrlSubject, number: int) -> Callable[[], None]:
    """In a fork: it ends when its `number`-th checkpoint is written."""

    def before() -> None:
        holder, name = given.save()
        real, saved = getattr(holder, name), list[int]()

        def save(*arguments: Any) -> None:
            real(*arguments)
            saved.append(number)
            if len(saved) == number:
                os._exit(0)

        setattr(holder, name, save)

    return before


if __name__ == "__main__":
    main()
