"""Packed attention against brute force in float64: a softmax over an explicit mask."""

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from phinetune.kernels import attention, packed_attention


def brute_force(q, k, v, bounds, scaling, window):
    """Loops over heads and tokens; every token sees what stands before it in its own example."""
    heads, tokens, _ = q.shape
    group = heads // k.shape[0]
    out = torch.zeros_like(q)
    for h in range(heads):
        for i in range(tokens):
            start = max(b for b in bounds if b <= i)
            if window is not None:
                start = max(start, i - window + 1)
            scores = (k[h // group, start : i + 1] @ q[h, i]) * scaling
            out[h, i] = scores.softmax(0) @ v[h // group, start : i + 1]
    return out


def check(lengths, heads, kv_heads, window, dtype=torch.float32, tolerance=1e-5):
    torch.manual_seed(0)
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    shapes = [(heads, bounds[-1], 8), (kv_heads, bounds[-1], 8), (kv_heads, bounds[-1], 8)]
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, reference = packed_attention(*inputs, bounds, 0.3, window), brute_force(*exact, bounds, 0.3, window)
    dy = torch.randn_like(reference)
    out.backward(dy.to(dtype))
    reference.backward(dy)
    assert relative_error(out, reference) < tolerance
    for x, x64 in zip(inputs, exact, strict=True):
        if x64.grad.norm() > 1e-9:  # a row of one token has no gradient for q and k
            assert relative_error(x.grad, x64.grad) < tolerance


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]),
    window=st.sampled_from([None, 1, 4, 100]),
)
def test_every_example_is_on_its_own(lengths, heads, window):
    check(lengths, *heads, window)


@pytest.mark.parametrize("window", [None, 5])
def test_long_examples_take_the_other_path_to_the_same_numbers(monkeypatch, window):
    monkeypatch.setattr(attention, "SHORT", 4)
    check([3, 9, 6, 1], 4, 2, window)


def test_bfloat16_is_as_close_as_bfloat16_can_be():
    check([7, 12], 4, 2, None, torch.bfloat16, 2e-2)
