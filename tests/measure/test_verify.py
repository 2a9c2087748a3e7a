"""What `verify-resume` takes for the same run; tests/train/test_resume.py has it compare real ones."""

import pytest

from phinetune.measure.verify import _same

LINE = {"loss": 2.0, "grad_norm": 0.5, "learning_rate": 1e-4, "tokens": 512, "supervised_tokens": 100}


@pytest.mark.parametrize(
    ("changed", "on_a_cpu", "on_a_gpu"),
    [
        ({}, True, True),
        ({"loss": 2.001, "grad_norm": 0.504}, False, True),
        ({"loss": 2.01}, False, False),
        ({"grad_norm": 0.51}, False, False),
        ({"learning_rate": 1.0001e-4}, False, False),
        ({"tokens": 513}, False, False),
    ],
    ids=str,
)
def test_a_gpu_may_sum_up_in_another_order(changed, on_a_cpu, on_a_gpu):
    assert _same(LINE, LINE | changed, exactly=True) == on_a_cpu
    assert _same(LINE, LINE | changed, exactly=False) == on_a_gpu
    assert not _same(LINE, {}, exactly=False)
