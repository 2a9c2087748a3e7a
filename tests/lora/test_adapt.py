"""Which layers are adapted, by name; fusing and its reverse."""

import subprocess
import sys

import pytest
import torch
from conftest import draw_lora_B, tiny_model

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


def test_the_lora_room_needs_torch_alone():
    code = "import sys, phinetune.lora, phinetune.kernels; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "torch" in loaded
    assert not {"transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "pydantic"} & set(loaded)
