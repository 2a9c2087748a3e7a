"""Against the real loralib over drawn configurations: wherever it is right, ours is the same layer to the bit.

Where it is wrong is tests/lora/test_faults.py.
"""

from typing import Any

import loralib
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phinetune import lora

CONFIGURATIONS = 1000
ran: list[dict[str, Any]] = []

ranks = st.integers(0, 6)
alphas = st.sampled_from([1, 2, 3.5, 16])
dropouts = st.sampled_from([0.0, 0.3])
sizes = st.integers(1, 12)


@st.composite
def linears(draw):
    kwargs = {"lora_dropout": draw(dropouts), "fan_in_fan_out": draw(st.booleans()), "bias": draw(st.booleans())}
    return "Linear", (draw(sizes), draw(sizes)), kwargs


@st.composite
def merged_linears(draw):
    enabled = draw(st.lists(st.booleans(), min_size=1, max_size=4).filter(any))  # none: fault 9
    kwargs = {"lora_dropout": draw(dropouts), "fan_in_fan_out": draw(st.booleans()), "bias": draw(st.booleans())}
    return "MergedLinear", (draw(sizes), len(enabled) * draw(sizes)), {**kwargs, "enable_lora": enabled}


@st.composite
def embeddings(draw):
    rows = draw(st.integers(2, 12))
    kwargs = {"padding_idx": draw(st.none() | st.integers(0, rows - 1)), "scale_grad_by_freq": draw(st.booleans())}
    return "Embedding", (rows, draw(sizes)), kwargs


@st.composite
def convolutions(draw):
    kind = draw(st.sampled_from(["Conv1d", "Conv2d", "Conv3d"]))
    kernel = draw(st.integers(1, 3)) if kind == "Conv2d" else 1  # others crash: fault 15
    groups = draw(st.sampled_from([1, 2]))
    kwargs = {
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)),
        "padding_mode": draw(st.sampled_from(["zeros", "circular"])),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    return kind, (groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4)), kernel), kwargs


def input_for(kind, sizes, batch):
    if kind == "Embedding":
        return torch.randint(0, sizes[0], (batch, 5))
    if kind.startswith("Conv"):
        return on_a_grid(batch, sizes[0], *[7] * int(kind[4])).requires_grad_()
    return on_a_grid(batch, 3, sizes[0]).requires_grad_()


def on_a_grid(*shape):
    """Multiples of 1/16 up to 3/4: sums of their products are exact in fp32, in whatever order they are added up."""
    return torch.randint(-12, 13, shape) / 16


def plain_names(layer):
    """Parameters by name, loralib's wrapped convolution as if it weren't."""
    return {name.removeprefix("conv."): parameter for name, parameter in layer.named_parameters()}


def difference(value, reference):
    """The largest, in units of the reference's largest entry where that is above 1."""
    return ((value - reference).abs().max() / reference.abs().max().clamp(min=1)).item()


@settings(
    max_examples=CONFIGURATIONS, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(
    layer=st.one_of(linears(), merged_linears(), embeddings(), convolutions()),
    r=ranks,
    lora_alpha=alphas,
    merge_weights=st.booleans(),
    training=st.booleans(),
    batch=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def same_layer(layer, r, lora_alpha, merge_weights, training, batch, seed):
    kind, sizes, kwargs = layer
    if kwargs.get("lora_dropout") and training:
        kwargs = {**kwargs, "lora_dropout": 0.0}  # masks are drawn in another way
    layers = []
    for library in (loralib, lora):
        torch.manual_seed(seed)
        layers.append(getattr(library, kind)(*sizes, r=r, lora_alpha=lora_alpha, merge_weights=merge_weights, **kwargs))
    theirs, ours = layers
    named = plain_names(theirs)
    assert named.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in named.items():
        own = ours.get_parameter(name)
        assert torch.equal(parameter, own), name
        assert (parameter.shape, parameter.dtype) == (own.shape, own.dtype), name
        assert parameter.requires_grad == own.requires_grad, name
        torch.manual_seed(seed + 1)
        drawn = on_a_grid(*parameter.shape)  # lora_B away from zero, where most mistakes vanish
        with torch.no_grad():
            parameter.copy_(drawn)
            own.copy_(drawn)
    for made in layers:
        made.train(training)

    torch.manual_seed(seed + 2)
    x = input_for(kind, sizes, batch)
    xs = [x.detach().clone().requires_grad_(x.requires_grad) for _ in layers]
    outputs = [made(own_x) for made, own_x in zip(layers, xs, strict=True)]
    assert difference(outputs[1], outputs[0]) <= 1e-6
    dy = on_a_grid(*outputs[0].shape)
    for output in outputs:
        if output.requires_grad:
            output.backward(dy)
    if x.requires_grad:
        assert difference(xs[1].grad, xs[0].grad) <= 1e-6
    for name, parameter in named.items():
        # Merged, loralib gives A and B no gradient: fault 6.
        if parameter.grad is not None:
            assert difference(ours.get_parameter(name).grad, parameter.grad) <= 1e-6
    ran.append({"kind": kind, "r": r, "training": training})


def test_the_same_parameters_outputs_and_gradients_in_many_configurations_of_every_kind():
    ran.clear()
    same_layer()
    assert len(ran) >= CONFIGURATIONS
    for kind in ("Linear", "MergedLinear", "Embedding", "Conv1d", "Conv2d", "Conv3d"):
        assert sum(one["kind"] == kind and one["r"] > 0 for one in ran) >= 20, kind
