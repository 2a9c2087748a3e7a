"""In bfloat16 an update that is smaller than the rounding of the base's product is in their sum all the same.

Early in training updates are that small.  PEFT's layer, which adds them to a product that is rounded already, is here
to show that the measure tells the difference.
"""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from phinetune import lora
from phinetune.kernels import bnb, int8
from phinetune.layers import blockwise, decoder
from phinetune.layers.projection import projection_of

TOKENS, K, N, R = 1024, 256, 384, 8
SIZE_OF_B = 1e-4  # the update is about 0.0006 beside outputs around one, whose last place is 0.004 to 0.008
BASES = ["plain", "bias", "nf4", "8 bits", "int8"]


def base_layer(kind):
    layer = nn.Linear(K, N, bias=kind == "bias")
    nn.init.normal_(layer.weight, std=K**-0.5)
    layer.to(torch.bfloat16).requires_grad_(False)
    if kind == "bias":
        nn.init.normal_(layer.bias, std=0.1)
    quantise = {"nf4": bnb.quantise_4bit, "8 bits": bnb.quantise_8bit, "int8": int8.quantise}.get(kind)
    if quantise:
        layer.weight = nn.Parameter(quantise(layer.weight.detach()), requires_grad=False)
    return layer


def drawn(layer):
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=SIZE_OF_B if "lora_B" in name else K**-0.5)
    return layer


def dense(weight):
    return (weight.dequantise() if hasattr(weight, "dequantise") else weight).double()


def ours(kind, adapters=1, targets=("0",), **settings):
    model = nn.Sequential(base_layer(kind))
    for number in range(adapters):
        lora.adapt(model, list(targets), adapter_name=f"number_{number}", r=R, lora_alpha=2 * R, **settings)
    lora.set_adapter(model, [f"number_{number}" for number in range(adapters)])
    return drawn(model)


def shares(call, weight, bias, update):
    """How much of the update's part is in what a layer gives, and in its input's gradient: 1 where rounding is as
    often up as down.

    Args:
        call: the layer.
        update: ΔW, (N, K).
    """
    x = torch.randn(TOKENS, K).bfloat16().to(weight.device).requires_grad_()
    dy = torch.randn(TOKENS, N).bfloat16().to(weight.device)
    y = call(x)
    y.backward(dy)
    base = x.detach().double() @ dense(weight).T + (0 if bias is None else bias.double())
    pairs = [
        (y.detach().double() - base, x.detach().double() @ update.T),
        (x.grad.double() - dy.double() @ dense(weight), dy.double() @ update),
    ]
    return [((found * meant).sum() / meant.square().sum()).item() for found, meant in pairs]


def arrives(shares):
    return shares == pytest.approx([1, 1], abs=0.15)


@pytest.mark.parametrize("kind", BASES)
def test_small_updates_are_in_the_sum(kind):
    torch.manual_seed(0)
    model = ours(kind)
    update = model[0].delta_weight("number_0").double()
    assert arrives(shares(model, model[0].weight, model[0].bias, update))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", ["plain", "bias", "nf4"])
def test_on_a_gpu(kind):
    torch.manual_seed(0)
    model = ours(kind).to("cuda")
    update = model[0].delta_weight("number_0").double()
    assert arrives(shares(model, model[0].weight, model[0].bias, update))


PARTS = {"0": {"first": 128, "left": 128, "last": 128}}


@pytest.mark.parametrize("settings", [{"adapters": 2}, {"targets": ("first", "last"), "fused": PARTS}], ids=str)
def test_of_several_updates_too(settings):
    torch.manual_seed(0)
    model = ours("plain", **settings)
    layer = model[0]
    update = sum(layer.delta_weight(name).double() for name in layer.adapters)
    assert arrives(shares(model, layer.weight, None, update))


def test_pefts_loses_them():
    torch.manual_seed(0)
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=["0"])
    model = drawn(inject_adapter_in_model(config, nn.Sequential(base_layer("plain"))))
    layer = model[0]
    update = layer.get_delta_weight("default").double()
    forward, _ = shares(model, layer.weight, None, update)
    assert forward < 0.5


@pytest.mark.parametrize("native", [True, False], ids=["C++", "plain"])
def test_decoder_layers_keep_them(native, monkeypatch):
    torch.manual_seed(0)
    layer = ours("plain")[0]
    layers = projection_of(layer, torch.bfloat16)
    if not native:
        monkeypatch.setattr(blockwise, "serves", lambda *_: False)
    elif not blockwise.serves(torch.empty(TOKENS, K, dtype=torch.bfloat16), layers):
        pytest.skip("no C++ layers here")
    update = layer.delta_weight("number_0").double()
    nothing = torch.zeros(TOKENS, N, dtype=torch.bfloat16)
    assert arrives(shares(lambda x: decoder.linear_add(x, nothing, layers), layer.weight, None, update))
