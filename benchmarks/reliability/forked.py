"""Runs in processes forked from this one, which has loaded what they import: a second in place of five.

This process imports and never computes, so a fork of it is like a process that has just started.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


@dataclass
class Run:
    """A process that trains; what it says goes to `said`."""

    pid: int
    said: Path

    def kill(self, number: int = signal.SIGKILL) -> None:
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def wait(self, seconds: float = 300) -> int:
        """The exit code, negative for a signal; a run that takes too long is killed and is an error."""
        code = self.ends_within(seconds)
        if code is not None:
            return code
        self.kill()
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"a run took more than {seconds:g} s: {self.text()[-2000:]}")

    def ends_within(self, seconds: float) -> int | None:
        """The exit code, or None for a run that goes on."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        return None

    def text(self) -> str:
        return self.said.read_text(encoding="utf-8", errors="replace")


def start(train: Callable[[], object], said: Path, before: Callable[[], None] = lambda: None) -> Run:
    """`train` in a fork; `before` is called in it first."""
    said.touch()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # in the fork it must not unwind what is the parent's
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return Run(pid, said)
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.setpgid(0, 0)
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        signal.signal(signal.SIGINT, _interrupted)
        before()
        train()
        code = 0
    except SystemExit as ended:
        code = 0 if ended.code is None else ended.code if isinstance(ended.code, int) else 1
    except KeyboardInterrupt:  # before `train` listens
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _interrupted(number: int, frame: object) -> None:
    """As Python does; but a second one while the first is on its way out ends a fork, and doesn't get past its exit."""
    signal.signal(signal.SIGINT, lambda *given: os._exit(130))
    raise KeyboardInterrupt


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder that goes with the process that made it: a fork that an exception unwinds leaves it to its parent."""
    folder, owner = Path(tempfile.mkdtemp(prefix=prefix)), os.getpid()
    try:
        yield folder
    finally:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)


def module(name: str) -> ModuleType:
    return sys.modules[name]
