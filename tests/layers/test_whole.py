"""Decoder layers in bfloat16 as one function: against transformers' in float64, and against themselves in parts."""

import copy

import pytest
import torch
from conftest import draw_lora_B, relative_error, tiny_model

from phinetune import lora
from phinetune.data import Example, lay_out
from phinetune.kernels import native
from phinetune.layers import fast, ready, whole
from phinetune.model import fused_parts, loss_sum

pytestmark = pytest.mark.skipif(
    native.library("decoder") is None, reason="the C++ kernels need AVX512-BF16 or AVX2 and a C++ compiler"
)
FAMILIES = ["llama", "mistral", "phi3", "qwen2"]
TARGETS = {
    "all-linear": {"target_modules": "all-linear"},
    "of the MLP alone": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "o alone": {"target_modules": ["o_proj"]},
    "behind the first layer": {"target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [1]},
}
ROUNDED = 3e-2  # of bfloat16, through two layers, relative by norm


@pytest.fixture
def taken(monkeypatch):
    """How many layers were computed as a whole."""
    calls, compute = [], whole.decoder_layer
    monkeypatch.setattr(whole, "decoder_layer", lambda *given: calls.append(1) or compute(*given))
    return calls


def rows():
    torch.manual_seed(3)
    drawn = [torch.randint(3, 500, (n,)).tolist() for n in (70, 17, 130, 9, 2)]
    drawn += [list(range(50, 80)) + row for row in drawn[:3]]
    return [Example(f"row {i}", ids, [j > len(ids) // 3 for j in range(len(ids))]) for i, ids in enumerate(drawn)]


def adapted(family, **settings):
    """In bfloat16, with adapters in float32."""
    model = tiny_model(family).bfloat16()
    lora.adapt(model, r=4, fused=fused_parts(model.config), **settings)
    draw_lora_B(model, std=0.1)
    return model


def gradients(model, batches):
    total = 0.0
    model.zero_grad()
    for batch in batches:
        loss = loss_sum(model, batch)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, targets, taken, monkeypatch):
    model = adapted(family, **targets)
    exact = copy.deepcopy(model).double()
    fast.install(model)
    expected, of_exact = gradients(exact, lay_out(rows(), 1))  # a row at a time
    for batches in (lay_out(rows(), 100, None, 1 << 30), lay_out(rows(), 10_000, None, 4)):
        taken.clear()
        loss, of_whole = gradients(model, batches)
        assert len(taken) == 2 * len(batches)
        with monkeypatch.context() as patch:
            patch.setattr(ready.Ready, "serves", lambda self, x_TD: False)
            in_parts, of_parts = gradients(model, batches)
        assert loss == in_parts, "the forward pass is the same to the bit"
        assert loss == pytest.approx(expected, rel=ROUNDED)
        assert of_whole.keys() == of_exact.keys()
        for name, gradient in of_whole.items():
            error = relative_error(gradient, of_exact[name])
            # A residual's gradient is rounded once less than in parts.
            assert error < max(ROUNDED, 1.5 * relative_error(of_parts[name], of_exact[name])), name


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_is_kept_may_be_given_back_elsewhere(p, taken):
    """By a checkpoint, which makes it again, and by hooks that move it."""
    model = adapted("llama", **TARGETS["all-linear"], lora_dropout=p)
    fast.install(model)
    model.train()
    batches = lay_out(rows(), 10_000, None, 4)
    torch.manual_seed(5)
    loss, expected = gradients(model, batches)
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        assert_same((loss, expected), gradients(model, batches))
    model.activation_checkpointing_enable({"use_reentrant": False})
    taken.clear()
    torch.manual_seed(5)
    assert_same((loss, expected), gradients(model, batches))
    assert len(taken) == 4 * len(batches), "each layer twice"


def assert_same(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert torch.equal(gradient, other[1][name]), name


def test_what_trains_must_not_change_meanwhile():
    model = adapted("llama", **TARGETS["all-linear"])
    fast.install(model)
    (batch,) = lay_out(rows(), 10_000)
    loss = loss_sum(model, batch)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_layers_look_at_themselves_once_while_nothing_changes(monkeypatch):
    model = adapted("llama", **TARGETS["all-linear"])
    fast.install(model)
    batches = lay_out(rows(), 100)
    looked, look = [], fast.FastLayer._parts
    monkeypatch.setattr(fast.FastLayer, "_parts", lambda *given: looked.append(1) or look(*given))
    expected = gradients(model, batches)
    assert len(looked) == 2 * len(batches) > 2
    looked.clear()
    with fast.settled(model):
        assert_same(expected, gradients(model, batches))
        assert len(looked) == 2
        with torch.no_grad():  # is another matter: what is merged may be read then
            loss_sum(model, batches[0])
        assert len(looked) == 4

    seen, mlp = [], model.model.layers[0].mlp
    mlp.register_forward_hook(lambda module, given, out: seen.append(1))
    with pytest.raises(KeyboardInterrupt), fast.settled(model):
        raise KeyboardInterrupt
    loss_sum(model, batches[0])
    assert seen == [1]
