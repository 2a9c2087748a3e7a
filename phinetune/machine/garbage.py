"""Python's garbage collector beside a long computation."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def garbage_set_aside() -> Iterator[None]:
    """Inside, the collector passes over what is there already: it is looked at once before, and again behind.

    Libraries leave some 400,000 objects, and a collection of them all falls into the midst of a step, every 20 flat
    batches or so, for 0.2 s (Zen 4; docs/log.md).  What a caller has frozen stays so.
    """
    had_frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not had_frozen:
            gc.unfreeze()
