"""PEFT as the oracle: the same weights give the same loss, gradients, updates and logits."""

import copy
import json

import peft
import pytest
import torch
from conftest import draw_lora_B, relative_error, tiny_model

from phinetune import lora
from phinetune.adapter import load_adapter, save_adapter
from phinetune.data import Example, supervised_tokens
from phinetune.errors import AdapterError
from phinetune.model import adapt_model, flat_batches, fused_parts, loss_sum
from phinetune.recipe import PeftConfig
from phinetune.train import training_step

PREFIX = "base_model.model."


def random_examples(lengths, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [
        Example(f"row {i}", torch.randint(3, 900, (n,), generator=generator).tolist(), [j > n // 2 for j in range(n)])
        for i, n in enumerate(lengths)
    ]


def peft_twin(model, r, lora_alpha):
    """The same base under PEFT, with the LoRA weights that `model` (adapted with all-linear) has."""
    base = copy.deepcopy(model)
    lora_weights = {name: (layer.lora_A, layer.lora_B) for name, layer in lora.lora_layers(base)}
    for name, layer in list(lora.lora_layers(base)):
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = layer.weight, layer.bias
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, plain)
    base.set_attn_implementation("eager")
    twin = peft.get_peft_model(base, peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules="all-linear"))
    with torch.no_grad():
        for name, (lora_A, lora_B) in lora_weights.items():
            layer = twin.get_submodule(PREFIX + name)
            layer.lora_A["default"].weight.copy_(lora_A)
            layer.lora_B["default"].weight.copy_(lora_B)
    return twin


def peft_loss(twin, examples):
    """A padded batch and transformers' logits; the mean over all supervised tokens."""
    width = max(len(e.ids) for e in examples)
    ids = torch.tensor([[*e.ids, *[0] * (width - len(e.ids))] for e in examples])
    attention = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in examples])
    labels = torch.full_like(ids, -100)
    for row, e in enumerate(examples):
        for i, on in enumerate(e.mask):
            if on and i > 0:
                labels[row, i] = e.ids[i]
    logits = twin(input_ids=ids, attention_mask=attention, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def gradients(twin, name):
    layer = twin.get_submodule(PREFIX + name)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def adapted(family, **changes):
    model = tiny_model(family, **changes)
    adapt_model(model, PeftConfig(r=4, lora_alpha=8, lora_dropout=0), seed=1)
    draw_lora_B(model)
    return model


def compare_gradients(model, twin, examples, max_tokens, tolerance):
    reference = peft_loss(twin, examples)
    reference.backward()
    total = 0.0
    for batch in flat_batches(model, examples, max_tokens):
        loss = loss_sum(model, batch) / supervised_tokens(examples)
        loss.backward()
        total += loss.item()
    assert abs(total - reference.item()) <= tolerance * abs(reference.item())
    worst = 0.0
    for name, layer in lora.lora_layers(model):
        for ours, theirs in zip((layer.lora_A, layer.lora_B), gradients(twin, name), strict=True):
            error = relative_error(ours.grad, theirs.grad)
            assert error <= tolerance, name  # each: the largest of numbers and NaN may be a number
            worst = max(worst, error)
    return worst


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("max_tokens", [1, 50, 4096])
def test_loss_and_every_gradient(family, max_tokens):
    model = adapted(family)
    compare_gradients(model, peft_twin(model, 4, 8), random_examples([7, 30, 12, 21, 5]), max_tokens, 1e-5)


def test_loss_and_every_gradient_on_the_real_model(smollm2_tokenizer):
    """SmolLM2-135M in fp32 on shipped rows."""
    from phinetune.data import prepare
    from phinetune.model import load_model
    from phinetune.recipe import DataConfig, ModelKwargs

    model = load_model("smollm2", ModelKwargs(dtype="float32"))
    adapt_model(model, PeftConfig(r=16, lora_alpha=32, lora_dropout=0), seed=1)
    draw_lora_B(model)
    examples = prepare(DataConfig(train="phinetune:orders/eval"), smollm2_tokenizer, 0).train[:3]
    print(compare_gradients(model, peft_twin(model, 16, 32), examples, 200, 1e-5))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("max_tokens", [1, 64])
def test_twenty_adamw_steps(family, max_tokens):
    model = adapted(family)
    twin = peft_twin(model, 4, 8)
    steps = [random_examples([9, 14, 23, 6], seed) for seed in range(20)]
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    ours = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings)
    theirs = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], **settings)
    for examples in steps:
        training_step(
            model, ours, examples, learning_rate=1e-3, max_grad_norm=1.0, max_batch_tokens=max_tokens, seed=(0,)
        )
        peft_loss(twin, examples).backward()
        torch.nn.utils.clip_grad_norm_([p for p in twin.parameters() if p.requires_grad], 1.0)
        theirs.step()
        theirs.zero_grad()
    for name, layer in lora.lora_layers(model):
        for mine, reference in zip((layer.lora_A, layer.lora_B), gradients(twin, name), strict=True):
            assert relative_error(mine.detach(), reference.detach()) <= 1e-5, name


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"target_modules": ["q_proj", "layers.1.mlp.down_proj"], "use_rslora": True}),
        ("llama", {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {r"layers\.1\..*up_proj": 3.0}}),
        ("phi3", {}),
        ("phi3", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}),
        ("phi3", {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True}),
        ("phi3", {"target_modules": ["k_proj", "down_proj"], "rank_pattern": {"down_proj": 7}}),
    ],
)
def test_a_saved_adapter_gives_peft_our_logits_and_comes_back(tmp_path, family, settings):
    config = PeftConfig(r=4, lora_alpha=6, lora_dropout=0, **settings)
    model = tiny_model(family)
    adapt_model(model, config, seed=1)
    draw_lora_B(model, std=0.2)
    ids = torch.randint(3, 900, (2, 11))
    with torch.no_grad():
        ours, base = model(ids).logits, tiny_model(family)(ids).logits
        save_adapter(model, tmp_path, "tiny")
        theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path)(ids).logits
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
        assert (ours - base).abs().max() > 0.01, "the adapter does something"
        with lora.fused(model):
            torch.testing.assert_close(model(ids).logits, ours, rtol=1e-4, atol=1e-4)
        again = tiny_model(family)
        load_adapter(again, tmp_path, fused_parts(again.config))
        torch.testing.assert_close(again(ids).logits, ours, rtol=1e-5, atol=1e-5)
    kinds = {name: type(layer) for name, layer in lora.lora_layers(model)}
    assert {name: type(layer) for name, layer in lora.lora_layers(again)} == kinds


def test_an_adapter_made_by_peft_is_read(tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 6})
    theirs = peft.get_peft_model(tiny_model("llama"), config)
    torch.manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model("llama")
    load_adapter(ours, tmp_path)
    ids = torch.randint(3, 900, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_damaged_and_foreign_adapters_are_refused(tmp_path):
    config = PeftConfig(r=4)
    model = tiny_model("llama")
    adapt_model(model, config, seed=1)
    save_adapter(model, tmp_path, "tiny")
    with pytest.raises(AdapterError, match="which the model has not"):
        load_adapter(tiny_model("phi3"), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for name, value in (("lora_bias", True), ("init_lora_weights", "pissa_niter_4")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, name: value}))
        with pytest.raises(AdapterError, match=f"{name}={value!r} is not supported"):
            load_adapter(tiny_model("llama"), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    tensors = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(tensors[: len(tensors) // 2])
    with pytest.raises(AdapterError, match="is damaged"):
        load_adapter(tiny_model("llama"), tmp_path)
    with pytest.raises(AdapterError, match="holds no adapter"):
        load_adapter(tiny_model("llama"), tmp_path / "nowhere")
