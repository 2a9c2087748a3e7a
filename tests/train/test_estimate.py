"""What is said of a run before it starts."""

import pytest
import torch
from conftest import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

import phinetune
from phinetune.kernels import native
from phinetune.model import adapt_model
from phinetune.model.memory import Batch
from phinetune.recipe import PeftConfig
from phinetune.train import estimate


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_whose_weights_lie_the_other_way_round_trains(tmp_path, smollm2_tokenizer, dtype):
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=49152, n_positions=128, n_embd=32, n_layer=2, n_head=2, **ids)
    ).save_pretrained(tmp_path / "gpt2")
    smollm2_tokenizer.save_pretrained(tmp_path / "gpt2")
    rows = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"It is {i}"}]}
        for i in range(4)
    ]
    result = phinetune.finetune(
        model=str(tmp_path / "gpt2"), train=rows, model_kwargs={"dtype": dtype}, peft_config={"r": 2},
        training_config={"output_dir": str(tmp_path / "run"), "max_steps": 1, "use_cpu": True, "disable_tqdm": True},
    )  # fmt: skip
    assert result.summary["steps"] == 1


def test_the_rate_is_that_of_the_product_that_a_transposed_layer_makes(monkeypatch):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=600, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    adapt_model(model, PeftConfig(r=2, target_modules=["c_attn"]), seed=0)
    multiplied = []

    def product(a, b):
        multiplied.append((tuple(a.shape), tuple(b.shape)))
        return a @ b

    monkeypatch.setattr(estimate, "product", product)
    assert estimate.product_rate(model) > 0
    assert set(multiplied) == {((512, 32), (32, 96))}, "x (T, in) by Wᵀ (in, out)"


def test_a_run_takes_what_the_largest_of_its_parts_takes(monkeypatch):
    monkeypatch.setattr(estimate, "memory_in_use", lambda device: 0)
    monkeypatch.setattr(estimate, "has_room_to_fold", lambda model: False)
    model = tiny_model("llama", vocab_size=300)
    adapt_model(model, PeftConfig(r=2), seed=0)
    small, large = Batch(64, 64), Batch(4096, 64)
    steps = estimate.expected_gb(model, small)
    assert estimate.expected_gb(model, small, evaluated=small) == steps, "evaluating keeps less than training"
    assert steps < estimate.expected_gb(model, small, evaluated=large) < estimate.expected_gb(model, large)
    few, more = (1e9 * estimate.expected_gb(model, small, answered=tokens) for tokens in (10**6, 2 * 10**6))
    cache, layer = 2 * 2 * 16 * 2, 4 * 64 + 3 * 96  # keys and values of 2 heads of 16 in 2 layers; one layer's own
    assert more - few == pytest.approx(4 * (cache + layer) * 10**6), "float32"
    monkeypatch.setattr(estimate, "has_room_to_fold", lambda model: True)
    folded = 1e9 * estimate.expected_gb(model, small, answered=10**6)
    assert folded - few == pytest.approx(4 * 2 * LAYER), "a copy of what is adapted"


LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96  # q and o, k and v, the MLP's three
HEAD = 300 * 64


@pytest.mark.parametrize(
    ("settings", "of_the_head"), [({}, 4), ({"modules_to_save": ["lm_head"]}, 6), ({"target_modules": ["lm_head"]}, 4)]
)
def test_the_head_is_for_supervised_tokens_alone(monkeypatch, settings, of_the_head):
    """By hand: 2 layers at 4 FLOP a weight and token, the head at 4, or at 6 where its own gradient is a product."""
    monkeypatch.setattr(estimate, "product_rate", lambda model: 1.0)
    monkeypatch.setattr(native, "kernels_for", lambda dtype: [])
    model = tiny_model("llama", vocab_size=300)
    adapt_model(model, PeftConfig(r=2, **settings), seed=0)
    by_hand = 4 * 2 * LAYER * 100 + of_the_head * HEAD * 10
    assert estimate.expected_seconds(model, 100, 10) * estimate.SHARE_OF_RATE == pytest.approx(by_hand)


def test_layers_that_are_not_adapted_count_whichever_way_they_lie(monkeypatch):
    monkeypatch.setattr(estimate, "product_rate", lambda model: 1.0)
    monkeypatch.setattr(native, "kernels_for", lambda dtype: [])
    model = GPT2LMHeadModel(GPT2Config(vocab_size=600, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    adapt_model(model, PeftConfig(r=2, target_modules=["c_attn"]), seed=0)
    by_hand = 4 * (32 * 96 + 32 * 32 + 2 * 32 * 128) * 100 + 4 * 600 * 32 * 10  # c_attn, c_proj, the MLP's two; head
    assert estimate.expected_seconds(model, 100, 10) * estimate.SHARE_OF_RATE == pytest.approx(by_hand)
