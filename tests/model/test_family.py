"""Flat batches against rows run one by one through transformers' own attention and head."""

import copy

import pytest
import torch
from conftest import draw_lora_B, relative_error, tiny_config, tiny_model

from phinetune import lora
from phinetune.data import Example
from phinetune.model import flat_batches, loss_sum, takes_flat_batches
from phinetune.model.family import FLAT_FAMILIES, long_rope_boundary


def random_examples(lengths, vocab=500):
    torch.manual_seed(3)
    return [
        Example(f"row {i}", torch.randint(3, vocab, (length,)).tolist(), [j > length // 3 for j in range(length)])
        for i, length in enumerate(lengths)
    ]


def losses_row_by_row(model, examples):
    """Σ −log p of the supervised tokens, from transformers' logits."""
    total = 0
    for example in examples:
        ids = torch.tensor([example.ids])
        log_p = model(ids, use_cache=False).logits[0].log_softmax(-1)
        learnt = torch.tensor([i for i, on in enumerate(example.mask) if on and i > 0])
        total = total - log_p[learnt - 1, ids[0, learnt]].sum()
    return total


@pytest.mark.parametrize("family", sorted(FLAT_FAMILIES))
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_any_layout_gives_the_loss_and_gradient_of_rows_one_by_one(family, max_tokens):
    model = tiny_model(family)
    assert takes_flat_batches(model)
    lora.adapt(model, "all-linear", r=2)
    draw_lora_B(model, std=0.1)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    examples = random_examples([5, 17, 30, 9, 2])
    reference = losses_row_by_row(plain, examples)
    reference.backward()
    total = 0.0
    for batch in flat_batches(model, examples, max_tokens):
        loss = loss_sum(model, batch)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(reference.item(), rel=1e-5)
    for (name, ours), (_, theirs) in zip(lora.lora_layers(model), lora.lora_layers(plain), strict=True):
        assert relative_error(ours.lora_A.grad, theirs.lora_A.grad) < 1e-4, name
        assert relative_error(ours.lora_B.grad, theirs.lora_B.grad) < 1e-4, name


def test_a_sliding_window_is_kept():
    model = tiny_model("phi3", sliding_window=6)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    examples = random_examples([4, 25, 40])
    (batch,) = flat_batches(model, examples, 1000)
    assert loss_sum(model, batch).item() == pytest.approx(losses_row_by_row(plain, examples).item(), rel=1e-5)
    whole = tiny_model("phi3", sliding_window=None)
    assert loss_sum(whole, batch).item() != pytest.approx(loss_sum(model, batch).item(), rel=1e-3), "the window is felt"


def test_rows_on_both_sides_of_the_longrope_boundary_are_never_together():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 20,
    }
    model = tiny_model("phi3", rope_parameters=rope, max_position_embeddings=80, original_max_position_embeddings=20)
    assert long_rope_boundary(model.config) == 20
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    examples = random_examples([10, 25, 15, 40, 20, 21])
    batches = flat_batches(model, examples, 1000)
    assert len(batches) == 2
    total = sum(loss_sum(model, batch).item() for batch in batches)
    assert total == pytest.approx(losses_row_by_row(plain, examples).item(), rel=1e-5)


def test_any_other_causal_lm_takes_the_general_path():
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert not takes_flat_batches(model)
    examples = random_examples([5, 12])
    total = sum(loss_sum(model, batch).item() for batch in flat_batches(model, examples, 1000))
    assert total == pytest.approx(losses_row_by_row(model, examples).item(), rel=1e-5)


def test_full_size_shapes_of_the_family():
    from phinetune.model import fused_parts

    mini = tiny_config("phi3", hidden_size=3072, num_attention_heads=32, num_key_value_heads=32, head_dim=None)
    assert fused_parts(mini)["qkv_proj"] == {"q_proj": 3072, "k_proj": 3072, "v_proj": 3072}
    medium = tiny_config("phi3", hidden_size=5120, num_attention_heads=40, num_key_value_heads=10, head_dim=None)
    assert fused_parts(medium)["qkv_proj"] == {"q_proj": 5120, "k_proj": 1280, "v_proj": 1280}
    assert fused_parts(tiny_config("llama")) == {}


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize("max_tokens", [5000, 16_000])
@pytest.mark.parametrize(
    "settings",
    [
        {"sliding_window": 2047, "max_position_embeddings": 8192},
        {
            "rope_parameters": LONG_ROPE,
            "original_max_position_embeddings": 4096,
            "max_position_embeddings": 131_072,
            "sliding_window": None,
        },
    ],
    ids=["sliding window 2047", "longrope at 4096"],
)
def test_packs_of_long_rows_around_phi3s_boundaries(settings, max_tokens):
    """1,900 and 2,100 tokens lie around the window, 4,000 and 4,200 around LongRoPE's boundary."""
    model = tiny_model("phi3", vocab_size=512, num_hidden_layers=2, **settings)
    lora.adapt(model, "all-linear", r=2)
    draw_lora_B(model, std=0.1)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    examples = random_examples([1900, 2100, 4000, 4200])
    reference = losses_row_by_row(plain, examples)
    reference.backward()
    total, sizes = 0.0, []
    for batch in flat_batches(model, examples, max_tokens):
        loss = loss_sum(model, batch)
        loss.backward()
        total += loss.item()
        sizes.append(len(batch.paths))
    assert max(sizes) >= 2, "several rows lie in one line"
    assert total == pytest.approx(reference.item(), rel=1e-5)
    for (name, ours), (_, theirs) in zip(lora.lora_layers(model), lora.lora_layers(plain), strict=True):
        assert relative_error(ours.lora_A.grad, theirs.lora_A.grad) < 1e-5, name
        assert relative_error(ours.lora_B.grad, theirs.lora_B.grad) < 1e-5, name
