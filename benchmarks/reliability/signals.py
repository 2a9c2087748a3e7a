"""Row 6: SIGTERM and SIGINT at random instants, from the first import to the last line."""

import random
import shutil
import signal
import time
from typing import Any

import subject
from subject import Subject

LATE, SECOND_LATE = 5.0, 1.0  # seconds; a step of the subject is below a second
SECOND = 0.2  # share of the trials in which a second signal follows at once
ENDED = {signal.SIGTERM: {143, -signal.SIGTERM}, signal.SIGINT: {130, -signal.SIGINT}}


def interrupt(given: Subject, count: int, seed: int) -> dict[str, Any]:
    """Each run is signalled once (or twice), must end in time, and be resumed to the same bytes."""
    rng = random.Random(seed)
    late, lost, slowest, second, phases = 0, 0, 0.0, 0, dict[str, int]()
    for trial in range(count):
        out, said = given.folder / f"signalled-{trial}", given.folder / f"signalled-{trial}.txt"
        number, twice = rng.choice([signal.SIGTERM, signal.SIGINT]), rng.random() < SECOND
        run = given.start(out, said)
        if run.ends_within(rng.uniform(0.0, given.seconds * 0.98)) is not None:
            trial_code: int | None = 0  # it was through before
            took = 0.0
        else:
            phase = phase_of(said.read_text(encoding="utf-8") if said.exists() else "")
            phases[phase] = phases.get(phase, 0) + 1
            begin = time.monotonic()
            run.kill(number)
            if twice:
                time.sleep(0.02)
                run.kill(number)
            trial_code = run.ends_within(60)
            took = time.monotonic() - begin
        second += twice
        slowest = max(slowest, took)
        faults = []
        if trial_code is None:
            run.kill()
            run.wait()
        if took > (SECOND_LATE if twice else LATE):
            late += 1
            faults.append(f"took {took:.1f} s")
        if trial_code not in {0, *ENDED[number]} or "Traceback" in run.text():
            faults.append(f"ended with {trial_code}")
        left_before = subject.leftovers(out) if out.exists() and not twice else []
        again = given.start(out, said, resume=True).wait()
        if again != 0 or given.digests(out) != given.whole:
            faults.append(f"resumed, it ends otherwise ({again})")
        if left_before or subject.leftovers(out):
            faults.append(f"left {left_before or subject.leftovers(out)}")
        if faults:
            lost += 1
            print(f"signals: {number.name}{' twice' * twice}: {', '.join(faults)}: {run.text()[-2500:]}", flush=True)
        else:
            shutil.rmtree(out)
    return {
        "signals": count,
        "signals_late": late,
        "signals_faults": lost,
        "signals_twice": second,
        "signals_slowest_seconds": round(slowest, 2),
        "signals_phases": phases,
    }


def phase_of(text: str) -> str:
    """What a run was doing, by the last line that it had said."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return "load, tokenise, rehearse"
    last = lines[-1]
    if "done:" in text:
        return "ending"
    if last.startswith("wrote") and f"checkpoint-{subject.STEPS}" in last:
        return "answer, compare"
    if "eval_loss" in last:
        return "save"
    if last.startswith("step") and int(last.split()[1].split("/")[0]) % subject.SAVED_EVERY == 0:
        return "evaluate"
    return "train"
