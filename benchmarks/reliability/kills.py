"""Rows 1 and 2: `kill -9` at random instants, and before every system call of a save; the order of durability."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import forked
from subject import SAVED_EVERY, Subject

NO_FILE = "/phinetune-save-ends"  # asked for by a system call behind the save, so that a trace shows its end
STOPPED_SAVE = 2  # which save of a run is looked at


def random_kills(given: Subject, count: int, seed: int) -> dict[str, Any]:
    """Runs are killed and resumed, killed again and resumed, until they end; each must end in the same bytes."""
    rng = random.Random(seed)
    kills, steps_lost, runs, reasons = 0, 0, 0, Counter[str]()
    while kills < count:
        runs += 1
        out, said = given.folder / f"killed-{runs}", given.folder / f"killed-{runs}.txt"
        begun = 0
        while True:
            run = given.start(out, said, resume=True)
            wait = rng.uniform(0.0, given.seconds) if kills < count else 300
            code = run.ends_within(wait)
            if code is None:
                reached = given.logged(out)
                run.kill()
                run.wait()
                kills += 1
                steps_lost = max(steps_lost, reached - max(begun, given.resumable(out)))
                begun = given.resumable(out)
                continue
            break
        if failed := failure(given, out, run, code):
            reasons[failed] += 1
            print(f"kills: {out} ends with {failed}: {run.text()[-2000:]}", flush=True)
        shutil.rmtree(out, ignore_errors=True)
    return {
        "kills": kills,
        "kills_lost": reasons.total(),
        "kills_runs": runs,
        "kills_most_steps_lost": steps_lost,
        "kills_reasons": dict(reasons),
    }


def failure(given: Subject, out: Path, run: forked.Run, code: int) -> str:
    """Nothing for a run that ended as the untouched one did; else the class of what it died of, or what is wrong."""
    if code == 0:
        return "" if given.digests(out) == given.whole else "other bytes"
    _, told, trace = run.text().rpartition("Traceback (most recent call last):\n")
    raised = re.search(r"^[\w.]+", trace, re.M) if told else None
    return raised[0].rpartition(".")[2] if raised else f"exit {code}"


class Call(NamedTuple):
    """A system call of a save: its name, which one of that name it is, and how strace writes it."""

    name: str
    number: int
    line: str


def stop_at_save(given: Subject) -> Callable[[], None]:
    """In a fork: its STOPPED_SAVE-th save is begun stopped, to be traced from there."""

    def before() -> None:
        holder, name = given.save()
        real, calls = getattr(holder, name), Counter[str]()

        def save(*arguments: Any) -> Any:
            calls["saves"] += 1
            if calls["saves"] != STOPPED_SAVE:
                return real(*arguments)
            os.kill(os.getpid(), signal.SIGSTOP)
            try:
                return real(*arguments)
            finally:
                Path(NO_FILE).exists()

        setattr(holder, name, save)

    return before


def trace(run: forked.Run, log: Path, *options: str) -> "subprocess.Popen[bytes]":
    """strace on the main thread of a run that stands still at its save, which then goes on."""
    _, status = os.waitpid(run.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), run.text()
    command = ["strace", "-p", str(run.pid), "-y", "-o", str(log), "-e", "trace=%file,%desc", *options]
    tracer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while "TracerPid:\t0" in Path(f"/proc/{run.pid}/status").read_text():
        assert tracer.poll() is None, "strace can't attach"
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGCONT)
    return tracer


def calls_of_a_save(given: Subject) -> list[Call]:
    """Every system call of a save that concerns files."""
    out, log = given.folder / "traced", given.folder / "traced.log"
    run = given.start(out, given.folder / "traced.txt", before=stop_at_save(given))
    tracer = trace(run, log)
    assert run.wait() == 0, run.text()
    tracer.wait()
    found, seen = [], Counter[str]()
    text = log.read_text(encoding="utf-8", errors="replace")
    assert NO_FILE in text, "no save was traced"
    for line in text.splitlines():
        match = re.match(r"(\w+)\(", line)
        if NO_FILE in line:
            break
        if match:
            seen[match[1]] += 1
            found.append(Call(match[1], seen[match[1]], line))
    shutil.rmtree(out)
    return found


def kills_at_calls(given: Subject, calls: list[Call]) -> dict[str, Any]:
    """A run is killed before each of the calls, and resumed."""
    reasons = Counter[str]()
    for i, call in enumerate(calls):
        out, said = given.folder / f"call-{i}", given.folder / f"call-{i}.txt"
        run = given.start(out, said, before=stop_at_save(given))
        tracer = trace(run, given.folder / "call.log", "-e", f"inject={call.name}:signal=KILL:when={call.number}")
        code = run.wait()
        tracer.wait()
        assert code == -signal.SIGKILL, f"{call} doesn't kill: {code}"
        kept = given.resumable(out)
        again = given.start(out, said, resume=True)
        failed = failure(given, out, again, again.wait()) or ("no checkpoint" if kept < SAVED_EVERY else "")
        if failed:
            reasons[failed] += 1
            print(f"calls: killed before {call.line}: {failed}: {again.text()[-2000:]}", flush=True)
        shutil.rmtree(out, ignore_errors=True)
    return {"call_kills": len(calls), "call_kills_lost": reasons.total(), "call_kills_reasons": dict(reasons)}


def order_of_durability(calls: list[Call]) -> dict[str, Any]:
    """What a save must do in this order: write each file, fsync it; rename the folder; fsync the one around it."""
    lines = [call.line for call in calls]
    (rename,) = (i for i, line in enumerate(lines) if re.match(r"rename\w*\(.*\.tmp-checkpoint-\d+\", ", line))
    names: dict[str, str] = {}  # what a file that is written is called at last
    flushed: dict[str, int] = {}
    for i, line in enumerate(lines):
        if match := re.match(r"p?write\w*\(\d+<([^>]*tmp-checkpoint[^>]*)>", line):
            names[match[1]] = match[1]
            flushed.pop(match[1], None)
        elif match := re.match(r"fsync\(\d+<([^>]*)>\)", line):
            flushed[match[1]] = i
        elif i < rename and (match := re.match(r"rename\w*\(.*?\"([^\"]+)\".*\"([^\"]+)\"", line)):
            names = {written: match[2] if name == match[1] else name for written, name in names.items()}
            flushed |= {match[2]: flushed.pop(match[1])} if match[1] in flushed else {}
    late = [name for name in names.values() if not flushed.get(name, rename) < rename]
    behind = [i for i in flushed.values() if i > rename]
    return {"order_files": len(names), "order_faults": len(late) + (not behind)}
