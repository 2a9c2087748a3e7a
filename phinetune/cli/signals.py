"""SIGINT and SIGTERM where no run listens to them (phinetune.train.signals)."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def leave_to_the_system() -> None:
    """SIGINT ends the process at once, as SIGTERM does: for a verb that keeps nothing until its run listens.

    Python would raise KeyboardInterrupt, which within a weak reference's callback, as imports have them, is printed and
    forgotten, and with it the signal.  Where SIGINT is ignored, as of a script's background job, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def tidied_up() -> Iterator[None]:
    """SIGTERM leaves the block as an exception does, for verbs that start processes and keep files meanwhile: what was
    started ends, what was written for it is removed."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    print("stopped by SIGTERM", file=sys.stderr)
    sys.exit(128 + number)
