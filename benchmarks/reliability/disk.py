"""Row 3: no space at every write of a save, and a disk that really is full."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import subject
from kills import STOPPED_SAVE, Call, stop_at_save, trace
from subject import SAVED_EVERY, Subject

WRITING = ("write", "pwrite64", "writev", "fsync", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "ftruncate")
PAGE = 4096
DISK = 8 << 20  # bytes of the small disk
ROOM = range(0, 15 * PAGE, PAGE)  # bytes left on it behind the check, and before the first file of a save


def starve(given: Subject, calls: list[Call], every: int) -> dict[str, Any]:
    """Every write of a save is refused once; then a small disk is filled to all degrees in the middle of a save, and
    before a run."""
    writes = [call for call in calls if is_write(call)][::every]
    lost = sum(not refused(given, call, i) for i, call in enumerate(writes))
    filled = list(ROOM)[::every]
    lost += sum(not filled_up(given, room) for room in filled)
    early = too_small(given)
    return {
        "disk_full_points": len(writes) + len(filled) + 1,
        "disk_full_lost": lost + (not early),
        "disk_full_refused_writes": len(writes),
        "disk_full_real": len(filled) + 1,
    }


def is_write(call: Call) -> bool:
    if "checkpoint" not in call.line or " = -1 " in call.line:
        return False
    return call.name in WRITING or (call.name == "openat" and "O_CREAT" in call.line)


def refused(given: Subject, call: Call, number: int) -> bool:
    out, said = given.folder / f"refused-{number}", given.folder / f"refused-{number}.txt"
    run = given.start(out, said, before=stop_at_save(given))
    tracer = trace(run, given.folder / "call.log", "-e", f"inject={call.name}:error=ENOSPC:when={call.number}")
    code = run.wait()
    tracer.wait()
    return _ended_well(given, out, said, code, f"no space for {call.line}")


def filled_up(given: Subject, room: int) -> bool:
    """A save finds enough room, and then somebody else takes all but `room` bytes of it."""
    disk, said = given.folder / "disk", given.folder / f"filled-{room}.txt"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)], check=True)
    try:
        out = disk / "run"
        run = given.start(out, said, before=stop_behind_check())
        _, status = os.waitpid(run.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), run.text()
        ballast = disk / "ballast"
        ballast.write_bytes(b"\0" * (shutil.disk_usage(disk).free - room))
        os.kill(run.pid, signal.SIGCONT)
        code = run.wait()
        return _ended_well(given, out, said, code, f"{room} bytes left", mend=ballast.unlink)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
        disk.rmdir()


def too_small(given: Subject) -> bool:
    """A disk on which the run's checkpoints have no room is told before the first step."""
    disk, said = given.folder / "disk", given.folder / "small.txt"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={1 << 20}", "tmpfs", str(disk)], check=True)
    try:
        code = given.start(disk / "run", said).wait()
        text = said.read_text()
        good = (
            code == 1 and "no space" in text and str(disk) in text and "step 1" not in text and not list(disk.iterdir())
        )
        if not good:
            print(f"disk: on a small one it ends with {code}: {text[-2000:]}", flush=True)
        return good
    finally:
        subprocess.run(["umount", str(disk)], check=True)
        disk.rmdir()


def stop_behind_check() -> Callable[[], None]:
    """In a fork: its second save stops between its look at the disk and its first file."""

    def before() -> None:
        checkpoint, name = forked.module("phinetune.train.checkpoint"), f"checkpoint-{STOPPED_SAVE * SAVED_EVERY}"
        real = checkpoint.check_room

        def check_room(path: Path, size: int) -> None:
            real(path, size)
            if path.name == name:
                os.kill(os.getpid(), signal.SIGSTOP)

        checkpoint.check_room = check_room  # type: ignore[attr-defined]

    return before


def _ended_well(
    given: Subject, out: Path, said: Path, code: int, what: str, mend: Callable[[], object] = lambda: None
) -> bool:
    """One clear error, the checkpoint before whole, nothing temporary left; and the run goes on once there is room."""
    text = said.read_text(encoding="utf-8")
    why = r"(, [\d,]+ too few|: a quota is used up, or [^;]+); "  # where room is left by the disk's own account
    told = re.search(rf"^error: {re.escape(str(out))}\S*: no space: [\d,]+ bytes [^;]+ are free{why}", text, re.M)
    left, kept = subject.leftovers(out), given.resumable(out)
    faults = []
    if code != 1:
        faults.append(f"exit {code}")
    if not told or "Traceback" in text:
        faults.append("no clear error")
    if left:
        faults.append(f"left {left}")
    if kept < SAVED_EVERY:
        faults.append("no checkpoint to go on from")
    mend()
    if given.start(out, said, resume=True).wait() != 0 or given.digests(out) != given.whole:
        faults.append("the resumed run ends otherwise")
    if faults:
        print(f"disk: {what}: {', '.join(faults)}: {said.read_text()[-2500:]}", flush=True)
    else:
        shutil.rmtree(out)
    return not faults
