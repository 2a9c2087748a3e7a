"""The garbage collector beside a run."""

import gc

import pytest

from phinetune.machine.garbage import garbage_set_aside


def test_what_is_there_is_passed_over_until_the_end():
    gc.collect()
    with pytest.raises(KeyboardInterrupt), garbage_set_aside():
        assert gc.get_freeze_count() > 1000
        new = [[]]
        new.append(new)
        assert any(one is new for one in gc.get_objects())
        raise KeyboardInterrupt
    assert gc.get_freeze_count() == 0


def test_what_a_caller_has_frozen_stays_so():
    gc.freeze()
    try:
        with garbage_set_aside():
            pass
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()
