"""The C++ parts of a decoder layer against the same in float64 by torch's own functions and autograd."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from phinetune.kernels import native
from phinetune.layers import blockwise, decoder
from phinetune.lora.functional import Block, Factors, Projection, side_by_side

pytestmark = pytest.mark.skipif(
    native.library("decoder") is None, reason="the C++ kernels need AVX512-BF16 or AVX2 and a C++ compiler"
)
ROUNDED = 1e-2  # of bfloat16, relative by norm
SCALING = 1.7


def linear_of(inputs, outputs, rank, bias=False, dropout=0.0):
    """A layer of bfloat16 with a LoRA update of a rank, or none."""
    updates = ()
    if rank:
        lora_A, lora_B = (0.1 * torch.randn(rank, inputs)), (0.1 * torch.randn(outputs, rank))
        blocks = (Block(slice(0, outputs), slice(0, rank), slice(0, outputs * rank), SCALING),)
        updates = (Factors(lora_A.requires_grad_(), lora_B.requires_grad_(), blocks),)
    weight = (torch.randn(outputs, inputs) * inputs**-0.5).bfloat16()
    return Projection((weight,), (torch.randn(outputs).bfloat16() if bias else None,), updates, dropout)


class Exact:
    """Layers in float64, with parameters of their own."""

    def __init__(self, *layers):
        self.layers = layers
        self.trained = [
            [factor.detach().double().requires_grad_() for factor in layer.factors[:2]] if layer.factors else None
            for layer in layers
        ]

    def __call__(self, number, x):
        layer, trained = self.layers[number], self.trained[number]
        bias = layer.biases[0]
        y = F.linear(x, layer.weights[0].double(), None if bias is None else bias.double())
        return y if trained is None else y + SCALING * F.linear(F.linear(x, trained[0]), trained[1])


def compare(ours, layers, exact, x, dy, y, y64, x64):
    y.backward(dy)
    y64.backward(dy.double())
    assert relative_error(y, y64) < ROUNDED
    assert relative_error(x.grad, x64.grad) < ROUNDED
    for layer, trained in zip(layers, exact.trained, strict=True):
        if trained is not None:
            for factor, factor64 in zip(layer.factors[:2], trained, strict=True):
                assert factor.grad.dtype == torch.float32
                assert relative_error(factor.grad, factor64.grad) < ROUNDED


def inputs(tokens, width):
    x = torch.randn(tokens, width).bfloat16().requires_grad_()
    return x, x.detach().double().requires_grad_()


TOKENS = [1, 2, 95, 97, 400]
RANKS = [(4, 4, 4), (16, 8, 3), (0, 8, 0), (20, 5, 33), (0, 0, 0)]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("ranks", RANKS)
def test_norm_and_layers_side_by_side(tokens, ranks):
    torch.manual_seed(0)
    layers = [linear_of(64, n, r, bias=True) for n, r in zip((96, 32, 48), ranks, strict=True)]
    weight, (x, x64) = torch.rand(64).bfloat16(), inputs(tokens, 64)
    together = side_by_side(layers)
    assert blockwise.serves(x, together)
    y = decoder.norm_linears(x, weight, 1e-5, together)
    exact = Exact(*layers)
    normed = F.rms_norm(x64, (64,), weight.double(), 1e-5)
    y64 = torch.cat([exact(i, normed) for i in range(3)], -1)
    compare(y, layers, exact, x, torch.randn_like(y), y, y64, x64)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("tokens", TOKENS)
def test_norm_by_itself(tokens, threads):
    torch.manual_seed(0)
    weight, (x, x64) = torch.rand(80).bfloat16(), inputs(tokens, 80)
    assert blockwise.serves_norm(x, weight)
    y, y64 = blockwise.rms_norm(x, weight, 1e-5), F.rms_norm(x64, (80,), weight.double(), 1e-5)
    compare(y, [], Exact(), x, torch.randn_like(y), y, y64, x64)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("rank", [0, 7, 16])
def test_layer_and_residual(tokens, rank):
    check_layer_and_residual(tokens, rank)


@pytest.mark.parametrize("threads", [2, 3], indirect=True)
def test_layers_by_several_threads(threads):
    for tokens in (400, 1, 2, 7):
        check_layer_and_residual(tokens, 7)
    test_norm_and_layers_side_by_side(97, (20, 5, 33))


@pytest.mark.parametrize("default_dtype", [torch.bfloat16, torch.float64], indirect=True)
def test_a_callers_default_dtype_is_nothing_to_kernels(default_dtype):
    torch.manual_seed(0)
    layer = linear_of(80, 64, 16)
    lora_A, lora_B = (factor.detach().float().requires_grad_() for factor in layer.trained)
    given = layer._replace(updates=(layer.factors._replace(lora_A=lora_A, lora_B=lora_B),))
    (x, x64), (residual, residual64) = inputs(400, 80), inputs(400, 64)
    y = decoder.linear_add(x, residual, given)
    exact = Exact(given)
    compare(y, [given], exact, x, torch.randn_like(y), y, exact(0, x64) + residual64, x64)


def check_layer_and_residual(tokens, rank):
    torch.manual_seed(0)
    layer, (x, x64) = linear_of(80, 64, rank), inputs(tokens, 80)
    residual, residual64 = inputs(tokens, 64)
    y = decoder.linear_add(x, residual, layer)
    exact, dy = Exact(layer), torch.randn_like(y)
    compare(y, [layer], exact, x, dy, y, exact(0, x64) + residual64, x64)
    assert torch.equal(residual.grad, dy)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("ranks", [(8, 8, 8), (0, 4, 17), (0, 0, 0)])
def test_norm_and_gated_mlp(tokens, ranks):
    torch.manual_seed(0)
    sizes = [(64, 160), (64, 160), (160, 64)]
    layers = [linear_of(*size, r) for size, r in zip(sizes, ranks, strict=True)]
    weight, (x, x64) = torch.rand(64).bfloat16(), inputs(tokens, 64)
    y = decoder.norm_gated_mlp(x, weight, 1e-5, side_by_side(layers[:2]), layers[2])
    exact = Exact(*layers)
    normed = F.rms_norm(x64, (64,), weight.double(), 1e-5)
    y64 = x64 + exact(2, F.silu(exact(0, normed)) * exact(1, normed))
    compare(y, layers, exact, x, torch.randn_like(y), y, y64, x64)


def test_blocks_of_a_fused_layer_and_several_adapters():
    """Two updates on the same rows of y, one on others, none on the rest; B's elements in any order."""
    torch.manual_seed(0)
    lora_A, lora_B = (
        (0.1 * torch.randn(11, 64)).requires_grad_(),
        (0.1 * torch.randn(16 * 4 + 16 * 5 + 32 * 2)).requires_grad_(),
    )
    blocks = (
        Block(slice(0, 16), slice(4, 9), slice(0, 80), 0.5),
        Block(slice(0, 16), slice(0, 4), slice(80, 144), 2.0),
        Block(slice(32, 64), slice(9, 11), slice(144, 208), 1.0),
    )
    layer = Projection(((torch.randn(80, 64) * 0.1).bfloat16(),), (None,), (Factors(lora_A, lora_B, blocks),))
    x, x64 = inputs(50, 64)
    residual = torch.zeros(50, 80).bfloat16()
    assert blockwise.serves(x, layer)
    y = decoder.linear_add(x, residual, layer)
    A64, B64 = lora_A.detach().double().requires_grad_(), lora_B.detach().double().requires_grad_()
    y64 = F.linear(x64, layer.weights[0].double())
    for out, a, b, scaling in blocks:
        update = scaling * x64 @ A64[a].T @ B64[b].view(-1, a.stop - a.start).T
        y64 = y64 + F.pad(update, (out.start, 80 - out.stop))
    dy = torch.randn_like(y)
    y.backward(dy)
    y64.backward(dy.double())
    pairs = [(y, y64), (x.grad, x64.grad), (lora_A.grad, A64.grad), (lora_B.grad, B64.grad)]
    assert all(relative_error(one, other) < ROUNDED for one, other in pairs)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(monkeypatch, p):
    """The masks are the plain way's, from the same generator."""
    torch.manual_seed(0)
    sizes = [(64, 160), (64, 160), (160, 64)]
    layers = [linear_of(*size, 8, dropout=p) for size in sizes]
    weight, x = torch.rand(64).bfloat16(), torch.randn(301, 64).bfloat16()
    dy, results = torch.randn_like(x), []
    for plain in (False, True):
        monkeypatch.setattr(blockwise, "holds", lambda elements, plain=plain: not plain)
        for layer in layers:
            layer.factors.lora_A.grad = layer.factors.lora_B.grad = None
        own = x.clone().requires_grad_()
        torch.manual_seed(5)
        hidden = decoder.norm_linears(own, weight, 1e-5, side_by_side(layers[:2]))
        y = decoder.norm_gated_mlp(own, weight, 1e-5, side_by_side(layers[:2]), layers[2])
        (y.float() @ dy.float().T).diagonal().sum().backward(retain_graph=True)
        hidden.backward(torch.ones_like(hidden))
        results.append([hidden, y, own.grad, *(f.grad.clone() for layer in layers for f in layer.factors[:2])])
    for ours, plain in zip(*results, strict=True):
        assert relative_error(ours, plain.double()) < ROUNDED


def test_no_gradient_below_the_first_adapted_layer():
    torch.manual_seed(0)
    layer = linear_of(64, 96, 4)
    x = torch.randn(10, 64).bfloat16()
    decoder.norm_linears(x, torch.ones(64).bfloat16(), 1e-5, layer).sum().backward()
    assert layer.factors.lora_B.grad.norm() > 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_again_and_any_number_of_threads(threads):
    torch.manual_seed(0)
    layers = [linear_of(64, 160, 8), linear_of(64, 160, 8), linear_of(160, 64, 8)]
    weight, x, dy = torch.rand(64).bfloat16(), torch.randn(333, 64).bfloat16(), torch.randn(333, 64).bfloat16()
    before, results = torch.get_num_threads(), []
    for count in (threads, threads, 1):
        torch.set_num_threads(count)
        own = x.clone().requires_grad_()
        for layer in layers:
            layer.factors.lora_A.grad = layer.factors.lora_B.grad = None
        decoder.norm_gated_mlp(own, weight, 1e-5, side_by_side(layers[:2]), layers[2]).backward(dy)
        results.append([own.grad, *(f.grad.clone() for layer in layers for f in layer.factors[:2])])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert all(relative_error(a, b.double()) < 1e-5 for a, b in zip(results[0], results[2], strict=True))


def test_what_it_is_not_for():
    layer, x = linear_of(64, 96, 4), torch.randn(3, 64).bfloat16()
    assert blockwise.serves(x, layer)
    assert not blockwise.serves(x.float(), layer)
    assert not blockwise.serves(x, linear_of(64, 90, 4))
    assert not blockwise.serves(x, layer._replace(weights=(layer.weights[0].float(),)))
    assert not blockwise.serves(x, layer._replace(weights=(layer.weights[0].T.contiguous().T,)))
    weight, learns = torch.rand(64).bfloat16(), x.clone().requires_grad_()
    assert blockwise.serves_norm(learns, weight)
    assert not blockwise.serves_norm(x, weight)
    assert not blockwise.serves_norm(learns, weight.clone().requires_grad_())
    assert not blockwise.serves_norm(learns, torch.rand(64))
    with torch.no_grad():
        assert not blockwise.serves_norm(learns, weight)
    across = Block(slice(8, 24), slice(0, 4), slice(0, 64), 1.0)  # over two groups of columns, in parts
    assert not blockwise.serves(x, layer._replace(updates=(layer.factors._replace(blocks=(across,)),)))


REFUSED = """
import resource
from pathlib import Path
import torch
from phinetune.layers import blockwise, decoder
from phinetune.lora.functional import Projection, side_by_side

def layers(width, inner):
    sizes = (inner, width), (inner, width), (width, inner)
    gate, up, down = (Projection(((torch.randn(n, k) / 99).bfloat16(),), (None,)) for n, k in sizes)
    x, weight = torch.randn(8, width).bfloat16(), torch.ones(width).bfloat16()
    assert blockwise.serves(x, side_by_side([gate, up]), down)
    return lambda: decoder.norm_gated_mlp(x, weight, 1e-5, side_by_side([gate, up]), down)

small, large = layers(64, 160), layers(768, 2048)
small()  # threads have their stacks
used = 1024 * int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (used, resource.RLIM_INFINITY))
try:
    large()  # what is laid out takes 9 MB and more
    raise SystemExit("it was not refused")
except MemoryError as error:
    assert "mlp_forward" in str(error)
assert small().isfinite().all()
resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.equal(large(), large())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA is Linux's")
def test_refused_memory_is_an_error_and_nothing_else():
    ran = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
