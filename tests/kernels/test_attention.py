"""Packed attention against brute force in float64: a softmax over the keys of each token's path, token by token."""

import itertools

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from phinetune.kernels import attention, compiled, packed_attention, packs, separate


def brute_force(q, k, v, paths, scaling, window):
    """Loops over heads and tokens."""
    _, heads, _ = q.shape
    group = heads // k.shape[1]
    outs = []
    for path in paths:
        context = [place for start, end in path for place in range(start, end)]
        for i in range(*path[-1]):
            before = context[: context.index(i) + 1]
            seen = before if window is None else before[-window:]
            scores = [k[seen, h // group] @ q[i, h] * scaling for h in range(heads)]
            outs.append(torch.stack([s.softmax(0) @ v[seen, h // group] for h, s in enumerate(scores)]))
    return torch.stack(outs)


def check(paths, heads, kv_heads, window, dtype=torch.float32, tolerance=1e-5, function=packed_attention):
    torch.manual_seed(0)
    tokens = paths[-1][-1][1]
    inputs = [torch.randn(tokens, h, 8).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, reference = function(*inputs, paths, 0.3, window), brute_force(*exact, paths, 0.3, window)
    dy = torch.randn_like(reference)
    out.backward(dy.to(dtype))
    reference.backward(dy)
    assert relative_error(out, reference) < tolerance
    for x, x64 in zip(inputs, exact, strict=True):
        if x64.grad.norm() > 1e-9:  # a row of one token has no gradient for q and k
            assert relative_error(x.grad, x64.grad) < tolerance


def bounds_of(lengths):
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


HEADS = st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)])
WINDOWS = st.sampled_from([None, 1, 4, 100])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 13), min_size=1, max_size=5), HEADS, WINDOWS)
def test_every_example_is_on_its_own(lengths, heads, window):
    check(separate(bounds_of(lengths)), *heads, window)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.lists(st.integers(1, 9), min_size=1, max_size=6), HEADS, WINDOWS)
def test_a_segment_may_continue_any_earlier_one(data, lengths, heads, window):
    bounds = bounds_of(lengths)
    paths = []
    for start, end in itertools.pairwise(bounds):
        before = data.draw(st.sampled_from([[], *paths]))
        paths.append([*before, (start, end)])
    check(paths, *heads, window)


TREE = [[(0, 40)], [(0, 40), (40, 75)], [(0, 40), (40, 75), (75, 90)], [(0, 40), (90, 99)], [(99, 130)]]


@pytest.mark.parametrize("compile_all", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("window", [None, 5, 20, 50])
@pytest.mark.parametrize("paths", [separate([0, 33, 39, 115, 116]), TREE], ids=["separate", "tree"])
def test_blocks_of_queries(monkeypatch, paths, window, compile_all):
    """Small blocks, some of which keep their weights and some don't; compiled too."""
    packs._pack.cache_clear()
    monkeypatch.setattr(packs, "SMALLEST_BLOCK", 4)
    monkeypatch.setattr(packs, "LARGEST_BLOCK", 8)
    monkeypatch.setattr(attention, "KEPT_KEYS", 20)
    if compile_all:
        monkeypatch.setattr(compiled, "SMALLEST", 1)
    check(paths, 4, 2, window)
    packs._pack.cache_clear()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("function", [attention.packed_attention_reference, attention._by_torch])
def test_the_plain_reference_and_other_devices_path(function, window):
    check(TREE, 4, 2, window, function=function)


@pytest.mark.parametrize("rotated", [8, 6], ids=["whole heads", "part of them"])
def test_other_devices_rotation_is_the_processors(rotated):
    torch.manual_seed(0)
    qkv, dout = torch.randn(16, 8, 8, dtype=torch.float64), torch.randn(16, 32, dtype=torch.float64)
    cos, sin = torch.rand(2, 16, rotated, dtype=torch.float64)
    here, there = (qkv.clone().requires_grad_() for _ in range(2))
    paths = separate([0, 7, 16])
    out = attention.rotary_attention(here.flatten(1), cos, sin, 2, paths, 0.3, None, 8)
    theirs = attention._by_torch(*attention._Rotated.apply(there, cos, sin, 2), paths, 0.3, None).flatten(1)
    out.backward(dout)
    theirs.backward(dout)
    assert relative_error(theirs, out) < 1e-12
    assert relative_error(there.grad, here.grad) < 1e-12


def test_bfloat16_is_as_close_as_bfloat16_can_be():
    check(separate([0, 7, 19]), 4, 2, None, torch.bfloat16, 2e-2)
