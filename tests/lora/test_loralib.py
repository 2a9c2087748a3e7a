"""Against the real loralib: the same seed gives the same layer, the same outputs, the same gradients."""

import loralib
import pytest
import torch
from torch import nn

from phinetune import lora


def both(kind, *args, **kwargs):
    layers = []
    for library in (loralib, lora):
        torch.manual_seed(7)
        layers.append(getattr(library, kind)(*args, **kwargs))
    return layers


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("Linear", {"r": 4, "lora_alpha": 8}),
        ("Linear", {"r": 0}),
        ("Linear", {"r": 3, "bias": False}),
        ("MergedLinear", {"r": 4, "lora_alpha": 2, "enable_lora": [True, False, True]}),
        ("MergedLinear", {"r": 2, "enable_lora": [True, True, True]}),
    ],
)
def test_same_seed_same_layer_same_gradients(kind, kwargs):
    theirs, ours = both(kind, 12, 24, **kwargs)
    assert {n: p.shape for n, p in theirs.named_parameters()} == {n: p.shape for n, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name
        assert parameter.requires_grad == ours.get_parameter(name).requires_grad
    if kwargs["r"]:
        for layer in (theirs, ours):
            torch.manual_seed(8)
            nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 12)
    theirs(x).square().sum().backward()
    ours(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-5)


class Guide(nn.Module):
    """The guide's model: loralib layers put in by hand."""

    def __init__(self, library):
        super().__init__()
        self.qkv = library.MergedLinear(16, 48, r=4, enable_lora=[True, False, True])
        self.out = library.Linear(48, 16, r=4)

    def forward(self, x):
        return self.out(torch.tanh(self.qkv(x)))


def test_the_guides_snippet_and_checkpoints_both_ways(tmp_path):
    torch.manual_seed(0)
    model = Guide(lora)
    lora.mark_only_lora_as_trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    pristine = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    x, y = torch.randn(32, 16), torch.randn(32, 16)
    losses = []
    for _ in range(20):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch.save(lora.lora_state_dict(model), tmp_path / "ckpt_lora.pt")

    for library in (lora, loralib):
        other = Guide(library)
        other.load_state_dict(pristine, strict=False)
        other.load_state_dict(torch.load(tmp_path / "ckpt_lora.pt"), strict=False)
        torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-6)
    theirs = Guide(loralib)
    loralib.mark_only_lora_as_trainable(theirs)
    assert loralib.lora_state_dict(theirs).keys() == lora.lora_state_dict(model).keys()


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_same_parameters_train_and_are_saved(bias):
    models = []
    for library in (loralib, lora):
        model = nn.Sequential(library.Linear(4, 4, r=2), nn.Linear(4, 4), nn.LayerNorm(4))
        library.mark_only_lora_as_trainable(model, bias)
        models.append((library, model))
    trained = [{n for n, p in model.named_parameters() if p.requires_grad} for _, model in models]
    assert trained[0] == trained[1]
    saved = [library.lora_state_dict(model, bias).keys() for library, model in models]
    assert saved[0] == saved[1]


def test_a_bad_bias_is_refused_before_anything_is_frozen():
    model = nn.Sequential(lora.Linear(4, 4, r=2))
    with pytest.raises(ValueError, match="bias='some'"):
        lora.mark_only_lora_as_trainable(model, "some")
    assert model[0].bias.requires_grad
