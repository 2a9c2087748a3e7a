"""Rows that share a long beginning: our batches with it computed once, and without, on Phi-3's layers at full width.

A prefix of 768 tokens and eight suffixes of 256, only these supervised.  In fp32 loss and gradients are compared, with
few layers; in bfloat16 the two take turns.  Head and last layer work for supervised tokens alone, shared or not: of a
few layers they are a larger part than of a model's 32.
"""

import os
import statistics
import time
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as phinetune's command line does, before torch is imported

import job_io
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from phinetune.data import Example, FlatBatch, lay_out
from phinetune.kernels.allocator import keep_freed_memory
from phinetune.layers import attention, fast
from phinetune.lora import lora_layers
from phinetune.model import adapt_model, loss_sum
from phinetune.recipe import PeftConfig

PREFIX, SUFFIX, ROWS, MOST_TOKENS = 768, 256, 8, 4096


def model_of(layers: int, dtype: torch.dtype) -> Any:
    attention.register()
    torch.manual_seed(0)
    config = Phi3Config(num_hidden_layers=layers, attn_implementation=attention.NAME)
    with torch.device("meta"):
        model = Phi3ForCausalLM(config).to(dtype)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.requires_grad_(False)
    fast.install(model)
    adapt_model(model, PeftConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"), 0)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_(0, 0.02)
    return model.train()


def rows() -> list[Example]:
    torch.manual_seed(1)
    prefix = torch.randint(3, 32_000, (PREFIX,)).tolist()
    mask = [False] * PREFIX + [True] * SUFFIX
    return [Example(f"row {i}", prefix + torch.randint(3, 32_000, (SUFFIX,)).tolist(), mask) for i in range(ROWS)]


def step(model: Any, batches: list[FlatBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = loss_sum(model, batch) / (ROWS * SUFFIX)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def main() -> None:
    job = job_io.read()
    keep_freed_memory()
    examples = rows()
    unshared, shared = (lay_out(examples, MOST_TOKENS, None, least) for least in (0, 16))
    model = model_of(job["compared_layers"], torch.float32)
    (loss, expected), (own, found) = step(model, unshared), step(model, shared)
    differences = [((found[n] - g).norm() / g.norm()).item() for n, g in expected.items()]
    del model, expected, found
    model = model_of(job["layers"], torch.bfloat16)
    seconds: dict[str, list[float]] = {"unshared": [], "shared": []}
    for number in range(job["rounds"] + 1):
        for name, batches in (("unshared", unshared), ("shared", shared)):
            begin = time.perf_counter()
            step(model, batches)
            if number:
                seconds[name].append(time.perf_counter() - begin)
    ratios = [a / b for a, b in zip(seconds["unshared"], seconds["shared"], strict=True)]
    job_io.answer(
        {
            "prefix_speedup": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
            "loss_rel_err": abs(own - loss) / abs(loss),
            "grad_rel_err": max(differences),
            "tokens": {
                n: sum(b.ids.numel() for b in batches) for n, batches in (("unshared", unshared), ("shared", shared))
            },
            "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
            "layers": job["layers"],
        }
    )


if __name__ == "__main__":
    main()
