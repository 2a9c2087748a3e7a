"""The C++ kernels: packed attention and the loss head against float64, and what happens where they can't be made."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from phinetune.kernels import attention, flash, loss, native, separate


def test_what_this_machine_can_compile_is_there():
    """Else the tests below would be skipped, and a fault in a kernel's source be seen by nobody."""
    if native.instructions() is None or not native.find_compiler() or os.environ.get("PHINETUNE_COMPILE") == "0":
        pytest.skip("no instructions or no compiler")
    for name in native.KERNELS:
        assert native.library(name) is not None or name == "products"
    assert (native.library("products") is not None) == native.is_emulated(torch.bfloat16)
    assert (native.library("attention", torch.float32) is not None) == (native.instructions() == "avx2")


needs_kernels = pytest.mark.skipif(
    native.library("attention") is None, reason="the C++ kernels need AVX512-BF16 or AVX2 and a C++ compiler"
)
ROUNDED = {torch.bfloat16: 6e-3, torch.float32: 2e-6}  # of results by inputs of a dtype, relative by norm
NOTHING = {torch.bfloat16: 1e-2, torch.float32: 4e-6}  # a norm a token


def _of(dtype):
    there = native.library("attention", dtype) is not None
    return pytest.param(dtype, marks=pytest.mark.skipif(not there, reason=f"no C++ attention in {dtype} here"))


of_both_dtypes = pytest.mark.parametrize(
    "dtype", [_of(torch.bfloat16), _of(torch.float32)], ids=["bfloat16", "float32"]
)

# Segments that continue earlier ones, of odd lengths, over several blocks of 64 queries and 256 keys.
TREE = [[(0, 290)], [(0, 290), (290, 355)], [(0, 290), (290, 355), (355, 370)], [(0, 290), (370, 379)], [(379, 510)]]


def exact_attention(qkv, angles, kv_heads, paths, scaling, window):
    """Softmax over the whole square in float64, of rotated queries and keys."""
    heads = qkv.shape[1] - 2 * kv_heads
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    half = angles.shape[1]
    a, b, rest = qkv[..., :half], qkv[..., half : 2 * half], qkv[..., 2 * half :]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
    q, k, v = turned[:, :heads], turned[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
    outs = []
    for path in paths:
        context = torch.cat([torch.arange(*piece) for piece in path])
        start, end = path[-1]
        own = torch.arange(len(context) - (end - start), len(context))[:, None]
        seen = torch.arange(len(context))[None]
        hidden = (seen > own) | (seen <= own - (window or 1 << 30))
        for h in range(heads):
            group = h // (heads // kv_heads)
            scores = (q[start:end, h] @ k[context, group].T * scaling).masked_fill(hidden, -torch.inf)
            outs.append(scores.softmax(-1) @ v[context, group])
    return torch.cat([torch.stack(outs[i : i + heads], 1) for i in range(0, len(outs), heads)])


def check_attention(paths, heads, kv_heads, width, turned, window, dtype):
    torch.manual_seed(0)
    tokens = paths[-1][-1][1]
    qkv = torch.randn(tokens, heads + 2 * kv_heads, width).to(dtype).requires_grad_()
    angles = 3 * torch.randn(tokens, turned // 2)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    assert flash.serves(qkv)
    out = attention.rotary_attention(qkv.flatten(1), cos, sin, kv_heads, paths, 0.2, window, width)
    dout = torch.randn_like(out)
    out.backward(dout)
    exact = qkv.detach().double().requires_grad_()
    reference = exact_attention(exact, angles.double(), kv_heads, paths, 0.2, window).flatten(1)
    reference.backward(dout.double())
    assert relative_error(out, reference) < ROUNDED[dtype]
    for ours, theirs in zip(
        qkv.grad.split([heads, kv_heads, kv_heads], 1), exact.grad.split([heads, kv_heads, kv_heads], 1), strict=True
    ):
        if theirs.norm() > 1e-6 * tokens:  # a row of one token has no gradient for q and k
            assert relative_error(ours, theirs) < ROUNDED[dtype]
        else:
            assert ours.norm() < NOTHING[dtype] * tokens


@of_both_dtypes
@pytest.mark.parametrize(("width", "turned"), [(16, 16), (64, 64), (96, 96), (96, 72), (128, 96), (256, 16)])
@pytest.mark.parametrize("window", [None, 1, 50, 150])
@pytest.mark.parametrize("paths", [TREE, separate([0, 1, 64, 193, 450])], ids=["tree", "separate"])
def test_attention(paths, width, turned, window, dtype):
    check_attention(paths, 4, 2, width, turned, window, dtype)


@of_both_dtypes
@settings(max_examples=25, deadline=None)
@given(
    st.data(),
    # Of two or three tokens the weights may be all but certain: what cancels in such a gradient is larger than it.
    st.lists(st.integers(1, 150), min_size=1, max_size=5).filter(lambda n: max(n) >= 8 or max(n) == 1),
    st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    st.sampled_from([None, 1, 30, 200]),
)
def test_attention_over_any_tree(dtype, data, lengths, heads, window):
    bounds = [0, *itertools.accumulate(lengths)]
    paths = []
    for start, end in itertools.pairwise(bounds):
        before = data.draw(st.sampled_from([[], *paths]))
        paths.append([*before, (start, end)])
    check_attention(paths, *heads, 32, 32, window, dtype)


@of_both_dtypes
@pytest.mark.parametrize("threads", [2, 3], indirect=True)
@pytest.mark.parametrize("heads", [(3, 1), (6, 2), (8, 8)], ids=str)
@pytest.mark.parametrize("paths", [TREE, separate([0, 1, 64, 193, 450])], ids=["tree", "separate"])
def test_attention_by_several_threads(paths, heads, threads, dtype):
    check_attention(paths, *heads, 32, 32, None, dtype)


@needs_kernels
@pytest.mark.parametrize("threads", [2, 3], indirect=True)
@pytest.mark.parametrize("tokens", [1, 7, 230])
def test_the_loss_head_by_several_threads(monkeypatch, tokens, threads):
    check_loss_head(monkeypatch, tokens, 321)


@needs_kernels
@pytest.mark.parametrize("default_dtype", [torch.bfloat16, torch.float64], indirect=True)
def test_a_callers_default_dtype_is_nothing_to_kernels(monkeypatch, default_dtype):
    check_loss_head(monkeypatch, 230, 1000)
    check_attention(TREE, 4, 2, 32, 32, None, torch.bfloat16)


@needs_kernels
@pytest.mark.parametrize("vocabulary", [1, 50, 64, 321, 1000])
@pytest.mark.parametrize("tokens", [1, 7, 230])
def test_the_loss_head(monkeypatch, tokens, vocabulary):
    check_loss_head(monkeypatch, tokens, vocabulary)


def check_loss_head(monkeypatch, tokens, vocabulary):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 100)  # a hundred tokens a chunk: more than a strip of rows
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 48).bfloat16().requires_grad_()
    weight, targets = torch.randn(vocabulary, 48).bfloat16(), torch.randint(0, vocabulary, (tokens,))
    weights = torch.randint(0, 4, (tokens,)).float()
    assert loss.serves(hidden, weight)
    value = loss.linear_cross_entropy_sum(hidden, weight, targets, weights)
    value.backward()
    exact = hidden.detach().double().requires_grad_()
    each = F.cross_entropy(exact @ weight.double().T, targets, reduction="none")
    reference = (each * weights.double()).sum()
    reference.backward()
    assert abs(value.item() - reference.item()) <= 5e-3 * max(1.0, reference.item())
    assert (hidden.grad.double() - exact.grad).norm() <= 1e-2 * exact.grad.norm() + 1e-4


@needs_kernels
@pytest.mark.parametrize("wrong", [-1, 70])
def test_a_target_that_is_no_word(wrong):
    hidden, weight = torch.randn(2, 16).bfloat16(), torch.randn(70, 16).bfloat16()
    as_int32 = loss.linear_cross_entropy_sum(hidden, weight, torch.tensor([3, 69], dtype=torch.int32))
    assert torch.equal(as_int32, loss.linear_cross_entropy_sum(hidden, weight, torch.tensor([3, 69])))
    with pytest.raises(IndexError, match=f"from 0 to 69, and there are some from {min(3, wrong)} to {max(3, wrong)}"):
        loss.linear_cross_entropy_sum(hidden, weight, torch.tensor([3, wrong]))


@pytest.mark.skipif(native.instructions() != "avx2", reason="products elsewhere read probabilities as bfloat16")
def test_the_many_words_of_little_probability_count():
    """All words are equally likely and weigh the same: the gradient is nothing, each word a 49,152nd of it."""
    hidden, weight = torch.zeros(3, 16).bfloat16().requires_grad_(), torch.ones(49_152, 16).bfloat16()
    loss.linear_cross_entropy_sum(hidden, weight, torch.tensor([0, 1000, 49_151])).backward()
    assert hidden.grad.abs().max() < 1e-4


@of_both_dtypes
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_the_same_bits_again(dtype, threads):
    """Sums don't depend on which thread is first."""
    torch.manual_seed(0)
    qkv, angles = torch.randn(510, 12, 64).to(dtype), torch.randn(510, 32)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    hidden, weight, targets = torch.randn(360, 64).bfloat16(), torch.randn(500, 64).bfloat16(), torch.arange(360)
    results = []
    for _ in range(8):
        x, h = qkv.clone().requires_grad_(), hidden.clone().requires_grad_()
        attention.rotary_attention(x.flatten(1), cos, sin, 2, TREE, 0.2, None, 64).square().sum().backward()
        loss.linear_cross_entropy_sum(h, weight, targets).backward()
        results.append((x.grad, h.grad))
    assert all(torch.equal(a, results[0][0]) and torch.equal(b, results[0][1]) for a, b in results)


@of_both_dtypes
def test_what_is_not_finite_is_seen(dtype):
    qkv = torch.randn(40, 6, 16).to(dtype)
    qkv[7, 4, 3] = torch.nan  # a key
    out = attention.rotary_attention(
        qkv.flatten(1), torch.ones(40, 16), torch.zeros(40, 16), 1, separate([0, 20, 40]), 1.0
    )
    seen = out.view(40, 4, 16).isnan().any(-1).all(-1)
    assert seen.tolist() == [7 <= token < 20 for token in range(40)]
    hidden, weight = torch.randn(5, 16).bfloat16(), torch.randn(70, 16).bfloat16()
    hidden[2, 0] = torch.nan
    assert loss.linear_cross_entropy_sum(hidden, weight, torch.arange(5)).isnan()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PHINETUNE_COMPILE": "0"}, None),
        ({"CXX": "/bin/false"}, "/bin/false"),
        ({"CXX": "/no/such"}, "No such file"),
        ({"CXX": "g++ '"}, "No such file"),
        ({"PHINETUNE_CACHE": "/dev/null"}, "/dev/null/kernels can't be written"),
    ],
)
def test_without_a_compiler_there_are_no_kernels(environment, said, tmp_path):
    code = "import logging; logging.basicConfig(); from phinetune.kernels import native; print(native.library('loss'))"
    env = {"PATH": "/usr/bin:/bin", "PHINETUNE_CACHE": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
    if said is None or native.library("loss") is None:
        assert "kernel" not in done.stderr
    else:
        assert said in done.stderr


@pytest.mark.parametrize("knows", [True, False])
def test_a_compiler_older_than_the_processor_writes_for_an_older_one(knows, tmp_path, monkeypatch):
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *avx512bf16*) exit {int(not knows)};; esac\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("PHINETUNE_COMPILE", raising=False)
    for name in native.INSTRUCTIONS:
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: True, raising=False)
    native._are_written.cache_clear()
    try:
        assert native.instructions() == ("avx512_bf16" if knows else "avx2")
    finally:
        native._are_written.cache_clear()


def test_of_what_a_compiler_says_the_error_is_told():
    said = "In file included from here.cpp:1:\nhere.h:3: error: 'x' was not declared"
    with pytest.raises(native._CannotCompile, match="error: 'x' was not declared"):
        native._run([sys.executable, "-c", f"import sys; sys.exit({said!r})"])


def test_torch_without_onednn_has_no_products_in_half_precision(monkeypatch):
    """As it is built for Macs, where oneDNN can't even be asked."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for dtype, is_emulated in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
        assert native.is_emulated.__wrapped__(dtype) == is_emulated


@needs_kernels
def test_a_kernel_that_was_cut_short_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path))
    made = native._compile("loss", torch.bfloat16, native.find_compiler())
    whole = made.stat().st_size
    made.write_bytes(made.read_bytes()[: whole // 2])  # which would end the process, if it were loaded
    assert native._compile("loss", torch.bfloat16, native.find_compiler()) == made
    assert made.stat().st_size == whole
    made.with_suffix(".sha256").write_bytes(b"\xff" * 64)
    old, users, left = (
        tmp_path / "kernels" / f"loss-{'0' * 16}.so",
        tmp_path / "kernels" / "mine.so",
        made.parent / "tmpab",
    )
    old.touch(), users.touch(), left.mkdir()
    for path in (old, users, left):
        os.utime(path, (0, 0))
    assert native._compile("loss", torch.bfloat16, native.find_compiler()) == made
    assert (old.exists(), users.exists(), left.exists()) == (False, True, False), "what nobody used for a month"


def test_a_tensor_that_lies_nowhere_is_not_plain():
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert native.is_plain(torch.ones(2), torch.float32)
    assert native.is_plain(torch.nn.Parameter(torch.ones(2)), torch.float32)
    assert not native.is_plain(torch.ones(2), torch.bfloat16)
    assert not native.is_plain(torch.ones(2, device="meta"), torch.float32)
    with FakeTensorMode():
        assert not native.is_plain(torch.ones(2), torch.float32)


def test_working_memory_of_inference_serves_training():
    with torch.inference_mode():
        loss.linear_cross_entropy_sum(torch.randn(50, 8), torch.randn(3000, 8), torch.arange(50))
    hidden = torch.randn(50, 8, requires_grad=True)
    loss.linear_cross_entropy_sum(hidden, torch.randn(3000, 8), torch.arange(50)).backward()
    assert hidden.grad.norm() > 0
