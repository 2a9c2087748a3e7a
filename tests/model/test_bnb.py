"""QLoRA: 4-bit weights are bitsandbytes' own, bit for bit, and so are 8-bit ones, which `load_in_8bit` means on a GPU;
models on them train, resume and are saved."""

import copy
import json
import pickle

import bitsandbytes
import commands
import pytest
import torch
from conftest import draw_lora_B, relative_error, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from phinetune import lora
from phinetune.data import Example
from phinetune.errors import ModelError, RecipeError
from phinetune.kernels import bnb
from phinetune.model import adapt_model, flat_batches, load_model, loss_sum, quantised_layers
from phinetune.model.quantise import dequantise_layers, quantise_by_bitsandbytes
from phinetune.recipe import ModelKwargs, PeftConfig, make_recipe

KINDS = [("nf4", True), ("nf4", False), ("fp4", True)]


def theirs(weight, quant_type, double_quant, compute_dtype):
    """bitsandbytes' layer, by its own class."""
    layer = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=True, compute_dtype=compute_dtype,
        compress_statistics=double_quant, quant_type=quant_type,
    )  # fmt: skip
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, compress_statistics=double_quant, quant_type=quant_type
    )
    with torch.no_grad():
        layer.bias.normal_()
    layer.bias.requires_grad_(False)
    return layer.to("cpu").train()


@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_bitsandbytes_own(quant_type, double_quant, dtype):
    torch.manual_seed(0)
    weight = torch.randn(96, 128, dtype=dtype)
    other = theirs(weight, quant_type, double_quant, torch.float32)
    ours = nn.Linear(128, 96)
    ours.weight = nn.Parameter(bnb.quantise_4bit(weight, quant_type, double_quant, torch.float32), requires_grad=False)
    ours.bias = other.bias
    plain = bitsandbytes.functional.dequantize_4bit(other.weight.data, other.weight.quant_state)
    assert torch.equal(ours.weight.dequantise(), plain)
    assert 0.02 < relative_error(plain, weight) < 0.2
    # 12,288 numbers of half a byte; 192 scales of a byte (with a scale and a table of their own) or four; the table
    assert ours.weight.nbytes == 6144 + 64 + (192 + 4 + 1024 + 4 if double_quant else 4 * 192)

    x = torch.randn(3, 7, 128)
    plain_layer = nn.Linear(128, 96)
    plain_layer.weight, plain_layer.bias = nn.Parameter(plain.float(), requires_grad=False), other.bias
    found = []
    for layer in (ours, plain_layer, other):
        given = x.clone().requires_grad_()
        y = layer(given)
        y.square().sum().backward()
        found.append((y.detach(), given.grad))
    # bitsandbytes 0.50 rounds the product with a bfloat16 weight on a CPU, whatever the compute dtype.
    for mine, exact, their_own in zip(*found, strict=True):
        assert relative_error(mine, exact) < 1e-6
        assert relative_error(mine, their_own) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_the_products_are_in_the_compute_dtype_and_what_comes_out_is_not():
    weight = bnb.quantise_4bit(torch.randn(64, 64), compute_dtype=torch.bfloat16)
    x = torch.randn(5, 64)
    y = weight.linear(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, (x.bfloat16() @ weight.dequantise(torch.bfloat16).T).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits_are_a_scale_a_row(dtype):
    torch.manual_seed(0)
    weight = torch.randn(96, 128, dtype=dtype) * torch.linspace(0.01, 3, 96, dtype=dtype)[:, None]
    ours = bnb.quantise_8bit(weight)
    plain = ours.dequantise(torch.float32)
    half_a_step = weight.half().float().abs().amax(1, keepdim=True) / 127 / 2
    rounding = 0 if dtype == torch.float32 else weight.float().abs() * 2**-8  # the weight's own dtype again
    assert ((plain - weight.half().float()).abs() <= half_a_step * 1.001 + rounding).all()
    assert 0.002 < relative_error(plain, weight) < 0.01
    assert ours.nbytes == 96 * 128 + 96 * 4
    codes, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    assert torch.equal(plain, bitsandbytes.functional.int8_vectorwise_dequant(codes, absmax[:, None]).to(dtype).float())

    x = torch.randn(5, 128, dtype=dtype, requires_grad=True)
    y = ours.linear(x)
    assert torch.equal(y, x @ ours.dequantise().T)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.ones_like(y) @ ours.dequantise())
    twin = copy.deepcopy(nn.Parameter(ours, requires_grad=False))
    assert type(twin) is bnb.EightBitWeight
    assert torch.equal(twin.dequantise(), ours.dequantise())
    with pytest.raises(RuntimeError, match="an 8-bit weight has its dtype for good"):
        twin.data = twin.data.to(torch.float64)


def test_copies_stay_in_4_bits():
    layer = nn.Linear(64, 64, bias=False)
    layer.weight = nn.Parameter(bnb.quantise_4bit(torch.randn(64, 64)), requires_grad=False)
    plain = layer.weight.dequantise()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin.weight) is bnb.FourBitWeight
        assert isinstance(twin.weight, nn.Parameter)
        assert torch.equal(twin.weight.dequantise(), plain)
    other = nn.Linear(64, 64, bias=False)
    other.weight = nn.Parameter(bnb.quantise_4bit(torch.randn(64, 64)), requires_grad=False)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight.dequantise(), plain)
    assert torch.equal(layer.weight + 0, plain)
    with pytest.raises(RuntimeError, match="can't be written to"):
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="has its dtype for good"):
        layer.to(torch.float64)
    assert torch.equal(layer.to("cpu").weight.dequantise(), plain)


def in_few_bits(family, bits=4, **kwargs):
    model = tiny_model(family)
    quantise_by_bitsandbytes(model, ModelKwargs(**{f"load_in_{bits}bit": True}, **kwargs), torch.device("cpu"))
    return model


def batch_of(model, lengths=(30, 50)):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 900, (n,), generator=generator).tolist() for n in lengths]
    (batch,) = flat_batches(model, [Example("row", ids, [True] * len(ids)) for ids in rows], 1000)
    return batch


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_loss_and_gradients_are_those_of_the_dequantised_model(family, bits):
    """Fast layers on such weights, fast layers on the same numbers plain, and transformers' own layers on them."""
    model = in_few_bits(family, bits)
    assert type(model.lm_head.weight) is nn.Parameter
    plain = copy.deepcopy(model)
    dequantise_layers(plain)
    slow = copy.deepcopy(plain)
    slow.set_attn_implementation("sdpa")
    found = []
    for one, lengths in ((model, (80,)), (plain, (80,)), (slow, (80,))):
        adapt_model(one, PeftConfig(r=4), seed=1)
        draw_lora_B(one)
        loss = loss_sum(one.train(), batch_of(one, lengths))
        loss.backward()
        found.append((loss.item(), {name: layer.lora_A.grad for name, layer in lora.lora_layers(one)}))
    for loss, gradients in found[1:]:
        assert found[0][0] == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            assert relative_error(found[0][1][name], gradient) < 1e-4, name


def test_a_model_that_comes_in_4_bits_is_taken_over(tmp_path, tiny_llama_folder, smollm2_tokenizer):
    """Saved by transformers with bitsandbytes, as many are on the Hub."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    saved = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32, quantization_config=config)
    saved.save_pretrained(tmp_path)
    smollm2_tokenizer.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), ModelKwargs(dtype="float32"))
    assert len(quantised_layers(model).names) == 14
    for name, module in saved.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            plain = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(model.get_submodule(name).weight.dequantise(), plain)
    ids, plain = torch.arange(3, 40)[None], tiny_model("llama", "sdpa", tie_word_embeddings=True)
    weights = {name: p.dequantise() if hasattr(p, "dequantise") else p for name, p in model.named_parameters()}
    plain.load_state_dict(weights, strict=False)
    with torch.no_grad():
        assert relative_error(model(ids).logits, plain(ids).logits) < 1e-5
    with pytest.raises(ModelError, match="is kept in 4 bits"):
        load_model(str(tmp_path), ModelKwargs(dtype="float32", load_in_8bit=True))


def test_no_product_of_a_model_that_comes_in_4_bits_is_in_float16(tmp_path, tiny_llama_folder, smollm2_tokenizer):
    """In which many were saved, and what flows in bfloat16 overflows."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float16")
    saved = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float16, quantization_config=config)
    saved.save_pretrained(tmp_path)
    smollm2_tokenizer.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), ModelKwargs(dtype="bfloat16"))
    weights = [model.get_submodule(name).weight for name in quantised_layers(model).names]
    assert {weight.compute_dtype for weight in weights} == {torch.bfloat16}
    assert model.get_submodule("model.norm").weight.dtype == torch.bfloat16, "which transformers leaves in float16"


def test_a_model_that_comes_in_8_bits_is_taken_over(tmp_path, tiny_llama_folder, smollm2_tokenizer):
    config = BitsAndBytesConfig(load_in_8bit=True)
    saved = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float16, quantization_config=config)
    saved.save_pretrained(tmp_path)
    smollm2_tokenizer.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), ModelKwargs(dtype="float32"))
    assert len(quantised_layers(model).names) == 14
    assert quantised_layers(model).kinds == ["8 bits, by bitsandbytes"], "whatever the settings say"
    own = load_model(str(tiny_llama_folder), ModelKwargs(dtype="float32"))
    for name, parameter in own.named_parameters():
        taken = model.get_parameter(name)
        assert taken.dtype == torch.float32, "as is asked for, and not as it was saved"
        if isinstance(taken, bnb.EightBitWeight):
            own_few_bits = bnb.quantise_8bit(parameter.half())
            assert torch.equal(taken.codes, own_few_bits.codes)
            assert torch.equal(taken.absmax, own_few_bits.absmax)
    with pytest.raises(ModelError, match="is kept in 8 bits"):
        load_model(str(tmp_path), ModelKwargs(dtype="float32", load_in_4bit=True))


@pytest.fixture(scope="module")
def small_phi3(tmp_path_factory, smollm2_tokenizer):
    folder = tmp_path_factory.mktemp("small-phi3")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("phi3"), dtype=torch.bfloat16).save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_8bit"])
def test_a_phi3_in_nf4_trains_and_resumes_bit_for_bit(small_phi3, chats, tmp_path, optim):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model: {small_phi3}
model_kwargs: {{dtype: bfloat16, load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}}
data: {{train: {chats}, eval: 0.1}}
training_config: {{output_dir: {tmp_path / "whole"}, max_steps: 6, save_strategy: steps, save_steps: 3,
  learning_rate: 2.0e-3, optim: {optim}, logging_steps: 1, use_cpu: true}}
peft_config: {{r: 64, lora_dropout: 0.1}}
"""
    )
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert commands.phinetune("train", recipe).returncode == 0
    assert (
        commands.phinetune("train", recipe, f"output_dir={again}", "--resume", whole / "checkpoint-3").returncode == 0
    )
    for name in ("adapter_model.safetensors", "checkpoint-6/optimizer.safetensors"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    assert "4 bits, by bitsandbytes: 8 of 8 linear layers" in (whole / "train.log").read_text()
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["tuned"]["eval_loss"] < summary["base"]["eval_loss"]
    measured = json.loads(commands.phinetune("evaluate", whole, "--no-answers", "--json").stdout)
    assert measured["tuned"]["eval_loss"] == pytest.approx(summary["tuned"]["eval_loss"], rel=1e-5)


def test_a_quantization_config_is_read():
    given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_threshold=3.0)
    for config in (given, given.to_dict()):
        recipe, words = make_recipe(
            {"model": "smollm2", "data": {"train": "a.jsonl"}, "model_kwargs": {"quantization_config": config}}
        )
        kwargs = recipe.model_kwargs
        assert (kwargs.load_in_4bit, kwargs.bnb_4bit_quant_type, kwargs.bnb_4bit_use_double_quant) == (
            True,
            "fp4",
            False,
        )
        assert kwargs.bnb_4bit_compute_dtype == "bfloat16"
        assert len(words) == 1
        assert "llm_int8_threshold" in words[0]
    both = {"load_in_4bit": True, "load_in_8bit": True, "token": "hf_secret"}
    with pytest.raises(RecipeError, match="can't both be true") as error:
        make_recipe({"model": "a", "data": {"train": "b"}, "model_kwargs": both})
    assert "hf_secret" not in str(error.value)
