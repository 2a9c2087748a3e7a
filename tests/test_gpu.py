"""The same code on CUDA: attention, loss head, fast layers, the loop, checkpoints. Skipped where there is none.

Run alone with `python -m pytest -m gpu`.
"""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import draw_lora_B, relative_error, tiny_model

import phinetune
from phinetune import lora
from phinetune.data import Example
from phinetune.generate import answers
from phinetune.kernels import attention, compiled, gated, loss, separate, varlen
from phinetune.layers import fast
from phinetune.machine.memory import MemoryPeak, memory_in_use
from phinetune.model import adapt_model, flat_batches, fused_parts, loss_sum
from phinetune.model.memory import Batch, bytes_to_come, recompute
from phinetune.recipe import PeftConfig, TrainingConfig
from phinetune.train.loop import training_step
from phinetune.train.optimiser import make_optimizer

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
    assert varlen.serves(inputs[0]) == (dtype is torch.bfloat16)
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


def gradients_on(device, plain, examples, dtype=torch.float32, install=False):
    model = copy.deepcopy(plain).to(device)
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.to(dtype)
    if install:
        assert fast.install(model) == 2
    for batch in flat_batches(model, examples, 1 << 20):
        loss_sum(model, batch.to(model.device)).backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}


def rows(*lengths):
    return [
        Example(f"row {length}", torch.randint(3, 500, (length,), generator=draws).tolist(), [True] * length)
        for draws in [torch.Generator().manual_seed(0)]
        for length in lengths
    ]


@pytest.mark.parametrize("smallest", [1, 1 << 60], ids=["compiled", "plain"])
@pytest.mark.parametrize("family", ["llama", "phi3", "mistral", "qwen2"])
def test_fast_layers_and_flat_batches_are_as_on_the_cpu(family, smallest, monkeypatch):
    plain = tiny_model(family, vocab_size=512)
    lora.adapt(plain, "all-linear", r=2, fused=fused_parts(plain.config))
    draw_lora_B(plain, std=0.1)
    expected = gradients_on("cpu", plain, rows(9, 70, 30))
    monkeypatch.setattr(compiled, "SMALLEST", smallest)
    found = gradients_on("cuda", plain, rows(9, 70, 30), install=True)
    of_bf16 = gradients_on("cuda", plain, rows(9, 70, 30), torch.bfloat16, install=True)
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-4, name
        assert relative_error(of_bf16[name], gradient) < 0.1, name


def test_another_number_of_tokens_compiles_nothing(monkeypatch):
    monkeypatch.setattr(compiled, "SMALLEST", 1)
    counted = torch._dynamo.utils.counters["stats"]

    @torch.no_grad()
    def graphs(tokens):
        gated.silu_mul(*torch.randn(tokens, 128, device="cuda").chunk(2, -1))
        return counted["unique_graphs"]

    assert len({graphs(tokens) for tokens in (300, 4096, 17)}) == 1


@pytest.mark.parametrize("recomputed", [0, 2, 4])
def test_the_memory_of_a_step_is_what_is_said(recomputed):
    """Four layers and the head of Phi-3-mini at full width, rows of 1,024 tokens."""
    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32}
    with torch.device("cuda"):
        model = tiny_model("phi3", vocab_size=32064, num_hidden_layers=4, head_dim=96, **sizes).to(torch.bfloat16)
    fast.install(model)
    peft = PeftConfig(r=16, lora_dropout=0.0, target_modules="all-linear")
    adapt_model(model, peft, seed=0)
    model.train()
    recompute(model, recomputed)
    optimizer = make_optimizer(model, TrainingConfig(), peft)
    expected = memory_in_use(model.device) + bytes_to_come(model, Batch(4096, 1024))
    with MemoryPeak(model.device) as memory:
        for step in range(2):
            training_step(
                model,
                optimizer,
                rows(1024, 1024, 1024, 1024),
                learning_rate=1e-3,
                max_grad_norm=1.0,
                max_batch_tokens=4096,
                seed=(0, step),
            )
    assert 0.9 < expected / 1e9 / memory.gb < 1.15


def test_greedy_answers_are_as_on_the_cpu(smollm2_tokenizer):
    model = tiny_model("llama")
    prompts = [[1, 4093, 198, length] * length for length in (3, 5, 9)]
    expected = answers(model, smollm2_tokenizer, prompts, 12, 4)
    assert answers(model.to("cuda"), smollm2_tokenizer, prompts, 12, 4) == expected


def command_line(*arguments):
    """In a process that is no fork: CUDA can't be used in a fork of one that has seen it."""
    command = [sys.executable, "-m", "phinetune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def finetune(model, chats, folder, steps=4, training_config=None, **more):
    return phinetune.finetune(
        model=str(model),
        train=str(chats),
        training_config={
            "output_dir": str(folder), "max_steps": steps, "save_strategy": "steps", "save_steps": 2,
            "logging_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant", **(training_config or {}),
        },
        peft_config={"r": 2, "lora_dropout": 0.1},
        **more,
    )  # fmt: skip


def test_memory_that_is_refused_halves_the_batch(tiny_llama_folder, tmp_path):
    """The GPU lends this process what lies between the needs of a flat batch of 4,096 tokens and one of 32,768."""
    answer = {"role": "assistant", "content": "ten " * 2000}
    chats = [{"messages": [{"role": "user", "content": f"{i} "}, answer]} for i in range(16)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chats))

    def run(tokens):
        torch.cuda.empty_cache()
        result = finetune(
            tiny_llama_folder,
            path,
            tmp_path / f"run-{len(list(tmp_path.iterdir()))}",
            1,
            training_config={"per_device_train_batch_size": 16},
            data={"max_length": 4096, "max_batch_tokens": tokens},
            model_kwargs={"dtype": "bfloat16"},
            rehearsal=False,
        )
        return result.summary["peak_gb"] * 1e9, (result.folder / "train.log").read_text()

    run(4096)  # what compiles takes memory, too
    (small, _), (large, said) = run(4096), run(32768)
    assert "memory was refused" not in said
    assert large > 1.5 * small
    try:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((small + large) / 2 / total)
        _, said = run(32768)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "memory was refused for a flat batch of" in said
    assert "the same rows a step" in said


def test_what_is_said_of_the_machine_and_of_a_run(tiny_llama_folder, chats, tmp_path):
    ran = command_line("doctor", "--no-training", "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["device"] == torch.cuda.get_device_name()
    assert found["gpu_memory_gb"]["total"] > 1
    assert found["dtype"] == "bfloat16"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_llama_folder}\ndata: {{train: {chats}}}\ntraining_config: {{output_dir: {tmp_path / 'out'}}}\n"
    )
    planned = command_line("plan", recipe, "--json")
    assert planned.returncode == 0, planned.stderr
    found = json.loads(planned.stdout)
    assert found["device"] == "cuda"
    assert found["fits"]
    assert found["gb"]["process"] == 0


def test_held_out_rows_answers_and_merging(tiny_llama_folder, chats, tmp_path):
    result = finetune(
        tiny_llama_folder,
        chats,
        tmp_path / "run",
        eval=0.2,
        evaluation={"metrics": ["exact_match"], "max_new_tokens": 4},
    )
    assert result.summary["peak_gb"] > 0
    ran = command_line("merge", result.folder, "--output", tmp_path / "merged")
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("few_bits", [{}, {"load_in_8bit": True}, {"load_in_4bit": True}], ids=lambda kind: str(kind))
def test_a_run_its_checkpoint_and_its_resume(tiny_llama_folder, chats, tmp_path, few_bits):
    def run(name, steps, **more):
        return finetune(
            tiny_llama_folder, chats, tmp_path / name, steps, model_kwargs={"dtype": "bfloat16", **few_bits}, **more
        ).folder

    whole = run("whole", 6)
    cut = shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoint-6")
    run("cut", 6, resume=True)
    losses = []
    for folder in (whole, cut):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == len(losses[1]) == 6
    assert all(abs(a - b) <= 1e-3 * abs(a) for a, b in zip(*losses, strict=True))  # CUDA's sums have no fixed order
    assert losses[0][-1] < losses[0][0]
