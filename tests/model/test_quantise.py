"""Models with int8 weights: their loss, runs from the command line that resume bit for bit, adapters, refusals."""

import copy
import json
import logging

import commands
import peft
import pytest
import torch
from conftest import draw_lora_B, relative_error, tiny_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import phinetune
from phinetune import lora
from phinetune.adapter import load_tuned, save_adapter
from phinetune.data import Example
from phinetune.errors import ModelError
from phinetune.generate import answers
from phinetune.kernels.int8 import Int8Weight
from phinetune.model import adapt_model, flat_batches, fused_parts, load_model, loss_sum
from phinetune.model.quantise import dequantise_layers, quantise_layers, quantised_layers, sample_ids
from phinetune.recipe import ModelKwargs, PeftConfig

LINEARS = {"llama": 7, "phi3": 4}
IDS = torch.arange(3, 67)


def quantised(family, **changes):
    model = tiny_model(family, **changes)
    errors = quantise_layers(model, IDS)
    return model, errors


def batch_of(model, lengths=(30, 50), seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 900, (n,), generator=generator).tolist() for n in lengths]
    (batch,) = flat_batches(model, [Example("row", ids, [True] * len(ids)) for ids in rows], 1000)
    return batch


@pytest.mark.parametrize("family", LINEARS)
def test_loss_and_gradients_are_near_the_plain_models(family):
    (model, errors), plain = quantised(family), tiny_model(family)
    assert len(errors) == 2 * LINEARS[family]
    assert 0.001 < min(errors.values()) <= max(errors.values()) < 0.05
    assert isinstance(model.lm_head.weight, Int8Weight) is False
    assert type(model.model.embed_tokens.weight) is nn.Parameter
    losses, gradients = [], []
    for one in (model, plain):
        adapt_model(one, PeftConfig(r=4), seed=1)
        draw_lora_B(one)
        loss = loss_sum(one.train(), batch_of(one))
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: layer.lora_A.grad for name, layer in lora.lora_layers(one)})
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] != losses[1]
    for name, gradient in gradients[0].items():
        assert relative_error(gradient, gradients[1][name]) < 0.25, name


@pytest.mark.parametrize("family", LINEARS)
def test_flat_batches_give_what_the_general_path_gives(family):
    """Fast layers, and transformers' own with LoRA layers in it, on the same int8 weights."""
    model, _ = quantised(family)
    adapt_model(model, PeftConfig(r=4), seed=1)
    draw_lora_B(model)
    general = copy.deepcopy(model)
    general.set_attn_implementation("sdpa")
    batch = batch_of(model, lengths=(80,))
    fast, slow = loss_sum(model, batch), loss_sum(general, batch)
    assert fast.item() == pytest.approx(slow.item(), rel=0.003)
    assert all(isinstance(layer.weight, Int8Weight) for _, layer in lora.lora_layers(general))


def test_a_layer_that_does_not_bear_int8_stays_and_is_named(caplog):
    """One column of the weight, whose input is always 0, leaves the others no step between 0 and 1/127 of it."""
    model = tiny_model("llama")
    spoilt = model.model.layers[1]
    with torch.no_grad():
        spoilt.input_layernorm.weight[5] = 0
        spoilt.self_attn.k_proj.weight[:, 5] = 1e4
    kept = spoilt.self_attn.k_proj.weight
    with caplog.at_level(logging.WARNING, "phinetune"):
        errors = quantise_layers(model, IDS)
    name = "model.layers.1.self_attn.k_proj"
    assert errors[name] > 0.5
    assert max(error for other, error in errors.items() if other != name) < 0.05
    assert spoilt.self_attn.k_proj.weight is kept
    assert quantised_layers(model).plain == [name]
    assert len(quantised_layers(model).names) == 13
    assert f"{name} stays in float32: an error of " in caplog.text
    assert not any(module._forward_pre_hooks for module in model.modules()), "nothing stays behind"


def test_a_layer_that_no_token_reaches_stays(caplog):
    model = tiny_model("llama")
    model.model.unused = nn.Linear(8, 8)
    quantise_layers(model, IDS)
    assert quantised_layers(model).plain == ["model.unused"]
    assert "model.unused stays in float32: seen by none of the sample's tokens" in caplog.text


def test_dequantised_weights_are_plain_again():
    model, _ = quantised("phi3")
    layer = model.model.layers[0].mlp.down_proj
    rounded = layer.weight.dequantise()
    dequantise_layers(model)
    assert type(layer.weight) is nn.Parameter
    assert torch.equal(layer.weight, rounded)
    assert quantised_layers(model).names == []


def test_adapters_go_in_and_out(tmp_path):
    """save, load, fold in, fold out, unload; state dicts hold int8."""
    model, _ = quantised("phi3")
    adapt_model(model, PeftConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]), seed=1)
    draw_lora_B(model, std=0.1)
    model.config.name_or_path = "tiny"
    ids = IDS[None, :20]
    with torch.no_grad():
        tuned = model(ids).logits
        with lora.disabled(model):
            base = model(ids).logits
    save_adapter(model, tmp_path, "tiny")
    again, _ = quantised("phi3")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, base)
    from phinetune.adapter import load_adapter

    load_adapter(again, tmp_path, fused_parts(again.config))
    state = again.state_dict()
    assert isinstance(state["model.layers.0.mlp.down_proj.weight"], Int8Weight)
    again.load_state_dict(state)
    with torch.no_grad():
        assert relative_error(again(ids).logits, tuned) < 1e-6
        with lora.fused(again):
            assert relative_error(again(ids).logits, tuned) < 0.1
            for _, layer in lora.lora_layers(again):
                assert type(layer._merged_weight()) is torch.Tensor
        assert relative_error(again(ids).logits, tuned) < 1e-6, "folding writes no base weight"
        lora.unload(again)
        assert type(again.model.layers[0].mlp.down_proj.weight) is nn.Parameter
        assert relative_error(again(ids).logits, tuned) < 0.1


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"bias": "all"}])
def test_other_kinds_of_lora_train_on_it(settings):
    model, _ = quantised("llama")
    adapt_model(model, PeftConfig(r=4, **settings), seed=1)
    loss = loss_sum(model.train(), batch_of(model))
    loss.backward()
    assert all(layer.lora_B.grad.norm() > 0 for _, layer in lora.lora_layers(model))


def test_a_run_from_the_command_line_resumes_bit_for_bit(tiny_llama_folder, chats, tmp_path):
    def run(*more):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"""
model: {tiny_llama_folder}
model_kwargs: {{dtype: bfloat16, load_in_8bit: true}}
data: {{train: {chats}, eval: 0.1, max_batch_tokens: 96}}
training_config:
  output_dir: {tmp_path / "whole"}
  max_steps: 6
  save_strategy: steps
  save_steps: 3
  learning_rate: 2.0e-3
  logging_steps: 1
  use_cpu: true
peft_config: {{r: 4, lora_alpha: 8, lora_dropout: 0.1}}
"""
        )
        return commands.phinetune("train", recipe, *more).returncode

    whole, again = tmp_path / "whole", tmp_path / "again"
    assert run() == 0
    assert run(f"output_dir={again}", "--resume", str(whole / "checkpoint-3")) == 0
    files = [folder / "adapter_model.safetensors" for folder in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "load_in_8bit" in (whole / "recipe.yaml").read_text()
    assert "own int8: 14 of 14 linear layers" in (whole / "train.log").read_text()
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["tuned"]["eval_loss"] < summary["base"]["eval_loss"]

    assert run("load_in_8bit=false", "--resume") == 2, "another base makes other updates"

    kwargs = ModelKwargs(dtype="bfloat16", load_in_8bit=True)
    tuned, tokenizer = load_tuned(whole, kwargs)
    assert len(quantised_layers(tuned).names) == 14
    assert isinstance(answers(tuned, tokenizer, [[5, 6, 7], [8, 9]], 4, 2)[0], str)

    theirs = peft.PeftModel.from_pretrained(load_model(str(tiny_llama_folder), ModelKwargs(dtype="float32")), whole)
    plain, _ = load_tuned(whole, ModelKwargs(dtype="float32"))
    with torch.no_grad():
        assert relative_error(plain(IDS[None]).logits, theirs(IDS[None]).logits) < 1e-5


def test_from_python(tiny_llama_folder, chats, tmp_path):
    losses = {}
    for in_8bit in (False, True):
        result = phinetune.finetune(
            model=str(tiny_llama_folder),
            train=str(chats),
            eval=0.1,
            model_kwargs={"load_in_8bit": in_8bit, "dtype": "bfloat16"},
            training_config={
                "output_dir": str(tmp_path / str(in_8bit)), "max_steps": 10, "learning_rate": 2e-3, "use_cpu": True,
            },
            peft_config={"r": 4},
        )  # fmt: skip
        losses[in_8bit] = result.summary["tuned"]["eval_loss"]
    assert losses[True] == pytest.approx(losses[False], rel=0.01)
    assert losses[True] != losses[False]


def test_what_it_is_not_for():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=2)).eval()
    with pytest.raises(ModelError, match="none of its layers"):
        quantise_layers(model, IDS)


def test_the_sample_is_text_where_there_is_a_tokenizer(smollm2_tokenizer):
    ids = sample_ids(smollm2_tokenizer, 49152)
    assert smollm2_tokenizer.decode(ids).startswith("Question: What does")
    assert len(ids) == 64
    for other in (sample_ids(None, 500), sample_ids(smollm2_tokenizer, 500)):
        assert len(other) == 64
        assert other.max() < 500
        assert torch.equal(other, sample_ids(None, 500))
