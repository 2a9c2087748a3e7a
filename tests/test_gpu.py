"""The same code on CUDA: attention, loss head, fast layers, the loop, checkpoints. Skipped where there is none.

Run alone with `python -m pytest -m gpu`.
"""

import copy
import json

import pytest
import torch
from conftest import draw_lora_B, relative_error, tiny_model

import phinetune
from phinetune import lora
from phinetune.data import Example
from phinetune.kernels import attention, loss, separate
from phinetune.model import fast, flat_batches, fused_parts, loss_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
TREE = [[(0, 140)], [(0, 140), (140, 205)], [(0, 140), (140, 205), (205, 220)], [(0, 140), (220, 229)], [(229, 360)]]
EXACT, ROUNDED = 2e-5, 2e-2


@pytest.fixture(autouse=True)
def full_precision():
    """fp32 products as such, not in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, EXACT), (torch.bfloat16, ROUNDED)])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("paths", [TREE, separate([0, 1, 64, 193, 450])], ids=["tree", "separate"])
def test_attention(paths, window, dtype, tolerance):
    torch.manual_seed(0)
    tokens = paths[-1][-1][1]
    inputs = [torch.randn(tokens, heads, 64).to("cuda", dtype).requires_grad_() for heads in (4, 2, 2)]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    out = attention.packed_attention(*inputs, paths, 0.2, window)
    reference = attention.packed_attention_reference(*exact, paths, 0.2, window)
    dout = torch.randn_like(reference)
    out.backward(dout.to("cuda", dtype))
    reference.backward(dout)
    assert relative_error(out.cpu(), reference) < tolerance
    assert all(relative_error(x.grad.cpu(), x64.grad) < tolerance for x, x64 in zip(inputs, exact, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, EXACT), (torch.bfloat16, ROUNDED)])
def test_loss_head(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 500 * 30)
    torch.manual_seed(0)
    hidden = torch.randn(100, 64).to("cuda", dtype).requires_grad_()
    weight, targets = torch.randn(500, 64).to("cuda", dtype), torch.randint(0, 500, (100,)).cuda()
    value = loss.linear_cross_entropy_sum(hidden, weight, targets)
    value.backward()
    exact = hidden.detach().cpu().double().requires_grad_()
    logits = exact @ weight.cpu().double().T
    reference = torch.nn.functional.cross_entropy(logits, targets.cpu(), reduction="sum")
    reference.backward()
    assert relative_error(value.detach().cpu(), reference.detach()) < tolerance
    assert relative_error(hidden.grad.cpu(), exact.grad) < tolerance


@pytest.mark.parametrize("family", ["llama", "phi3", "mistral", "qwen2"])
def test_fast_layers_and_flat_batches_are_as_on_the_cpu(family):
    plain = tiny_model(family, vocab_size=512)
    lora.adapt(plain, "all-linear", r=2, fused=fused_parts(plain.config))
    draw_lora_B(plain, std=0.1)
    rows = [torch.randint(3, 500, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 70, 30)]
    examples = [Example(f"row {i}", row.tolist(), [True] * len(row)) for i, row in enumerate(rows)]
    gradients = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(plain).to(device)
        if device == "cuda":
            assert fast.install(model) == 2
        for batch in flat_batches(model, examples, 1 << 20):
            loss_sum(model, batch.to(model.device)).backward()
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-4


@pytest.mark.parametrize("few_bits", [{}, {"load_in_8bit": True}, {"load_in_4bit": True}], ids=lambda kind: str(kind))
def test_a_run_its_checkpoint_and_its_resume(tiny_llama_folder, chats, tmp_path, few_bits):
    def run(name, steps, resume=False):
        return phinetune.finetune(
            model=str(tiny_llama_folder),
            train=str(chats),
            training_config={
                "output_dir": str(tmp_path / name), "max_steps": steps, "save_strategy": "steps", "save_steps": 2,
                "logging_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
            },
            peft_config={"r": 2, "lora_dropout": 0.1},
            model_kwargs={"dtype": "bfloat16", **few_bits},
            resume=resume,
        ).folder  # fmt: skip

    whole, cut = run("whole", 6), run("cut", 4)
    cut = run("cut", 6, resume=True)
    losses = []
    for folder in (whole, cut):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == len(losses[1]) == 6
    assert all(abs(a - b) <= 1e-3 * abs(a) for a, b in zip(*losses, strict=True))  # CUDA's sums have no fixed order
    assert losses[0][-1] < losses[0][0]
