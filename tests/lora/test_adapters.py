"""Several adapters on one model: added, switched, summed, combined; PEFT is the oracle."""

import copy

import peft
import pytest
import torch
from conftest import relative_error
from torch import nn

from phinetune import lora
from phinetune.adapter import load_adapter, save_adapter
from phinetune.kernels import bnb, int8

X = torch.linspace(-1, 1, 40).view(5, 8).sin()
IDS = torch.arange(5)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.up = nn.Linear(8, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.down = nn.Linear(12, 4)

    def forward(self, ids):
        hidden = self.up(X + self.embed(ids)).tanh()
        return self.down(self.conv(hidden.T[None])[0].T)


def net():
    torch.manual_seed(0)
    return Net().requires_grad_(False).eval()


SETTINGS = {
    "one": {"target_modules": ["up", "embed", "conv"], "r": 3, "lora_alpha": 6},
    "two": {"target_modules": ["up", "down", "conv"], "r": 3, "lora_alpha": 2},
}


def tensors_of(adapter):
    """The values that an adapter is given, in ours and in PEFT's alike."""
    return torch.Generator().manual_seed(len(adapter) + ord(adapter[0]))


def ours_with(*adapters, **changes):
    model = net()
    for name in adapters:
        lora.adapt(model, adapter_name=name, **{**SETTINGS[name], **changes.get(name, {})})
        with torch.no_grad():
            for _, layer in lora.lora_layers(model):
                for tensor in layer.lora_tensors(name).values() if name in layer.adapters else ():
                    tensor.copy_(torch.randn(tensor.shape, generator=tensors_of(name)) / 2)
    return model


def theirs_with(*adapters, **changes):
    model = None
    for name in adapters:
        config = peft.LoraConfig(**{**SETTINGS[name], **changes.get(name, {})})
        if model is None:
            model = peft.get_peft_model(net(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        ours = dict(lora.lora_layers(ours_with(name, **changes)))
        with torch.no_grad():
            for path, layer in ours.items():
                twin = model.base_model.model.get_submodule(path)
                if isinstance(layer, nn.Embedding):
                    tables = twin.lora_embedding_A, twin.lora_embedding_B
                else:
                    tables = twin.lora_A, twin.lora_B
                for table, kind in zip(tables, ("lora_A", "lora_B"), strict=True):
                    twin_tensor = getattr(table[name], "weight", table[name])
                    twin_tensor.copy_(layer.lora_tensor(kind, name).view(twin_tensor.shape))
    return model


def answer(model):
    with torch.no_grad():
        return model(IDS)


def only(name):
    """A model with one of the adapters alone."""
    return answer(ours_with(name))


def test_switching_answers_as_each_alone():
    model = ours_with("one", "two")
    assert lora.adapter_names(model) == ["one", "two"]
    assert lora.active_adapters(model) == {"one": 1.0}, "adding doesn't switch"
    assert torch.equal(answer(model), only("one"))
    lora.set_adapter(model, "two")
    assert torch.equal(answer(model), only("two"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{layer}.lora_{x}_two" for layer in ("up", "down", "conv") for x in "AB"}
    with lora.enabled(model, "one"):
        assert torch.equal(answer(model), only("one"))
        with lora.disabled(model):
            assert torch.equal(answer(model), answer(net()))
            with lora.enabled(model):
                assert torch.equal(answer(model), only("one"))
        assert torch.equal(answer(model), only("one"))
    assert torch.equal(answer(model), only("two"))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    lora.fuse(model)
    torch.testing.assert_close(answer(model), only("two"), rtol=1e-5, atol=1e-5)
    lora.set_adapter(model, "one")
    torch.testing.assert_close(answer(model), only("one"), rtol=1e-5, atol=1e-5)


def test_a_weighted_sum_is_the_sum_of_the_updates_and_gradients_reach_both():
    model = ours_with("one", "two")
    lora.set_adapter(model, {"one": 0.7, "two": -0.3})
    dense = net()
    with torch.no_grad():
        for name, weight in (("one", 0.7), ("two", -0.3)):
            for path, layer in lora.lora_layers(model):
                if name in layer.adapters:
                    dense.get_submodule(path).weight += weight * layer.delta_weight(name)
    torch.testing.assert_close(answer(model), answer(dense), rtol=1e-5, atol=1e-5)
    with lora.fused(model):
        torch.testing.assert_close(answer(model), answer(dense), rtol=1e-5, atol=1e-5)
    model(IDS).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in model.parameters()) == 12


def test_pefts_active_list_is_our_sum_with_weights_of_one():
    ours, theirs = ours_with("one", "two"), theirs_with("one", "two")
    lora.set_adapter(ours, ["one", "two"])
    theirs.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(answer(ours), answer(theirs), rtol=1e-5, atol=1e-5)


def test_a_sum_with_dora_adds_what_each_changes():
    model = net()
    for name, use_dora in (("one", True), ("two", False)):
        lora.adapt(model, ["down"], adapter_name=name, r=2, use_dora=use_dora)
    with torch.no_grad():
        for parameter in model.down.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    parts = []
    for name in ("one", "two"):
        lora.set_adapter(model, name)
        parts.append(answer(model))
    with lora.disabled(model):
        base = answer(model)
    lora.set_adapter(model, {"one": 0.5, "two": 2.0})
    torch.testing.assert_close(answer(model), base + 0.5 * (parts[0] - base) + 2 * (parts[1] - base))


COMBINATIONS = [
    ("cat", {}),
    ("svd", {}),
    ("svd", {"svd_rank": 2}),
    ("linear", {}),
    ("ties", {"density": 0.4}),
    ("ties", {"density": 0.4, "majority_sign_method": "frequency"}),
    ("dare_linear", {"density": 0.5}),
    ("dare_ties", {"density": 0.5}),
    ("magnitude_prune", {"density": 0.5}),
    ("ties_svd", {"density": 0.3}),
    ("dare_linear_svd", {"density": 0.5}),
    ("dare_ties_svd", {"density": 0.5}),
    ("magnitude_prune_svd", {"density": 0.5}),
]


@pytest.mark.parametrize(("combination_type", "options"), COMBINATIONS)
@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.5, -0.5]])
def test_combinations_are_pefts(combination_type, options, weights, monkeypatch):
    linear = {name: {"target_modules": ["up", "down"]} for name in ("one", "two")}  # PEFT's SVD fails on Conv1d
    ours, theirs = ours_with("one", "two", **linear), theirs_with("one", "two", **linear)
    bernoulli, generator = torch.bernoulli, torch.Generator()  # both drop the same entries
    monkeypatch.setattr(torch, "bernoulli", lambda p: bernoulli(p, generator=generator))
    generator.manual_seed(3)
    lora.add_weighted_adapter(ours, ["one", "two"], weights, "merged", combination_type, **options)
    generator.manual_seed(3)
    theirs.base_model.add_weighted_adapter(["one", "two"], weights, "merged", combination_type, **options)
    assert lora.active_adapters(ours) == {"one": 1.0}
    lora.set_adapter(ours, "merged")
    theirs.set_adapter("merged")
    torch.testing.assert_close(answer(ours), answer(theirs), rtol=1e-5, atol=1e-5)


def test_cat_is_exactly_the_weighted_sum_on_every_kind_of_layer():
    model = ours_with("one", "two", two={"r": 2})
    lora.set_adapter(model, {"one": 0.7, "two": 0.3})
    expected = answer(model)
    lora.add_weighted_adapter(model, ["one", "two"], [0.7, 0.3], "merged", "cat")
    lora.add_weighted_adapter(model, ["one", "two"], [0.7, 0.3], "best", "svd", svd_rank=5)
    for name in ("merged", "best"):
        lora.set_adapter(model, name)
        torch.testing.assert_close(answer(model), expected, rtol=1e-5, atol=1e-5)
    lora.delete_adapter(model, "merged")
    assert set(lora.adapter_names(model)) == {"one", "two", "best"}
    assert not any("merged" in name for name in model.state_dict())


def test_parts_of_fused_layers_combine():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 9))
    fused = {"0": {"q": 5, "k": 2, "v": 2}}
    lora.adapt(layer, ["q", "v"], adapter_name="one", r=2, fused=fused)
    lora.adapt(layer, ["k"], adapter_name="two", r=3, fused=fused)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += torch.randn_like(parameter) / 3
        x = torch.randn(4, 6)
        lora.set_adapter(layer, {"one": 0.5, "two": 2})
        expected = layer(x)
        for kind, options in (("cat", {}), ("svd", {"svd_rank": 7})):
            lora.add_weighted_adapter(layer, ["one", "two"], [0.5, 2], kind, kind, **options)
            lora.set_adapter(layer, kind)
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["one", "three"], [1, 1], "new", "cat"), "no adapter is called 'three': there are .'one', 'two'."),
        ((["one", "two"], [1], "new", "cat"), "2 adapters and 1 weights"),
        ((["one", "two"], [1, 1], "one", "cat"), "has an adapter of that name"),
        ((["one", "two"], [1, 1], "new", "tis"), "combination_type='tis': must be one of cat"),
        ((["one", "two"], [1, 1], "new", "ties"), "density=None: ties keeps a share"),
        ((["one", "two"], [1, 1], "new", "linear"), r"linear adds As and Bs of one rank, and these are \[3, 2\]"),
        ((["one", "two"], [1, 1], "not.a.name", "cat"), "letters, digits, _ and - only"),
        ((["one", "two"], [1, 1], "new", "cat", {"density": 0.5}), "cat prunes nothing"),
        ((["one", "two"], [1, 1], "new", "svd", {"svd_rank": 0}), "a rank of 1 or more"),
    ],
)
def test_what_can_not_be_combined_is_said_and_nothing_is_changed(arguments, message):
    model = ours_with("one", "two", two={"r": 2})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        lora.add_weighted_adapter(model, *arguments[:4], **(arguments[4] if len(arguments) > 4 else {}))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert lora.active_adapters(model) == {"one": 1.0}
    for switch in (lora.set_adapter, lora.delete_adapter):
        with pytest.raises(lora.TargetError, match="no adapter is called 'three'"):
            switch(model, "three")
    with pytest.raises(lora.TargetError, match="has an adapter of that name"):
        lora.adapt(model, ["up"], adapter_name="one")


def test_whole_modules_and_biases_belong_to_the_adapter():
    model, base = net(), answer(net())
    lora.adapt(model, ["up"], r=2, modules_to_save=["down"], bias="all")
    assert torch.equal(answer(model), base)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        "up.lora_A", "up.lora_B", "up.bias", "conv.bias",
        "down.modules_to_save.default.weight", "down.modules_to_save.default.bias",
    }  # fmt: skip
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(0.1)
    tuned = answer(model)
    assert relative_error(tuned, base) > 0.01
    with lora.disabled(model):
        assert torch.equal(answer(model), base)
        with lora.enabled(model):
            assert torch.equal(answer(model), tuned)
            with lora.disabled(model):
                assert torch.equal(answer(model), base)
        assert torch.equal(answer(model), base)
    assert torch.equal(answer(model), tuned)
    assert not any(name.startswith("_lora_tuned") for module in model.modules() for name in module.__dict__)
    with pytest.raises(lora.TargetError, match="trained biases can't be weighted"):
        lora.set_adapter(model, {"default": 0.5})
    with pytest.raises(lora.TargetError, match="trained biases can't be combined"):
        lora.add_weighted_adapter(model, ["default"], [0.5], "half", "cat")
    assert model.down.weight is model.down.modules_to_save["default"].weight, "what the model asks of it is the tuned"
    state = lora.lora_state_dict(model, "all")
    assert trained <= state.keys()
    again = copy.deepcopy(model)
    with torch.no_grad():
        for name in trained:
            again.get_parameter(name).zero_()
    lora.load_lora_state_dict(again, state)
    assert torch.equal(answer(again), tuned)

    with pytest.raises(lora.TargetError, match="biases train with one adapter alone, and the model has default"):
        lora.adapt(again, ["up"], adapter_name="two", r=2)
    lora.delete_adapter(again, "default")
    assert torch.equal(answer(again), base)
    lora.unload(model)
    assert type(model.down) is nn.Linear
    torch.testing.assert_close(answer(model), tuned, rtol=1e-5, atol=1e-5)
    with pytest.raises(lora.TargetError, match="modules_to_save: no module's name ends in 'hed'"):
        lora.adapt(net(), ["up"], modules_to_save=["hed"])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_loralibs_own_call_chose_are_saved_and_can_be_had_without(bias, tmp_path):
    model, base = net(), answer(net())
    lora.adapt(model, ["up"], r=2)
    lora.mark_only_lora_as_trainable(model, bias)
    keys = model.state_dict().keys()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    tuned = answer(model)
    assert relative_error(tuned, base) > 0.01
    with lora.disabled(model):
        assert torch.equal(answer(model), base)
    assert torch.equal(answer(model), tuned)
    assert model.state_dict().keys() == keys
    assert not any("lora_base" in key for key in keys)
    save_adapter(model, tmp_path, base="net")
    again = net()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(answer(again), tuned, rtol=1e-6, atol=1e-6)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(answer(theirs), tuned, rtol=1e-5, atol=1e-5)
    lora.delete_adapter(model, "default")
    assert torch.equal(answer(model), base)


def test_biases_may_be_chosen_on_meta_before_there_are_any():
    with torch.device("meta"):
        model = nn.Sequential(lora.Linear(4, 4, r=2), nn.Linear(4, 4))
    lora.mark_only_lora_as_trainable(model, "all")
    filled = nn.Sequential(lora.Linear(4, 4, r=2), nn.Linear(4, 4))
    model.load_state_dict(filled.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in model.to(torch.float64).state_dict().values())
    x = torch.randn(3, 4, dtype=torch.float64)
    with lora.disabled(model):
        torch.testing.assert_close(model(x), filled.double()(x))


@pytest.mark.parametrize("quantise", [int8.quantise, bnb.quantise_4bit])
def test_whole_modules_can_not_be_quantised_ones(quantise):
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    model[1][1].weight = nn.Parameter(quantise(model[1][1].weight.detach()), requires_grad=False)
    before, trained = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    for name, shown in (("1.1", r"1\.1 is quantised \(weight\)"), ("1", r"1 is quantised \(1\.weight\)")):
        with pytest.raises(lora.TargetError, match=f"modules_to_save: {shown}, and what is quantised can't train"):
            lora.adapt(model, ["0"], r=2, modules_to_save=[name])
        assert dict(model.named_modules()) == before
        assert [p.requires_grad for p in model.parameters()] == trained
    lora.adapt(model, ["0", "1.1"], r=2, modules_to_save=["1.0"])


@pytest.mark.parametrize("adapter_name", ["train", "type", "keys", "training"])
def test_names_that_torch_keeps_for_itself_are_refused_for_whole_modules_alone(adapter_name):
    model = net()
    before = dict(model.named_modules())
    with pytest.raises(lora.TargetError, match=f"adapter_name='{adapter_name}': torch has the name itself"):
        lora.adapt(model, ["up"], adapter_name=adapter_name, r=2, modules_to_save=["down"])
    assert dict(model.named_modules()) == before
    lora.adapt(model, ["up"], adapter_name=adapter_name, r=2)
    assert torch.equal(answer(model), answer(net()))


def test_what_was_fused_before_stays_fused():
    model = ours_with("one")
    lora.fuse(model)
    first = next(layer for _, layer in lora.lora_layers(model))
    first.unmerge()
    merged = [layer.merged for _, layer in lora.lora_layers(model)]
    with lora.fused(model):
        with lora.fused(model):
            assert all(layer.merged for _, layer in lora.lora_layers(model))
        assert all(layer.merged for _, layer in lora.lora_layers(model))
    assert [layer.merged for _, layer in lora.lora_layers(model)] == merged == [False, True, True]


def test_whole_modules_can_not_be_weighted_added_or_combined():
    model = net()
    for name in ("one", "two"):
        lora.adapt(model, ["up"], adapter_name=name, r=2, modules_to_save=["down"])
    for asked in ({"one": 0.5}, ["one", "two"]):
        with pytest.raises(lora.TargetError, match="down was trained whole, and can't be weighted or added up"):
            lora.set_adapter(model, asked)
    with pytest.raises(lora.TargetError, match="whole modules can't be combined"):
        lora.add_weighted_adapter(model, ["one", "two"], [1, 1], "new", "cat")
    assert lora.active_adapters(model) == {"one": 1.0}
    with pytest.raises(lora.TargetError, match="modules_to_save: up has another adapter's LoRA on up"):
        lora.adapt(model, ["conv"], adapter_name="three", modules_to_save=["up"])
    lora.delete_adapter(model, "one")
    assert lora.active_adapters(model) == {}
    assert torch.equal(answer(model), answer(net()))
    dora = net()
    lora.adapt(dora, ["up"], r=2, use_dora=True)
    with pytest.raises(lora.TargetError, match="up uses DoRA: its norms can't be added up"):
        lora.add_weighted_adapter(dora, ["default"], [1], "new", "cat")
