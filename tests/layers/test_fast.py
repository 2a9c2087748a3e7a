"""Fast decoder layers against transformers' own with the same LoRA layers in them."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import draw_lora_B, relative_error, tiny_model

from phinetune import lora
from phinetune.data import Example, lay_out
from phinetune.kernels import compiled
from phinetune.layers import fast
from phinetune.model import fused_parts, load, loss_sum

FAMILIES = ["llama", "mistral", "phi3", "qwen2"]
CONFIGS = {
    "seven names": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "two of them": {"target_modules": ["v_proj", "down_proj"]},
    "unequal ranks": {"target_modules": "all-linear", "rank_pattern": {"o_proj": 3}, "use_rslora": True},
    "pissa": {"target_modules": "all-linear", "init_lora_weights": "pissa"},
}
BEGINNING = list(range(50, 80))
ROUNDED = 1e-2  # of bfloat16, relative by norm


def examples():
    torch.manual_seed(3)
    drawn = [torch.randint(3, 500, (n,)).tolist() for n in (5, 17, 30, 9, 2)]
    drawn += [BEGINNING + row for row in drawn[:3]] + [BEGINNING + drawn[0] + drawn[1]]
    return [Example(f"row {i}", ids, [j > len(ids) // 3 for j in range(len(ids))]) for i, ids in enumerate(drawn)]


def pair(family, settings, **changes):
    """(with fast layers, with transformers' own and packed attention through its interface)."""
    plain = tiny_model(family, **changes)
    lora.adapt(plain, r=2, fused=fused_parts(plain.config), **settings)
    draw_lora_B(plain, std=0.1)
    model = copy.deepcopy(plain)
    assert fast.install(model) == 2
    return model, plain


def gradients(model, rows, max_tokens, least_shared):
    total = 0.0
    for batch in lay_out(rows, max_tokens, None, least_shared):
        loss = loss_sum(model, batch)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_shared_beginnings_or_not(family, settings):
    model, plain = pair(family, settings)
    expected, of_plain = gradients(plain, examples(), 1, 0)  # a row at a time
    for max_tokens, least_shared in ((1, 0), (60, 0), (10_000, 0), (10_000, 4), (80, 4)):
        model.zero_grad()
        loss, of_fast = gradients(model, examples(), max_tokens, least_shared)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert of_fast.keys() == of_plain.keys()
        for name, gradient in of_fast.items():
            assert relative_error(gradient, of_plain[name]) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_pieces_change_nothing(family, monkeypatch):
    model, plain = pair(family, CONFIGS["seven names"])
    monkeypatch.setattr(compiled, "SMALLEST", 1)
    expected, of_plain = gradients(plain, examples(), 1, 0)
    loss, of_fast = gradients(model, examples(), 10_000, 4)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in of_fast.items():
        assert relative_error(gradient, of_plain[name]) < 1e-5, name


def test_layers_really_take_the_fast_path(monkeypatch):
    model, _ = pair("llama", CONFIGS["all-linear"])
    monkeypatch.setattr(torch.nn.Linear, "forward", None)  # calling it would fail, as would a LoRA layer's
    monkeypatch.setattr(lora.Linear, "forward", None)
    gradients(model, examples(), 10_000, 4)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.3}, {"bias": "lora_only"}], ids=str)
def test_what_the_fast_path_does_not_know_goes_to_the_layers(settings):
    """DoRA isn't a product; trained biases get their gradient; dropout is drawn, of the right expectation."""
    model, plain = pair("qwen2", {"target_modules": "all-linear", **settings})
    expected, of_plain = gradients(plain, examples(), 10_000, 0)
    loss, of_fast = gradients(model, examples(), 10_000, 0)
    assert loss == pytest.approx(expected, rel=1e-5)  # dropout is off in eval mode
    for name, gradient in of_fast.items():
        assert relative_error(gradient, of_plain[name]) < 1e-5, name
    if "lora_dropout" in settings:
        model.train()
        losses, rows = [], examples()
        for seed in range(200):
            torch.manual_seed(seed)
            with torch.no_grad():
                losses.append(sum(loss_sum(model, batch).item() for batch in lay_out(rows, 10_000)))
        spread = torch.tensor(losses).std().item()
        assert spread > 0
        assert sum(losses) / len(losses) == pytest.approx(expected, abs=spread)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_hidden_states_and_state_dict_are_transformers(family):
    model, plain = pair(family, CONFIGS["all-linear"])
    assert model.state_dict().keys() == plain.state_dict().keys()
    ids = torch.tensor([[5, 9, 44, 3]])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))
    states = [m(ids, output_hidden_states=True).hidden_states for m in (model, plain)]
    assert len(states[0]) == len(states[1]) == 3
    for ours, theirs in zip(*states, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_norm_is_transformers_but_for_rounding(family):
    model, plain = (made.to(torch.bfloat16) for made in pair(family, CONFIGS["all-linear"]))
    assert type(model.model.norm).__name__ == type(plain.model.norm).__name__
    assert type(model.model.norm) is not type(plain.model.norm)
    assert type(model.model.layers[0].input_layernorm) is type(plain.model.norm)
    x = torch.randn(1, 40, plain.config.hidden_size).bfloat16()
    results = []
    for norm in (model.model.norm, plain.model.norm):
        own = x.clone().requires_grad_()
        y = norm(own)
        y.backward(torch.ones_like(y))
        results.append((y.double(), own.grad.double()))
        with torch.no_grad():
            assert torch.equal(norm(x), plain.model.norm(x))
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < ROUNDED


def test_the_last_norm_has_second_gradients_and_is_transformed():
    model, plain = (made.to(torch.bfloat16) for made in pair("llama", CONFIGS["all-linear"]))
    torch.manual_seed(0)
    x, v = torch.randn(2, 1, 40, plain.config.hidden_size).bfloat16()
    seconds, transformed = [], []
    exact = functools.partial(
        F.rms_norm, normalized_shape=x.shape[-1:], eps=plain.config.rms_norm_eps
    )  # its weight is 1
    for norm, dtype in ((model.model.norm, x.dtype), (plain.model.norm, x.dtype), (exact, torch.float64)):
        own = x.to(dtype).requires_grad_()
        (first,) = torch.autograd.grad((norm(own) ** 3).sum(), own, create_graph=True)
        seconds.append(torch.autograd.grad((first * v).sum(), own)[0])
        transformed.append(torch.func.grad(lambda x, norm=norm: (norm(x) ** 3).sum())(x.to(dtype)))
    assert relative_error(seconds[0], seconds[2]) < ROUNDED
    assert relative_error(seconds[1], seconds[2]) < ROUNDED
    assert torch.equal(*transformed[:2])


def test_layers_are_given_back():
    model, plain = pair("phi3", CONFIGS["all-linear"])
    fast.uninstall(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_gradient_checkpointing_gives_the_same_gradients():
    model, _ = pair("phi3", CONFIGS["seven names"])
    model.train()
    loss, expected = gradients(model, examples(), 10_000, 4)
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    again, recomputed = gradients(model, examples(), 10_000, 4)
    assert again == loss
    for name, gradient in recomputed.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize(
    ("model_type", "kernels", "rate", "dtype", "warns"),
    [
        ("phi3", True, 0.1, "float32", False),  # trained as fast in bfloat16, by kernels
        ("phi3", False, 0.1, "float32", True),
        ("phi3", False, 2.9, "bfloat16", False),
        ("gpt2", True, 0.1, "float32", True),  # its layers are torch's
        ("gpt2", True, 2.9, "bfloat16", False),
    ],
)
def test_auto_is_the_dtype_in_which_torch_multiplies_faster(
    monkeypatch, caplog, model_type, kernels, rate, dtype, warns
):
    monkeypatch.setattr(load.native, "library", lambda name: object() if kernels else None)
    monkeypatch.setattr(load, "bfloat16_speed", lambda: rate)
    assert load.resolve_dtype("auto", torch.device("cpu")) == dtype
    assert load.resolve_dtype("bfloat16", torch.device("cpu"), model_type) == "bfloat16"
    assert ("float32 is faster here" in caplog.text) == warns


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_gpu_before_ampere_trains_in_float32(monkeypatch, caplog, has_bfloat16):
    monkeypatch.setattr(load, "gpu_has_bfloat16", lambda: has_bfloat16)
    assert load.resolve_dtype("auto", torch.device("cuda")) == ("bfloat16" if has_bfloat16 else "float32")
    assert load.resolve_dtype("bfloat16", torch.device("cuda"), "phi3") == "bfloat16"
    assert ("float32 is faster here" in caplog.text) != has_bfloat16


def test_somebody_elses_attention_and_hooks_on_its_parts_are_honoured():
    """PEFT's AdaptionPrompt puts its own module around attention; whoever watches a part sees its calls."""
    import peft

    import phinetune

    torch.manual_seed(0)
    ids, positions = torch.arange(20)[None], torch.cat([torch.arange(9), torch.arange(11)])[None]
    plain = peft.get_peft_model(
        tiny_model("llama"), peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    )
    reference = plain(input_ids=ids, position_ids=positions).logits
    accelerated = phinetune.accelerate(plain)
    assert relative_error(accelerated(input_ids=ids, position_ids=positions).logits, reference) < 1e-5

    model, seen = phinetune.accelerate(tiny_model("llama")), []
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    model(input_ids=ids, position_ids=positions, use_cache=False)
    assert len(seen) == 1


def test_a_step_outdates_merged_weights():
    """As torch's fused optimisers step: without a trace on the parameters."""
    model, _ = pair("llama", {"target_modules": "all-linear"})
    model.eval()
    rows = examples()
    lora.fuse(model)
    with torch.no_grad():
        before = loss_sum(model, lay_out(rows, 512)[0]).item()
    loss_sum(model, lay_out(rows, 512)[0]).backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(0.3)
    with torch.no_grad():
        after = loss_sum(model, lay_out(rows, 512)[0]).item()
        lora.unfuse(model)
        expected = loss_sum(model, lay_out(rows, 512)[0]).item()
    assert after == pytest.approx(expected, rel=1e-4)
    assert after != pytest.approx(before, rel=1e-2)
