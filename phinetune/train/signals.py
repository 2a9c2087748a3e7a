"""SIGINT and SIGTERM: a run ends soon, behind a checkpoint where it has something to keep.

    load, tokenise     ends at once: there is nothing to keep
    train              the step is finished, a checkpoint written
    evaluate, answer   given up, to be done again behind --resume; a checkpoint written where none is of this step
    save               the checkpoint is finished

A second signal ends the process as if nobody listened; what is half written then is removed by the next run.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from phinetune.errors import Stopped

LISTENED_TO = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Raised where a signal ends what is being done. No `except Exception` on the way takes it for a fault."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """What has been caught; `deferred` while work is done that is to be finished first."""

    def __init__(self, arrived: int | None = None) -> None:
        """
        Args:
            arrived: a pipe's end, from which a byte is read for each signal that has come.
        """
        self.caught: int | None = None
        self._deferred, self._arrived = 0, arrived

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In this block a signal is only noted."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def check(self) -> None:
        """Raises Interrupted where a signal has been noted."""
        if self.caught is not None:
            raise Interrupted(self.caught)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        for listened in LISTENED_TO:  # the next one isn't Python's to delay
            signal.signal(listened, signal.SIG_DFL)
        if self._came() > 1:  # two in one long call of a library, of which Python tells once
            os.kill(os.getpid(), number)
        # In the middle of such a write, or with nobody left to read; a logger could be imported just now.
        with suppress(RuntimeError, OSError, ValueError):
            name = signal.Signals(number).name
            print(f"{name}: stopping; a second signal stops at once, without a checkpoint", file=sys.stderr)
        if not self._deferred:
            raise Interrupted(number)

    def _came(self) -> int:
        """How many of the signals listened to there were since the last look."""
        try:
            numbers = os.read(self._arrived, 1 << 16) if self._arrived is not None else b""
        except BlockingIOError:
            numbers = b""
        return sum(number in LISTENED_TO for number in numbers)


@contextmanager
def listening() -> Iterator[Signals]:
    """Catches signals for a block, on the main thread; elsewhere they are somebody else's.

    Raises:
        Stopped: where one ended the block before there was anything to keep.
    """
    before: dict[signal.Signals, Any] = {}
    arrived, arrives = os.pipe()
    for end in (arrived, arrives):
        os.set_blocking(end, False)
    signals, woken = Signals(arrived), None
    try:
        for listened in LISTENED_TO:
            before[listened] = signal.signal(listened, signals.note)
        woken = signal.set_wakeup_fd(arrives, warn_on_full_buffer=False)
    except ValueError:  # not the main thread
        pass
    try:
        yield signals
    except Interrupted as interrupted:
        what = f"stopped by {interrupted} before a step was made: nothing is lost"
        raise Stopped(
            "train", what, "start it again, with --resume where the run has begun", interrupted.number
        ) from None
    finally:
        if woken is not None:
            signal.set_wakeup_fd(woken)
        _put_back(before)
        os.close(arrived)
        os.close(arrives)


def _put_back(handlers: dict[signal.Signals, Any]) -> None:
    for listened, handler in handlers.items():
        signal.signal(listened, signal.SIG_DFL if handler is None else handler)  # None: one that isn't Python's
