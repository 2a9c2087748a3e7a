"""What a run takes, its earlier lives among it."""

import time
from collections.abc import Mapping
from typing import Any

from phinetune.machine.memory import MemoryPeak

NOTHING = {"seconds": 0.0, "peak_gb": 0.0}


class Usage:
    """Seconds and peak memory (10⁹ bytes) of a run: those that its checkpoint counts, and this process's: seconds since
    this object was made, memory in a `with` block."""

    def __init__(self, device: Any = None) -> None:
        self._memory = MemoryPeak(device)
        self._began = time.perf_counter()
        self._earlier = NOTHING

    def __enter__(self) -> "Usage":
        self._memory.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._memory.__exit__(*exc)

    def go_on_from(self, earlier: Mapping[str, float]) -> None:
        """Counts what `so_far` said in an earlier life."""
        self._earlier = dict(earlier)

    def so_far(self) -> dict[str, float]:
        seconds = self._earlier["seconds"] + time.perf_counter() - self._began
        return {"seconds": round(seconds, 1), "peak_gb": round(max(self._earlier["peak_gb"], self._memory.gb), 3)}
