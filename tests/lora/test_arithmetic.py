"""The LoRA products against a dense reference in float64, written out by hand."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import nn

from phinetune import lora
from phinetune.lora.functional import Block, Factors, lora_linear, low_rank

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fan_in_fan_out", [True, False])
@pytest.mark.parametrize(
    ("splits", "enabled"),
    [(None, None), ([6, 6, 6], [1, 0, 1]), ([12, 3, 3], [True, True, True]), ([12, 3, 3], [0, 0, 1])],
)
def test_outputs_and_gradients_equal_the_dense_reference(dtype, bias, fan_in_fan_out, splits, enabled):
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": fan_in_fan_out, "bias": bias, "dtype": dtype}
    if splits is None:
        layer = lora.Linear(10, 18, **options)
        spans = [(0, 18)]
    else:
        layer = lora.MergedLinear(10, 18, enable_lora=enabled, out_splits=splits, **options)
        starts = [sum(splits[:i]) for i in range(len(splits))]
        spans = [(s, s + n) for s, n, on in zip(starts, splits, enabled, strict=True) if on]
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 3, 10, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 3, 18, dtype=dtype)
    y = layer(x)
    y.backward(dy)

    # W + ΔW, block by block, in float64
    A, B = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    weight = layer.weight.detach().double()
    rows, delta = 0, []
    for i, (start, end) in enumerate(spans):
        block = torch.zeros(18, 10, dtype=torch.float64)
        product = 6 / 4 * B[rows : rows + end - start] @ A[4 * i : 4 * i + 4]
        delta.append(torch.cat([block[:start], product, block[end:]]))
        rows += end - start
    x64 = x.detach().double().requires_grad_()
    dense = (weight.T if fan_in_fan_out else weight) + sum(delta)
    reference = x64 @ dense.T + (layer.bias.detach().double() if bias else 0)
    reference.backward(dy.double())

    assert relative_error(y, reference) < TOLERANCE[dtype]
    assert relative_error(x.grad, x64.grad) < TOLERANCE[dtype]
    assert relative_error(layer.lora_A.grad, A.grad) < TOLERANCE[dtype]
    assert relative_error(layer.lora_B.grad, B.grad) < TOLERANCE[dtype]
    assert layer.weight.grad is None
    if bias:
        assert relative_error(layer.bias.grad, dy.double().sum((0, 1))) < TOLERANCE[dtype]


def test_merging_gives_the_same_output_and_leaves_the_base_bit_equal():
    layer = lora.MergedLinear(32, 48, r=4, enable_lora=[True, False, True], dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.lora_B)
    base, x = layer.weight.detach().clone(), torch.randn(5, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        unmerged = layer(x)
        for _ in range(100):
            merged = layer.eval()(x)
            layer.train()
    assert relative_error(merged, unmerged) < 2e-2
    assert torch.equal(layer.weight, base)
    assert torch.equal(layer.eval().state_dict()["weight"], base)


def test_a_merged_layer_follows_weights_that_are_loaded():
    layer = lora.Linear(8, 8, r=2).eval()
    other = lora.Linear(8, 8, r=2)
    torch.nn.init.normal_(other.lora_B)
    layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), other(x))


def test_a_merged_layer_still_gives_its_adapter_a_gradient():
    layer = lora.Linear(8, 8, r=2).eval()
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.lora_B.grad is not None
    assert layer.lora_B.grad.norm() > 0


def test_dropout_drops_the_inputs_of_A_alone_and_scales_the_rest():
    torch.manual_seed(0)
    layer = lora.Linear(64, 64, r=64, lora_alpha=64, lora_dropout=0.25, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(64))
        layer.lora_B.copy_(torch.eye(64))
    x = torch.ones(1000, 64, requires_grad=True)
    y = layer(x)
    assert y.detach().unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, y.detach())  # the same elements, the same factor
    assert torch.equal(layer.eval()(x), x)


def test_a_changed_base_weight_is_an_error_in_the_backward_pass_and_not_a_wrong_gradient():
    layer = lora.Linear(8, 8, r=2)
    y = layer(torch.randn(3, 8, requires_grad=True))
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("settings", [{"r": 3}, {"r": 2, "enable_lora": [1, 0, 1], "out_splits": [4, 2, 3]}])
def test_lora_B_learns_and_is_written_whatever_its_strides(settings):
    """As `u[:, :r] * s[:r]` of an SVD leaves it, and `nn.Parameter(t.T)`."""

    def made():
        torch.manual_seed(0)
        layer = (lora.MergedLinear if "enable_lora" in settings else lora.Linear)(8, 9, **settings)
        nn.init.normal_(layer.lora_B)
        return layer

    plain, strided = made(), made()
    strided.lora_B.data = strided.lora_B.data.T.contiguous().T
    assert not strided.lora_B.is_contiguous()
    x = torch.randn(4, 8)
    for layer in (plain, strided):
        layer(x).square().sum().backward()
    assert plain.lora_B.grad.norm() > 0
    torch.testing.assert_close(strided.lora_B.grad, plain.lora_B.grad)

    product = plain.product()
    lora_A, lora_B = torch.randn(product.lora_A.shape), torch.randn(product.lora_B.shape)
    for layer in (plain, strided):
        layer.load_product("default", lora_A, lora_B)
    assert torch.equal(strided.lora_B, plain.lora_B)
    assert not torch.equal(plain.product().lora_B, product.lora_B)
    for init_lora_weights in (False, "pissa"):
        for layer in (plain, strided):
            layer.adapters["default"].init_lora_weights = init_lora_weights
            torch.manual_seed(1)
            with torch.no_grad():
                layer._initialise("default")
        assert torch.equal(strided.lora_B, plain.lora_B)
        assert strided.lora_B.abs().min() > 0


def test_a_product_is_detached():
    for layer in (
        lora.Linear(8, 6, r=2),
        lora.Linear(8, 6, r=2, init_lora_weights="pissa"),
        lora.MergedLinear(8, 6, r=2, enable_lora=[1, 0]),
        lora.Embedding(8, 6, r=2),
        lora.Conv2d(8, 6, 3, r=2, layout="peft"),
    ):
        product = layer.product()
        assert not product.lora_A.requires_grad
        assert not product.lora_B.requires_grad


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_gradients_have_gradients_too(dropout_p):
    """torch's own finite differences are the reference, for every input, in blocks that share rows and in those that
    don't."""
    torch.manual_seed(0)
    blocks = (
        Block(slice(0, 3), slice(0, 2), slice(0, 6), 0.5),
        Block(slice(5, 6), slice(2, 3), slice(6, 7), -2.0),
        Block(slice(1, 6), slice(3, 5), slice(7, 17), 1.5),
    )
    shapes = {"x": (2, 3, 4), "weight": (6, 4), "bias": (6,), "lora_A": (5, 4), "lora_B": (17,)}
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values()]

    def layer(x, weight, bias, lora_A, lora_B):
        torch.manual_seed(1)  # the same elements are dropped
        return lora_linear(x, weight, bias, Factors(lora_A, lora_B, blocks), dropout_p)

    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


def test_low_rank_is_the_fast_paths_reference():
    torch.manual_seed(0)
    blocks = Block(slice(0, 4), slice(0, 2), slice(0, 8), 0.5), Block(slice(2, 6), slice(2, 3), slice(8, 12), 2.0)
    x, weight, factors = torch.randn(3, 5), torch.randn(6, 5), Factors(torch.randn(3, 5), torch.randn(12), blocks)
    A, B = factors.lora_A, factors.lora_B
    expected = torch.zeros(3, 6)
    expected[:, :4] += 0.5 * x @ A[:2].T @ B[:8].view(4, 2).T
    expected[:, 2:] += 2 * x @ A[2:].T @ B[8:].view(4, 1).T
    torch.testing.assert_close(low_rank(x, factors, 6), expected)
    torch.testing.assert_close(lora_linear(x, weight, None, factors), F.linear(x, weight) + expected)


@pytest.mark.parametrize("bad", [{"r": -1}, {"r": 2, "lora_dropout": 1.0}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=r"r=|lora_dropout="):
        lora.Linear(4, 4, **bad)


def test_splits_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="add up to out_features=10"):
        lora.MergedLinear(4, 10, r=2, enable_lora=[True, True], out_splits=[4, 4])
