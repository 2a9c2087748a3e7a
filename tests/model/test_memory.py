"""What layers keep, counted, and recomputing some of them."""

import json

import pytest
import torch
from conftest import draw_lora_B, tiny_model

import phinetune
from phinetune import lora
from phinetune.data import Example
from phinetune.layers import fast
from phinetune.model import adapt_model, flat_batches, loss_sum
from phinetune.model.memory import (
    Batch,
    bytes_to_come,
    decoder_layers,
    kept_by_a_layer,
    layers_to_recompute,
    recompute,
    recomputed_layers,
)
from phinetune.recipe import PeftConfig

LAYERS = 4


def trainee(family, dropout=0.0, **changes):
    model = tiny_model(family, vocab_size=512, num_hidden_layers=LAYERS, **changes)
    fast.install(model)
    adapt_model(model, PeftConfig(r=2, lora_dropout=dropout), seed=1)
    draw_lora_B(model)
    return model.train()


def batch_of(model, length, rows):
    ids = torch.randint(3, 500, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    (batch,) = flat_batches(model, [Example(f"row {i}", row, [True] * length) for i, row in enumerate(ids)], 1 << 20)
    return batch


def kept(model, batch):
    """Bytes of everything that a forward pass keeps but parameters, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_sum(model, batch)
    return sum(nbytes for nbytes, _ in held.values())


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("length", "rows"), [(64, 8), (256, 4), (1536, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_layer_keeps_is_what_is_said(family, dropout, length, rows, dtype):
    model = trainee(family, dropout, hidden_size=128, head_dim=32, intermediate_size=384).to(dtype)
    batch = batch_of(model, length, rows)
    head = (
        3 * 128 * dtype.itemsize * length * rows
    )  # the last norm's input and output, the gradient of what the head reads
    counted = (kept(model, batch) - head) / LAYERS
    assert 0.95 < kept_by_a_layer(model, Batch(length * rows, length)) / counted < 1.3
    for layers in (1, 3):
        recompute(model, layers)
        assert recomputed_layers(model) == layers
        assert kept(model, batch) - head < (LAYERS - layers + 0.4) * counted  # inputs are kept


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("layers", [1, 3, 4])
def test_gradients_are_the_same_bit_for_bit_under_dropout(family, layers):
    gradients = []
    for number in (0, layers):
        model = trainee(family, dropout=0.2)
        recompute(model, number)
        torch.manual_seed(7)
        loss_sum(model, batch_of(model, 20, 3)).backward()
        gradients.append([(layer.lora_A.grad, layer.lora_B.grad) for _, layer in lora.lora_layers(model)])
    for (a, b), (other_a, other_b) in zip(*gradients, strict=True):
        assert a.norm() > 0
        assert torch.equal(a, other_a)
        assert torch.equal(b, other_b)


def test_the_first_layers_are_recomputed():
    model = trainee("phi3")
    recompute(model, 2)
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [True, True, False, False]
    recompute(model, 0)
    assert recomputed_layers(model) == 0


def test_as_few_layers_as_the_memory_asks_for():
    model = trainee("phi3")
    batch = Batch(4096, 512)
    whole = [bytes_to_come(model, batch, n) for n in range(LAYERS + 1)]
    assert whole[:LAYERS] == sorted(whole[:LAYERS], reverse=True)
    assert len(set(whole[:LAYERS])) == LAYERS
    assert layers_to_recompute(model, batch, whole[0]) == 0
    assert layers_to_recompute(model, batch, whole[0] - 1) == 1
    assert layers_to_recompute(model, batch, whole[2]) == 2
    assert layers_to_recompute(model, batch, 0) == LAYERS
    recompute(model, 2)
    assert bytes_to_come(model, batch) == whole[2]


def test_a_recipe_says_how_many(tiny_llama_folder, chats, tmp_path):
    """All settings give the same bytes; a resume may change them."""
    settings = [
        ("none", {}, None),
        ("all", {"gradient_checkpointing": True}, "2 of 2 layers are recomputed"),
        ("one", {"gradient_checkpointing_layers": 1}, "1 of 2 layers are recomputed"),
        ("little memory", {"max_memory_gb": 0.001}, "max_memory_gb=0.001 is less than a batch of"),
    ]
    results = []
    for name, training_config, words in settings:
        result = phinetune.finetune(
            model=str(tiny_llama_folder),
            train=str(chats),
            training_config={
                "output_dir": str(tmp_path / name), "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
                "logging_steps": 1, "use_cpu": True, **training_config,
            },
            peft_config={"r": 2, "lora_dropout": 0.1},
            model_kwargs={"dtype": "float32"},
            resume=tmp_path / "none" / "checkpoint-2" if name == "all" else False,
        )  # fmt: skip
        log = (result.folder / "train.log").read_text()
        assert words is None or words in log
        assert ("are recomputed" in log) == (name != "none")
        losses = [json.loads(line)["loss"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        results.append(((result.folder / "adapter_model.safetensors").read_bytes(), losses[-1]))
    assert len(set(results)) == 1
