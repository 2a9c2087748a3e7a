"""SIGTERM, for verbs that start processes and keep files meanwhile."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def tidied_up() -> Iterator[None]:
    """SIGTERM leaves the block as an exception does: what was started ends, what was written for it is removed."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    print("stopped by SIGTERM", file=sys.stderr)
    sys.exit(128 + number)
