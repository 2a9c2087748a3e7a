"""Which layers are adapted, by name; fusing and its reverse."""

import pytest
import torch
from conftest import draw_lora_B, relative_error, tiny_config, tiny_model

from phinetune import lora
from phinetune.model import fused_parts

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("targets", "count"), [("all-linear", 25_165_824), (SEVEN, 29_884_416)])
def test_full_size_phi3_mini_counts(targets, count):
    from transformers import Phi3Config, Phi3ForCausalLM

    with torch.device("meta"):
        model = Phi3ForCausalLM(Phi3Config())
    names = lora.adapt(model, targets, r=16, lora_alpha=32, fused=fused_parts(model.config))
    lora.mark_only_lora_as_trainable(model)
    assert trainable(model) == count
    assert len(names) == 32 * 4


def test_all_linear_takes_every_linear_but_the_head():
    model = tiny_model("llama")
    names = lora.adapt(model, "all-linear", r=2)
    assert len(names) == 2 * 7
    assert {name.rpartition(".")[2] for name in names} == set(SEVEN)
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (["layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
        (r".*\.0\..*(k|v)_proj", {"model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"}),
        (["lm_head"], {"lm_head"}),
    ],
)
def test_names_suffixes_and_regexes_match_as_in_peft(targets, expected):
    import peft

    model = tiny_model("llama")
    assert set(lora.adapt(model, targets, r=2)) == expected
    theirs = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=targets))
    prefix = "base_model.model."
    adapted = {
        n.removeprefix(prefix).removesuffix(".lora_A") for n, _ in theirs.named_modules() if n.endswith(".lora_A")
    }
    assert adapted == expected


def test_targets_that_match_nothing_are_an_error_that_lists_what_the_model_has():
    model = tiny_model("llama")
    with pytest.raises(lora.TargetError) as error:
        lora.adapt(model, ["q_proj", "qkv_porj"], r=2)
    message = str(error.value)
    assert "'qkv_porj'" in message
    assert "'q_proj'" not in message
    assert all(name in message for name in SEVEN)
    assert not list(lora.lora_layers(model)), "nothing was changed"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": "q_proj"}, "A string is a regex for the whole name: write .q_proj."),
        ({"target_modules": "*_proj"}, "is not a regular expression"),
        ({"exclude_modules": ["k_porj"]}, "exclude_modules: 'k_porj' matches none of"),
        ({"rank_pattern": {"q_porj": 2}}, "'q_porj' matches none of"),
    ],
)
def test_settings_that_would_do_nothing_are_errors(settings, message):
    with pytest.raises(lora.TargetError, match=message):
        lora.adapt(tiny_model("llama"), **{"target_modules": "all-linear", "r": 2, **settings})


def test_parts_of_phi3s_fused_layers_are_their_rows():
    model = tiny_model("phi3")
    lora.adapt(model, ["q_proj", "v_proj", "up_proj"], r=4, fused=fused_parts(model.config))
    layer = model.model.layers[0].self_attn.qkv_proj
    assert isinstance(layer, lora.MergedLinear)
    assert layer.out_splits == [64, 32, 32]
    assert layer.enable_lora == [True, False, True]
    assert model.model.layers[0].mlp.gate_up_proj.enable_lora == [False, True]
    assert layer.lora_A.shape == (8, 64)
    assert layer.lora_B.shape == (96, 4)


def test_naming_a_fused_layer_and_its_part_is_a_contradiction():
    model = tiny_model("phi3")
    with pytest.raises(lora.TargetError, match="name one or the other"):
        lora.adapt(model, ["qkv_proj", "q_proj"], r=4, fused=fused_parts(model.config))


def test_patterns_and_exclusions():
    model = tiny_model("llama")
    lora.adapt(
        model, "all-linear", r=2, lora_alpha=4, rank_pattern={r"layers\.1\..*_proj": 3, "q_proj": 5},
        alpha_pattern={"down_proj": 7}, exclude_modules=["o_proj"],
    )  # fmt: skip
    layers = dict(lora.lora_layers(model))
    assert not any(name.endswith("o_proj") for name in layers)
    assert layers["model.layers.0.self_attn.q_proj"].r == 5
    assert layers["model.layers.1.self_attn.q_proj"].r == 3, "the first match wins"
    assert layers["model.layers.0.mlp.down_proj"].scaling == 7 / 2


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_fuse_gives_the_adapted_logits_and_unfuse_the_same_base(family):
    model = tiny_model(family)
    ids = torch.randint(0, 1000, (2, 9))
    plain = model(ids).logits
    weights = {name: p.clone() for name, p in model.named_parameters()}
    lora.adapt(model, SEVEN, r=4, lora_alpha=8, fused=fused_parts(model.config))
    draw_lora_B(model)
    with torch.no_grad():
        adapted = model(ids).logits
        assert (adapted - plain).abs().max() > 0.05
        with lora.fused(model):
            torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-4)
            with lora.disabled(model):
                assert torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids).logits, adapted)
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())
    lora.unload(model)
    assert not list(lora.lora_layers(model))
    torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "some"}, "bias='some': must be one of"),
        ({"r": 0}, "r=0 adapts nothing"),
        ({"r": -1}, "r=-1: a LoRA rank is 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0: must be in \[0, 1\)"),
        ({"init_lora_weights": "pisa"}, "init_lora_weights='pisa': must be true"),
        (
            {"init_lora_weights": "pissa", "r": 2, "target_modules": ["0", "2"]},
            "2: init_lora_weights='pissa' isn't an initialisation of convolutions",
        ),
        ({"init_lora_weights": "pissa", "r": 2, "lora_alpha": -1}, "which must be above 0"),
        ({"init_lora_weights": "olora", "r": 5}, r"r=5 is more than the rank of a \(4, 4\) weight"),
        ({"adapter_name": "a.b"}, "letters, digits, _ and - only"),
        (
            {"target_modules": r"[01]", "layers_to_transform": [1]},
            "layers_to_transform is for target_modules as a list",
        ),
        ({"layers_pattern": "h"}, "give layers_to_transform with it"),
        ({"target_modules": ["0"], "exclude_modules": ["0"]}, "exclude_modules leaves nothing"),
    ],
)
def test_what_can_not_be_done_changes_nothing(settings, message):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Conv1d(4, 4, 3))
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        lora.adapt(model, **{"target_modules": ["0"], **settings})
    assert dict(model.named_modules()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_that_would_be_adapted_in_vain_are_refused():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Scaled(4, 4))
    with pytest.raises(
        lora.TargetError, match="1: Scaled computes in a way of its own; leave it out of target_modules, or list it"
    ):
        lora.adapt(model)
    assert lora.adapt(model, exclude_modules=["1"]) == ["0"]
    hooked = torch.nn.Sequential(torch.nn.Linear(4, 4))
    hooked[0].forward = hooked[0].forward
    with pytest.raises(lora.TargetError, match="0: its forward was replaced"):
        lora.adapt(hooked)
    with pytest.raises(lora.TargetError, match="the model is itself the layer"):
        lora.adapt(torch.nn.Linear(4, 4))
    twice = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4)})
    twice["b"] = twice["a"]
    with pytest.raises(lora.TargetError, match="a: the same layer is also b, which would stay plain"):
        lora.adapt(twice, ["a"])
    normed = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4)))
    with pytest.raises(lora.TargetError, match="0: its weight is computed"):
        lora.adapt(normed)


class Blocks(torch.nn.Module):
    """One block run twice, as in ALBERT, and its layers under a second path, as wrappers of models have them."""

    def __init__(self):
        super().__init__()
        block = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 6), "down": torch.nn.Linear(6, 4)})
        self.blocks = torch.nn.ModuleList([block] * 2)
        self.alias = self.blocks

    def forward(self, x):
        for block in self.alias:
            x = x + block["down"](block["up"](x).tanh())
        return x


def test_blocks_that_are_shared_or_have_two_paths_are_adapted_in_all_places():
    import peft

    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(3, 4)
    assert lora.adapt(model, ["up", "down"], r=2) == ["blocks.0.up", "blocks.0.down"]
    draw_lora_B(model)
    theirs = peft.get_peft_model(Blocks(), peft.LoraConfig(r=2, lora_alpha=8, target_modules=["up", "down"]))
    plain = theirs.base_model.model
    with torch.no_grad():
        for name in ("up", "down"):
            own, other = model.blocks[1][name], plain.blocks[1][name]
            other.base_layer.load_state_dict({"weight": own.weight, "bias": own.bias})
            other.lora_A["default"].weight.copy_(own.lora_A)
            other.lora_B["default"].weight.copy_(own.lora_B)
    torch.testing.assert_close(model(x), theirs(x))
    with pytest.raises(lora.TargetError, match=r"blocks\.0: the same layer is also blocks\.1, which"):
        lora.adapt(torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4)] * 2)}))


@pytest.mark.parametrize("target", [["q_proj", "lm_head"], r"lm_head", ["lm_head", "embed_tokens"]])
def test_a_name_that_trains_whole_is_no_target_and_the_message_says_so(target):
    model = tiny_model("llama")
    with pytest.raises(
        lora.TargetError,
        match="target_modules: 'lm_head' means lm_head, which trains whole under modules_to_save: name it in one",
    ):
        lora.adapt(model, target, r=2, modules_to_save=["lm_head"])
    assert not list(lora.lora_layers(model))
    lora.adapt(model, ["q_proj"], r=2, modules_to_save=["lm_head"])
    with pytest.raises(lora.TargetError, match="'lm_head' means lm_head, which trains whole"):
        lora.adapt(model, target, r=2, adapter_name="second")


def test_all_linear_takes_a_classifiers_head_unless_it_trains_whole():
    """PEFT leaves the head out, and trains it whole, where it is told of the task; there is no task type here."""
    import peft
    from transformers import LlamaForSequenceClassification

    def classifier():
        return LlamaForSequenceClassification(tiny_config("llama", vocab_size=64, num_labels=3))

    assert "score" in lora.adapt(classifier(), "all-linear", r=2)
    ours = classifier()
    names = lora.adapt(ours, "all-linear", r=2, modules_to_save=["score"])
    theirs = peft.get_peft_model(classifier(), peft.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    prefix = "base_model.model."
    assert {f"{prefix}{name}.lora_A" for name in names} == {
        name for name, _ in theirs.named_modules() if name.endswith("lora_A")
    }
    whole = {name for name, parameter in ours.named_parameters() if parameter.requires_grad and "lora_" not in name}
    trained = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad and "lora_" not in name}
    assert {prefix + name for name in whole} == trained == {f"{prefix}score.modules_to_save.default.weight"}


def test_layers_to_transform_as_in_peft():
    import peft

    for settings in ({"layers_to_transform": [1]}, {"layers_to_transform": 0, "layers_pattern": "layers"}):
        model = tiny_model("llama")
        names = lora.adapt(model, ["q_proj", "up_proj"], r=2, **settings)
        theirs = peft.get_peft_model(
            tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **settings)
        )
        assert {f"base_model.model.{name}.lora_A" for name in names} == {
            name for name, _ in theirs.named_modules() if name.endswith("lora_A")
        }
    with pytest.raises(lora.TargetError, match=r"no adapted layer has the number 7; there are \[0, 1\]"):
        lora.adapt(tiny_model("llama"), ["q_proj"], layers_to_transform=[0, 7])


def test_all_but_a_part_of_a_fused_layer():
    model = tiny_model("phi3")
    lora.adapt(model, "all-linear", r=2, fused=fused_parts(model.config), exclude_modules=["k_proj", "gate_up_proj"])
    assert model.model.layers[0].self_attn.qkv_proj.enable_lora == [True, False, True]
    assert type(model.model.layers[0].self_attn.o_proj) is lora.Linear
    assert type(model.model.layers[0].mlp.gate_up_proj) is torch.nn.Linear


def test_in_half_precision_everything_that_trains_does_so_in_fp32():
    model = tiny_model("llama", attention_bias=True).to(torch.bfloat16)
    ids = torch.randint(0, 1000, (1, 9))
    expected = model(ids).logits
    lora.adapt(model, ["q_proj"], r=2, modules_to_save=["norm", "lm_head"], bias="lora_only")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert relative_error(model(ids).logits.detach(), expected.detach()) < 1e-2
    optimizer = torch.optim.AdamW(trained, lr=1e-5)  # a step that bfloat16 weights near 1 would not show
    before = model.model.norm.weight.clone()
    model(ids).logits.float().sum().backward()
    optimizer.step()
    assert not torch.equal(model.model.norm.weight, before)
    lora.unload(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert relative_error(model(ids).logits.detach(), expected.detach()) < 0.05


@pytest.mark.parametrize(
    ("base", "asked", "trains_in"),
    [
        (torch.float16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_what_adapters_train_in(base, asked, trains_in):
    model = tiny_model("llama").to(base)
    lora.adapt(model, ["q_proj"], r=2, modules_to_save=["norm"], dtype=asked)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {trains_in}
