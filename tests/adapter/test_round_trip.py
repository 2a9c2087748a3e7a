"""Every variant through PEFT's files and PEFT itself: ours -> PEFT -> ours, and adapters that PEFT made."""

import copy
import json
import re
import warnings

import peft
import pytest
import torch
from conftest import relative_error, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn

from phinetune import lora
from phinetune.adapter import load_adapter, make_portable, save_adapter
from phinetune.errors import AdapterError
from phinetune.model import fused_parts

IDS = torch.arange(24).view(2, 12) % 20


class Mixed(nn.Module):
    """Every kind of layer, with biases."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.conv1d = nn.Conv1d(12, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.conv2d = nn.Conv2d(1, 4, (3, 2), padding=(1, 1))
        self.conv3d = nn.Conv3d(1, 2, 2)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"up": nn.Linear(8, 10), "down": nn.Linear(10, 8)}) for _ in range(2)]
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.grouped(self.conv1d(self.embed(ids).transpose(1, 2)).tanh()).tanh()
        x = x + self.conv2d(x[:, None])[:, :, :, : x.shape[2]].mean(1)
        x = x + self.conv3d(x[:, None, None, :, :].expand(-1, 1, 2, -1, -1)).mean() / 4
        x = x.transpose(1, 2)
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())
        return self.head(self.norm(x))


def mixed():
    torch.manual_seed(0)
    return Mixed().requires_grad_(False).eval()


def draw(model, std=0.3):
    """Everything that trains moves: adapters, magnitudes, biases, whole modules."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)


def answer(model):
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


def quietly(function, *args, **kwargs):
    """PEFT warns of grouped convolutions and of embeddings that it saves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


EVERYTHING = ["embed", "conv1d", "conv2d", "conv3d", "up", "down", "head"]
VARIANTS = {
    "linear": {"target_modules": ["up", "down"]},
    "regex": {"target_modules": r"blocks\.1\.(up|down)"},
    "rslora": {"target_modules": EVERYTHING, "use_rslora": True},
    "dora": {"target_modules": EVERYTHING, "use_dora": True},
    "embedding": {"target_modules": ["embed"]},
    "conv": {"target_modules": ["conv1d", "conv2d", "conv3d"]},
    "patterns": {
        "target_modules": EVERYTHING,
        "rank_pattern": {"embed": 3, r"blocks\.0\.up": 5},
        "alpha_pattern": {"conv.*": 3.0, "down": 9},
    },
    "rslora with patterns": {"target_modules": ["up", "down"], "use_rslora": True, "rank_pattern": {"up": 5}},
    "modules_to_save": {"target_modules": ["up"], "modules_to_save": ["head", "norm"]},
    "bias lora_only": {"target_modules": ["up", "conv1d"], "bias": "lora_only"},
    "bias all": {"target_modules": ["up", "conv1d"], "bias": "all"},
    "layers": {"target_modules": ["up", "down"], "layers_to_transform": [1], "layers_pattern": ["blocks"]},
    "layers and pattern": {"target_modules": ["up"], "layers_to_transform": 0, "layers_pattern": "blocks"},
    "exclude": {"target_modules": ["up", "down"], "exclude_modules": r".*\.0\.down"},
    "gaussian": {"target_modules": ["up"], "init_lora_weights": "gaussian"},
    "dora with all else": {
        "target_modules": ["up", "embed"],
        "use_dora": True,
        "use_rslora": True,
        "modules_to_save": ["head"],
        "bias": "lora_only",
        "rank_pattern": {"embed": 2},
    },
}
ONE_WAY = {
    "grouped": {"target_modules": ["grouped"], "r": 2},
    "grouped and patterns": {"target_modules": ["grouped", "up"], "r": 2, "alpha_pattern": {"grouped": 7}},
    "pissa": {"target_modules": ["up", "down"], "init_lora_weights": "pissa"},
    "pissa_niter": {"target_modules": ["up", "down"], "init_lora_weights": "pissa_niter_8"},
    "olora": {"target_modules": ["up", "down"], "init_lora_weights": "olora", "rank_pattern": {"down": 2}},
}


@pytest.mark.parametrize("variant", [*VARIANTS, *ONE_WAY])
def test_ours_to_peft_and_back(variant, tmp_path):
    settings = {"r": 4, "lora_alpha": 6, **VARIANTS.get(variant, {}), **ONE_WAY.get(variant, {})}
    ours, base = mixed(), answer(mixed())
    lora.adapt(ours, **settings)
    torch.testing.assert_close(answer(ours), base, rtol=1e-5, atol=1e-5)  # it begins as the base
    draw(ours)
    expected = answer(ours)
    assert (expected - base).abs().max() > 0.05
    with lora.disabled(ours):
        assert torch.equal(answer(ours), base)
    with lora.fused(ours):
        torch.testing.assert_close(answer(ours), expected, rtol=1e-5, atol=1e-5)

    (tmp_path / "ours").mkdir()
    save_adapter(ours, tmp_path / "ours", "mixed")
    theirs = quietly(peft.PeftModel.from_pretrained, mixed(), tmp_path / "ours")
    torch.testing.assert_close(answer(theirs), expected, rtol=1e-5, atol=1e-5)

    quietly(theirs.save_pretrained, tmp_path / "theirs")
    again = mixed()
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(answer(again), expected, rtol=1e-5, atol=1e-5)
    with lora.disabled(again):
        assert torch.equal(answer(again), base)
    unloaded = copy.deepcopy(again)
    lora.unload(unloaded)
    assert {type(module) for module in unloaded.modules()} == {type(module) for module in mixed().modules()}
    torch.testing.assert_close(answer(unloaded), expected, rtol=1e-5, atol=1e-5)


def pefts_and_ours(variant, folder):
    """A model that PEFT adapted, and ours with the adapter that it saved."""
    settings = {"r": 4, "lora_alpha": 6, **VARIANTS.get(variant, {}), **ONE_WAY.get(variant, {})}
    theirs = quietly(peft.get_peft_model, mixed(), peft.LoraConfig(**settings))
    draw(theirs)
    quietly(theirs.save_pretrained, folder)
    ours = mixed()
    load_adapter(ours, folder)
    return theirs, ours


@pytest.mark.parametrize("variant", [*VARIANTS, "pissa", "olora"])
def test_adapters_that_peft_made(variant, tmp_path):
    theirs, ours = pefts_and_ours(variant, tmp_path)
    torch.testing.assert_close(answer(ours), answer(theirs), rtol=1e-5, atol=1e-5)
    with lora.disabled(ours):
        assert torch.equal(answer(ours), answer(mixed()))


@pytest.mark.parametrize("variant", [*VARIANTS, "pissa", "olora"])
def test_gradients_are_pefts(variant, tmp_path):
    theirs, ours = pefts_and_ours(variant, tmp_path)
    torch.manual_seed(2)
    dy = torch.randn_like(answer(ours))
    for model in (theirs, ours):
        model(IDS).backward(dy)
    compared = 0
    for name, layer in lora.lora_layers(ours):
        twin = theirs.base_model.model.get_submodule(name)
        for kind in ("lora_A", "lora_B", "lora_magnitude_vector"):
            own = getattr(layer, kind, None)
            table = getattr(
                twin, kind.replace("lora_", "lora_embedding_") if isinstance(layer, nn.Embedding) else kind, {}
            )
            table = table or getattr(twin, kind)
            if own is not None:
                reference = table["default"]
                reference = getattr(reference, "weight", reference).grad
                assert reference.norm() > 0
                assert relative_error(own.grad.flatten(), reference.flatten()) <= 1e-5
                compared += 1
    assert compared >= 2


PHI3 = {
    "ranks and alphas of parts": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 3, "v_proj": 6},
        "alpha_pattern": {"v_proj": 5.0},
    },
    "all but k": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "dora on parts": {"target_modules": ["q_proj", "gate_proj", "o_proj"], "use_dora": True},
    "pissa on parts": {"target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": "pissa"},
    "rslora, unequal": {"target_modules": ["k_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"k_proj": 2}},
    "embeddings and head": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("variant", PHI3)
def test_parts_of_phi3s_fused_layers(variant, tmp_path):
    ours, base = tiny_model("phi3", "sdpa"), answer(tiny_model("phi3", "sdpa"))
    lora.adapt(ours, r=4, lora_alpha=6, fused=fused_parts(ours.config), **PHI3[variant])
    torch.testing.assert_close(answer(ours), base, rtol=1e-4, atol=1e-4)
    draw(ours, std=0.05)
    expected = answer(ours)
    assert (expected - base).abs().max() > 0.05
    save_adapter(ours, tmp_path, "tiny")
    theirs = quietly(peft.PeftModel.from_pretrained, tiny_model("phi3", "sdpa"), tmp_path)
    torch.testing.assert_close(answer(theirs), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    again = tiny_model("phi3", "sdpa")
    load_adapter(again, tmp_path, fused_parts(again.config))
    torch.testing.assert_close(answer(again), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    if variant == "ranks and alphas of parts":
        layer = again.model.layers[0].self_attn.qkv_proj
        assert layer.enable_lora == [True, False, True]
        assert layer.r == [3, 0, 6]


def test_gpt2s_transposed_layers(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    def gpt2():
        torch.manual_seed(0)
        config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=30, n_positions=16)
        return GPT2LMHeadModel(config).requires_grad_(False).eval()

    ours = gpt2()
    assert len(lora.adapt(ours, r=4)) == 2 * 4
    draw(ours)
    expected = answer(ours)
    save_adapter(ours, tmp_path, "gpt2")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path)
    torch.testing.assert_close(answer(theirs), expected, rtol=1e-5, atol=1e-5)
    again = gpt2()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(answer(again), expected, rtol=1e-5, atol=1e-5)
    lora.unload(again)
    assert isinstance(again.transformer.h[0].attn.c_proj, Conv1D)
    torch.testing.assert_close(answer(again), expected, rtol=1e-5, atol=1e-5)
    assert again.transformer.h[0].attn.c_attn.weight.shape == (16, 48)


def test_a_portable_adapter_has_one_rank_and_one_scaling(tmp_path):
    settings = {
        **copy.deepcopy(VARIANTS["patterns"]),
        "target_modules": ["embed", "up", "down", "head"],
        "use_rslora": True,
    }
    del settings["alpha_pattern"]["conv.*"]
    ours = mixed()
    lora.adapt(ours, r=4, lora_alpha=6, **settings)
    draw(ours)
    (tmp_path / "ours").mkdir()
    save_adapter(ours, tmp_path / "ours", "mixed")
    make_portable(tmp_path / "ours", tmp_path / "portable")
    config = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    ranks = {t.shape[0] for k, t in load_file(tmp_path / "portable" / "adapter_model.safetensors").items() if "_A" in k}
    assert ranks == {config["r"]} == {5}
    theirs = quietly(peft.PeftModel.from_pretrained, mixed(), tmp_path / "portable")
    torch.testing.assert_close(answer(theirs), answer(ours), rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match="is not empty"):
        make_portable(tmp_path / "ours", tmp_path / "portable")

    dora = mixed()
    lora.adapt(dora, ["up"], use_dora=True)
    save_adapter(dora, tmp_path, "mixed")
    with pytest.raises(AdapterError, match="uses use_dora, which has no portable form"):
        make_portable(tmp_path, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_named_adapters_lie_in_subfolders(tmp_path):
    ours = mixed()
    lora.adapt(ours, ["up"], r=2)
    lora.adapt(ours, ["down"], r=3, adapter_name="style")
    for name in ("default", "style"):
        save_adapter(ours, tmp_path, "mixed", adapter_name=name)
    theirs = peft.PeftModel.from_pretrained(mixed(), tmp_path)
    theirs.load_adapter(tmp_path / "style", "style")
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    again = mixed()
    load_adapter(again, tmp_path / "theirs")
    load_adapter(again, tmp_path / "theirs" / "style", adapter_name="style")
    assert lora.adapter_names(again) == ["default", "style"]
    assert lora.active_adapters(again) == {"default": 1.0}


def test_what_does_not_fit_is_listed_and_nothing_is_changed(tmp_path):
    ours = mixed()
    lora.adapt(ours, ["up", "embed"], modules_to_save=["head"], bias="lora_only")
    save_adapter(ours, tmp_path, "mixed")
    other = mixed()
    other.embed = nn.Embedding(21, 12)
    other.head = nn.Linear(8, 6)
    other.blocks[0]["up"].bias = None
    modules = dict(other.named_modules())
    with pytest.raises(AdapterError) as error:
        load_adapter(other, tmp_path)
    message = str(error.value)
    assert "embed has A (8, 20)" in message
    assert "blocks.0.up has a bias of 10, which the model's layer has not" in message
    assert "head.bias has shape (5,), the model's is (6,)" in message
    assert dict(other.named_modules()) == modules

    groups = quietly(peft.get_peft_model, mixed(), peft.LoraConfig(r=4, target_modules=["grouped"]))
    quietly(groups.save_pretrained, tmp_path / "groups")
    with pytest.raises(AdapterError, match="mixes the channels of its 2 groups"):
        load_adapter(mixed(), tmp_path / "groups")
    legacy = nn.Sequential(lora.Conv2d(2, 2, 3, r=2))
    with pytest.raises(AdapterError, match="no PEFT form"):
        save_adapter(legacy, tmp_path, "legacy")


def test_a_head_tied_to_the_embeddings_trains_apart_and_comes_back(tmp_path):
    def tied():
        return tiny_model("llama", "sdpa", tie_word_embeddings=True)

    ours, base = tied(), answer(tied())
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    lora.adapt(ours, ["q_proj"], r=2, modules_to_save=["lm_head"])
    draw(ours, 0.05)
    assert torch.equal(ours.model.embed_tokens.weight, tied().model.embed_tokens.weight)
    save_adapter(ours, tmp_path, "tiny")
    for load in (load_adapter, lambda model, folder: quietly(peft.PeftModel.from_pretrained, model, folder)):
        again = tied()
        load(again, tmp_path)
        torch.testing.assert_close(answer(again), answer(ours), rtol=1e-5, atol=1e-5)
    again = tied()
    load_adapter(again, tmp_path)
    load_adapter(again, tmp_path, adapter_name="second")
    lora.set_adapter(again, "second")
    torch.testing.assert_close(answer(again), answer(ours), rtol=1e-5, atol=1e-5)
    with lora.disabled(again):
        assert torch.equal(answer(again), base)
    lora.load_lora_state_dict(tied_again := tied(), tied().state_dict())
    assert torch.equal(answer(tied_again), base)


def test_modules_to_save_are_endings_as_in_peft(tmp_path):
    theirs = peft.get_peft_model(
        tiny_model("llama", "sdpa"), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    )
    draw(theirs, 0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny_model("llama", "sdpa")
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(answer(ours), answer(theirs), rtol=1e-5, atol=1e-5)
    one = tiny_model("llama", "sdpa")
    lora.adapt(one, ["q_proj"], modules_to_save=["model.norm"])
    draw(one, 0.05)
    save_adapter(one, tmp_path, "tiny")
    again = peft.PeftModel.from_pretrained(tiny_model("llama", "sdpa"), tmp_path)
    torch.testing.assert_close(answer(again), answer(one), rtol=1e-5, atol=1e-5)


def test_a_pattern_for_a_top_layer_does_not_reach_its_namesakes(tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.block = nn.Linear(4, 4), nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)})

        def forward(self, ids):
            return self.block["fc2"](self.block["fc1"](self.fc1(ids.float()[..., :4])))

    def nested():
        torch.manual_seed(0)
        return Nested().requires_grad_(False)

    ours = nested()
    lora.adapt(ours, ["fc1", "fc2"], r=2, lora_alpha=2, alpha_pattern={"^fc1": 16}, rank_pattern={"^fc1": 3})
    assert (ours.fc1.scaling, ours.block["fc1"].scaling) == (16 / 3, 1)
    draw(ours)
    save_adapter(ours, tmp_path, "nested")
    again = nested()
    load_adapter(again, tmp_path)
    theirs = peft.PeftModel.from_pretrained(nested(), tmp_path)
    for model in (again, theirs):
        torch.testing.assert_close(answer(model), answer(ours), rtol=1e-5, atol=1e-5)


def test_convolutions_that_peft_computes_differently_are_refused(tmp_path):
    for kwargs in ({"dilation": 2}, {"padding_mode": "circular", "padding": 1}):
        model = nn.Sequential(nn.Conv1d(2, 2, 3, **kwargs))
        lora.adapt(model, ["0"])
        with pytest.raises(AdapterError, match="PEFT computes dilated or non-zero-padded convolutions differently"):
            save_adapter(model, tmp_path, "conv")
    assert not list(tmp_path.iterdir())


def test_layers_that_compute_in_their_own_way_are_refused_on_load_too(tmp_path):
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 3 * super().forward(ids)

    ours = mixed()
    lora.adapt(ours, ["embed"], r=2)
    save_adapter(ours, tmp_path, "mixed")
    other = mixed()
    other.embed = Scaled(20, 12)
    with pytest.raises(AdapterError, match="embed: Scaled computes in a way of its own"):
        load_adapter(other, tmp_path)
    assert type(other.embed) is Scaled


def test_whole_modules_with_buffers_and_recurrent_biases_come_back(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.lstm, self.norm = nn.Linear(4, 4), nn.LSTM(4, 4), nn.BatchNorm1d(4)
            self.norm.register_buffer("scale", torch.ones(4), persistent=False)

        def forward(self, ids):
            return self.norm(self.lstm(self.up(ids.float()[:, :4]))[0])

    def model():
        torch.manual_seed(0)
        return Model().requires_grad_(False).eval()

    ours = model()
    lora.adapt(ours, ["up"], r=2, lora_dropout=0.25, modules_to_save=["norm"], bias="all")
    assert {n for n, p in ours.named_parameters() if p.requires_grad} >= {
        "lstm.bias_ih_l0",
        "lstm.bias_hh_l0",
        "up.bias",
    }
    draw(ours)
    ours.norm.active_module.running_mean += 1
    save_adapter(ours, tmp_path, "model")
    again = model()
    config = load_adapter(again, tmp_path)
    torch.testing.assert_close(answer(again), answer(ours))
    assert (config["lora_dropout"], config["bias"]) == (0.25, "all")


def test_the_dropout_that_is_written_is_that_of_the_layers_that_have_one(tmp_path):
    ours = mixed()
    lora.adapt(ours, ["embed", "up"], lora_dropout=0.1)
    save_adapter(ours, tmp_path, "mixed")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.1


@pytest.mark.parametrize("suffix", ["lora_A.weight", "lora_B.weight"])
def test_a_tensor_that_is_missing_is_named(tmp_path, suffix):
    ours, missing = mixed(), f"base_model.model.blocks.1.up.{suffix}"
    lora.adapt(ours, ["up"], r=4)
    save_adapter(ours, tmp_path, "mixed")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for damaged in ({n: t for n, t in tensors.items() if n != missing}, {**tensors, missing: torch.tensor(1.0)}):
        save_file(damaged, path)
        with pytest.raises(AdapterError) as error:
            load_adapter(mixed(), tmp_path)
        said = f"missing {missing}" if missing not in damaged else "blocks.1.up has A"
        assert said in str(error.value)
        assert "adapter_config.json" not in str(error.value), "the configuration is blameless"
        with pytest.raises(AdapterError, match=f"{re.escape(missing)} is missing, or no matrix"):
            make_portable(tmp_path, tmp_path / "portable")


def test_a_bias_that_is_a_lone_number_is_named(tmp_path):
    ours, name = mixed(), "base_model.model.blocks.1.up.base_layer.bias"
    lora.adapt(ours, ["up"], r=4, bias="lora_only")
    save_adapter(ours, tmp_path, "mixed")
    path = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(path), name: torch.tensor(1.0)}, path)
    with pytest.raises(AdapterError, match=r"blocks\.1\.up has a bias of 1, which the model's layer has not"):
        load_adapter(mixed(), tmp_path)
