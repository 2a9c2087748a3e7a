"""int8 products against whole-number and float64 arithmetic, and the weight's behaviour as a parameter."""

import copy
import io
import pickle

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from phinetune.kernels import compiled, int8

REAL_IS_FAST = int8._is_fast  # which tests put aside

SIZES = [1, 3, 4, 7, 8, 9, 16, 64, 65, 130]


@pytest.fixture(autouse=True, scope="module")
def _products_in_int8():
    """On processors, too, that are slow in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "_is_fast", lambda: True)
        yield


@settings(max_examples=60, deadline=None)
@given(m=st.sampled_from([0, *SIZES]), k=st.sampled_from([*SIZES[1:], 3072]), n=st.sampled_from(SIZES))
def test_torch_multiplies_whole_numbers_exactly_in_every_shape_where_it_does_in_one(m, k, n):
    """One is what `_is_exact` looks at, before torch's products are used."""
    if not int8._is_exact():
        pytest.skip("this build of torch multiplies int8 matrices wrongly: its products aren't used")
    a, b = torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.randint(-128, 128, (n, k), dtype=torch.int8)
    for b_KN in (b.T, b.T.contiguous()):
        assert torch.equal(torch._int_mm(a, b_KN).long(), a.long() @ b.long().T)


@settings(max_examples=60, deadline=None)
@given(t=st.sampled_from([0, *SIZES]), k=st.sampled_from(SIZES), n=st.sampled_from(SIZES))
def test_whole_numbers_come_out_exactly_both_ways(t, k, n):
    """What lies on its grid loses nothing: weights of whole numbers up to 127, inputs of -3, 0 and 3."""
    weight = torch.randint(-127, 128, (n, k))
    weight[:, 0] = 127
    x, dy = 3 * torch.randint(-1, 2, (t, k)), 3 * torch.randint(-1, 2, (t, n))
    quantised = int8.quantise(weight.float())
    assert torch.equal(quantised.codes.long(), weight)
    assert torch.equal(quantised.dequantise(), weight.float())
    for y, exact in [
        (int8.linear(x.float(), quantised), x @ weight.T),
        (int8.input_gradient(dy.float(), quantised), dy @ weight),
    ]:
        assert torch.allclose(y.double(), exact.double(), rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_is_at_most_half_a_step(dtype):
    torch.manual_seed(0)
    weight = torch.randn(40, 50).to(dtype)
    weight[3] = 0
    quantised = int8.quantise(weight)
    assert quantised.dtype == dtype
    assert quantised.codes.dtype == torch.int8
    error = (quantised.dequantise(torch.float64) - weight.double()).abs().amax(1)
    assert (error <= weight.double().abs().amax(1) / 254 * 1.0001).all()
    assert not quantised.dequantise()[3].any()


@pytest.mark.parametrize("shape", [(300, 512, 200), (3, 512, 192), (2, 512, 200), (2500, 96, 80)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_of_output_and_gradient(shape, dtype, monkeypatch):
    monkeypatch.setattr(int8, "CELL", 5_000)  # several cells
    torch.manual_seed(0)
    t, k, n = shape
    weight, bias = torch.randn(n, k).mul_(torch.rand(n, 1)).to(dtype), torch.randn(n).to(dtype)
    x, dy = torch.randn(t, k).to(dtype).requires_grad_(), torch.randn(t, n).to(dtype)
    quantised = int8.quantise(weight)
    y = int8.linear(x, quantised, bias)
    y.backward(dy)
    assert y.dtype == dtype
    assert relative_error(y.detach(), x.detach().double() @ weight.double().T + bias.double()) < 0.016
    assert relative_error(x.grad, dy.double() @ weight.double()) < 0.018
    with torch.no_grad():
        assert torch.equal(int8.linear(x, quantised, bias), y)
        plain = int8.linear_reference(x, quantised, bias)
        assert relative_error(plain, x.double() @ quantised.dequantise(torch.float64).T + bias.double()) < 0.005


def test_bias_alone_has_a_gradient():
    bias = torch.zeros(6, requires_grad=True)
    int8.linear(torch.randn(5, 4), int8.quantise(torch.randn(6, 4)), bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 5.0))


@pytest.mark.parametrize("factor", [50, 1000])
def test_four_columns_that_stand_out_do_no_harm(factor):
    torch.manual_seed(0)
    weight, x, dy = torch.randn(256, 3072).bfloat16(), torch.randn(512, 3072), torch.randn(512, 256)
    quantised = int8.quantise(weight)
    x[:, [0, 777, 1500, 3071]] *= factor
    dy[:, [0, 100, 101, 255]] *= factor
    x, dy = x.bfloat16(), dy.bfloat16()
    exact = x.double() @ weight.double().T
    assert relative_error(int8.linear(x, quantised), exact) < 0.02
    assert int8.relative_error(x, weight, quantised) == pytest.approx(
        relative_error(int8.linear(x, quantised), exact), rel=1e-2
    )
    assert relative_error(int8.input_gradient(dy, quantised), dy.double() @ weight.double()) < 0.02
    # What the rest of x adds is right too, and not only what is large.
    rest = x.clone()
    rest[:, [0, 777, 1500, 3071]] = 0
    large = (x - rest).double() @ quantised.dequantise(torch.float64).T
    assert relative_error(int8.linear(x.float(), quantised) - large, rest.double() @ weight.double().T) < 0.016


def test_a_token_that_stands_out_is_its_own_matter():
    torch.manual_seed(0)
    weight, x = torch.randn(64, 512), torch.randn(200, 512)
    x[37] *= 1e4
    x[38, 5] = 1e4
    errors = (int8.linear(x, int8.quantise(weight)) - x @ weight.T).norm(dim=1) / (x @ weight.T).norm(dim=1)
    assert errors.max() < 0.02


def test_what_is_not_finite_stays_so_and_in_its_row():
    x = torch.randn(100, 64)
    x[10, 3], x[90, 4] = float("nan"), float("inf")
    y = int8.linear(x, int8.quantise(torch.randn(32, 64)))
    finite = y.isfinite().all(1)
    assert not finite[10] and not finite[90]
    assert finite.sum() == 98


def test_rows_of_zeros_give_zeros():
    quantised = int8.quantise(torch.randn(8, 16))
    assert not int8.linear(torch.zeros(20, 16), quantised).any()
    assert not int8.input_gradient(torch.zeros(20, 8), quantised).any()
    assert int8.relative_error(torch.zeros(20, 16), torch.randn(8, 16), quantised) == 0


def test_any_layout_of_x():
    weight, x = int8.quantise(torch.randn(24, 40)), torch.randn(40, 90)
    assert torch.equal(int8.linear(x.T, weight), int8.linear(x.T.contiguous(), weight))
    wide = torch.randn(90, 80)
    assert torch.equal(int8.linear(wide[:, 20:60], weight), int8.linear(wide[:, 20:60].clone(), weight))
    plain = torch.randn(24, 40)
    assert torch.equal(int8.quantise(plain.T).codes, int8.quantise(plain.T.contiguous()).codes)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, when it imports its compiler
def test_compiled_passes_give_what_the_plain_ones_do(monkeypatch):
    """And another number of tokens compiles nothing new, after the first few."""
    compiled.can_compile.cache_clear()
    if not compiled.can_compile():
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    weight = int8.quantise(torch.randn(320, 640).bfloat16())
    fast, graphs = [], []
    inputs = [
        (torch.randn(t, 640).bfloat16(), torch.randn(t, 320).bfloat16()) for t in (600, 700, 2500, 801, 999, 4100)
    ]
    for x, dy in inputs:
        fast.append((int8.linear(x, weight), int8.input_gradient(dy, weight)))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[2]
    monkeypatch.setattr(compiled, "SMALLEST", 1 << 40)
    for (x, dy), (y, dx) in zip(inputs, fast, strict=True):
        assert relative_error(y, int8.linear(x, weight).double()) < 1e-3
        assert relative_error(dx, int8.input_gradient(dy, weight).double()) < 1e-3


def test_builds_that_multiply_wrongly_are_found_and_done_without(monkeypatch, caplog):
    right = torch._int_mm

    def saturating(a, b, **given):
        return right(a, b, **given).clamp(-(1 << 15), (1 << 15) - 1)

    torch.manual_seed(0)
    weight, x, dy = torch.randn(64, 128), torch.randn(30, 128), torch.randn(30, 64)
    monkeypatch.setattr(torch, "_int_mm", saturating)
    int8._is_exact.cache_clear()
    try:
        quantised = int8.quantise(weight)
        dequantised = quantised.dequantise(torch.float64)
        assert relative_error(int8.linear(x, quantised), x.double() @ dequantised.T) < 1e-5
        assert relative_error(int8.input_gradient(dy, quantised), dy.double() @ dequantised) < 1e-5
        assert "wrongly" in caplog.text
    finally:
        int8._is_exact.cache_clear()


def test_processors_that_are_slow_in_int8_multiply_dequantised_weights(monkeypatch):
    torch.manual_seed(0)
    weight, x, dy = torch.randn(64, 128), torch.randn(30, 128), torch.randn(30, 64)
    monkeypatch.setattr(int8, "_is_fast", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    quantised = int8.quantise(weight)
    dequantised = quantised.dequantise(torch.float64)
    assert relative_error(int8.linear(x, quantised), x.double() @ dequantised.T) < 1e-6
    assert relative_error(int8.input_gradient(dy, quantised), dy.double() @ dequantised) < 1e-6


# As a parameter --------------------------------------------------------------------------------------------


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight = nn.Parameter(int8.quantise(layer.weight), requires_grad=False)
    return layer


def test_half_the_memory_of_bfloat16():
    weight = torch.randn(256, 3072).bfloat16()
    quantised = int8.quantise(weight)
    assert 0.5 * weight.nbytes < quantised.nbytes < 0.502 * weight.nbytes
    assert quantised.nbytes == quantised.codes.untyped_storage().nbytes() + quantised.scale.untyped_storage().nbytes()
    assert (quantised.shape, quantised.dtype, quantised.device) == (weight.shape, weight.dtype, weight.device)


def test_a_plain_linear_layer_runs_on_it(layer):
    x = torch.randn(2, 5, 64).bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    weight = layer.weight.dequantise(torch.float64)
    assert y.shape == (2, 5, 48)
    assert relative_error(y.detach(), x.detach().double() @ weight.T + layer.bias.double()) < 0.01
    assert relative_error(x.grad, torch.ones(2, 5, 48).double() @ weight) < 0.01
    assert layer.weight.grad is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x.detach().float()), layer(x.detach()))
    assert layer(torch.zeros(0, 64).bfloat16()).shape == (0, 48)
    vector = torch.randn(64).bfloat16()
    assert torch.equal(layer(vector), layer(vector[None])[0])
    square = int8.quantise(torch.eye(4))
    assert torch.equal(nn.functional.linear(square, torch.eye(4)), torch.eye(4))


def is_int8(weight):
    return type(weight) is int8.Int8Weight and weight.codes.dtype == torch.int8


def test_copies_stay_int8_and_share_nothing(layer):
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)["weight"]
    copies = [copy.deepcopy(layer).weight, pickle.loads(pickle.dumps(layer)).weight, saved, layer.weight.clone()]
    for weight in copies:
        assert is_int8(weight)
        assert weight.dtype == torch.bfloat16
        assert not weight.requires_grad
        assert torch.equal(weight.codes, layer.weight.codes) and torch.equal(weight.scale, layer.weight.scale)
        assert weight.codes.data_ptr() != layer.weight.codes.data_ptr()
    assert all(isinstance(weight, nn.Parameter) for weight in copies[:2])
    shared = copy.deepcopy(nn.ModuleList([layer, layer]))
    assert shared[0].weight is shared[1].weight
    detached = layer.weight.detach()
    assert is_int8(detached) and detached.codes.data_ptr() == layer.weight.codes.data_ptr()


def test_a_state_dict_loads_from_int8_and_from_plain(layer):
    other = copy.deepcopy(layer)
    other.load_state_dict({"weight": torch.randn(48, 64), "bias": layer.bias})
    assert is_int8(other.weight)
    assert not torch.equal(other.weight.codes, layer.weight.codes)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight.codes, layer.weight.codes)
    plain = nn.Linear(64, 48)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain.weight, layer.weight.dequantise().float())


def test_moves(layer):
    assert layer.to("cpu").weight.codes.device.type == "cpu"
    assert is_int8(layer.to(torch.bfloat16).weight)
    codes = layer.weight.codes.clone()
    layer.float()
    assert is_int8(layer.weight)
    assert layer.weight.dtype == torch.float32
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer.weight.codes, codes)
    assert layer(torch.randn(3, 64)).dtype == torch.float32
    assert copy.deepcopy(layer).to("meta").weight.codes.is_meta


def test_everything_else_is_done_on_the_plain_weight(layer):
    weight = layer.weight
    plain = weight.dequantise()
    for got, expected in [
        (weight.float(), weight.dequantise(torch.float32)),
        (weight.T, plain.T),
        (weight + 1, plain + 1),
        (plain @ weight.T, plain @ plain.T),
        (weight[3:5], plain[3:5]),
        (torch.cat([weight, weight]), torch.cat([plain, plain])),
        (weight.norm(), plain.norm()),
    ]:
        assert type(got) is torch.Tensor
        assert torch.equal(got, expected)
    assert "Int8Weight((48, 64)" in repr(weight)
    assert repr(layer) == "Linear(in_features=64, out_features=48, bias=True)"


def test_it_can_not_be_written_to(layer):
    weight, other = layer.weight.detach(), torch.ones(48, 64).bfloat16()

    def set_item():
        weight[0] = 1

    for write in (weight.zero_, lambda: weight.add_(1), lambda: torch.add(other, other, out=weight), set_item):
        with pytest.raises(RuntimeError, match=r"can't be written to; dequantise\(\)"):
            write()
    weight.copy_(other)
    assert torch.equal(weight.dequantise(), other)


@pytest.mark.parametrize(("seconds_of_int8", "fast"), [([9.0, 9.0, 0.5], True), ([9.0, 0.5], True), ([30.0], False)])
def test_a_processor_is_slow_in_int8_only_if_it_never_was_fast(seconds_of_int8, fast, monkeypatch):
    """Beside another process a product took 30 times as long, and all of a run its slow way."""
    given, asked = iter(seconds_of_int8), []

    def timed(multiply, number):
        asked.append(multiply)
        return next(given, seconds_of_int8[-1]) if len(asked) % 2 else 1.0  # in turns with floats

    monkeypatch.setattr(int8.timeit, "timeit", timed)
    assert REAL_IS_FAST.__wrapped__() is fast
