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
LAST = ("answer, compare", "ending")  # phases in which a run may be through before it hears of a signal
ENDED = {signal.SIGTERM: {143, -signal.SIGTERM}, signal.SIGINT: {130, -signal.SIGINT}}


def interrupt(given: Subject, count: int, seed: int) -> dict[str, Any]:
    """Each run is signalled once (or twice), must end in time, and be resumed to the same bytes.

    A run that is through before its signal is no trial; another is drawn.
    """
    rng = random.Random(seed)
    sent, late, lost, slowest, second, phases = 0, 0, 0, 0.0, 0, dict[str, int]()
    while sent < count:
        out, said = given.folder / f"signalled-{sent}", given.folder / f"signalled-{sent}.txt"
        number, twice = rng.choice([signal.SIGTERM, signal.SIGINT]), rng.random() < SECOND
        run = given.start(out, said)
        code = run.ends_within(rng.uniform(0.0, given.seconds * 0.98))
        if code is not None:
            assert code == 0, run.text()
            shutil.rmtree(out)
            said.unlink()
            continue
        phase = phase_of(run.text())
        begin = time.monotonic()
        run.kill(number)
        sent += 1
        phases[phase] = phases.get(phase, 0) + 1
        code = run.ends_within(0.02) if twice else None
        twice = twice and code is None
        if twice:
            run.kill(number)
            second += 1
        if code is None:
            code = run.ends_within(60)
        took = time.monotonic() - begin
        slowest = max(slowest, took)
        faults = []
        if code is None:
            run.kill()
            run.wait()
        if took > (SECOND_LATE if twice else LATE):
            late += 1
            faults.append(f"took {took:.1f} s")
        was_done = code == 0 and phase in LAST and "done:" in run.text()
        if not (was_done or code in ENDED[number]) or "Traceback" in run.text():
            faults.append(f"ended with {code}")
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
        "signals": sent,
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
    if "done:" in text or last.startswith("tuned"):
        return "ending"
    if last.startswith("wrote") and f"checkpoint-{subject.STEPS}" in last:
        return "answer, compare"
    if "eval_loss" in last:
        return "save"
    if last.startswith("step") and int(last.split()[1].split("/")[0]) % subject.SAVED_EVERY == 0:
        return "evaluate"
    return "train"
