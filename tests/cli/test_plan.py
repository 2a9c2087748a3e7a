"""`phinetune plan` in words."""

import pytest

from phinetune.cli.plan import _lines

FOUND = {
    "model": "a/b", "device": "cpu", "measured_with_layers": [2, 4], "layers": 32, "batch_tokens": 1024,
    "recomputed_layers": 0, "merges_for_answers": False, "gb": {"process": 0.6, "weights": 7.6, "activations": 1.0},
    "peak_gb": 9.2, "mapped_gb": 0.0, "free_gb": 16.0, "steps": 10, "seconds_a_step": 260.0, "seconds": 2600.0,
    "share_of_gpu_rate": None, "disk_gb": 0.1, "disk_free_gb": 10.0, "fits": True, "advice": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.137, "0.14"), (9.96, "10"), (99.6, "100"), (260.0, "260"), (1234.5, "1,234")]
)
def test_a_steps_seconds_are_a_plain_number(seconds, said):
    lines = list(_lines({**FOUND, "seconds_a_step": seconds}))
    assert f"  10 steps of {said} s: 43 min" in lines


def test_what_is_cudas_is_called_so():
    here = next(line for line in _lines(FOUND) if "0.60 GB" in line)
    there = next(line for line in _lines({**FOUND, "share_of_gpu_rate": 0.36}) if "0.60 GB" in line)
    assert here.split("  ")[1] == "Python, libraries, data"
    assert there.split("  ")[1] == "CUDA"
