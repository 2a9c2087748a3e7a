"""Phi-3-mini at full size, with random weights: a step's seconds, its share of the product rate, and its memory."""

import time
from pathlib import Path
from typing import Any

import job_io
import torch
from torch import nn

from phinetune.data import Example
from phinetune.kernels import int8, native
from phinetune.kernels.allocator import keep_freed_memory
from phinetune.layers import attention, fast
from phinetune.machine.memory import MemoryPeak, memory_in_use
from phinetune.measure.rates import Products
from phinetune.model import adapt_model
from phinetune.model.memory import Batch, layers_to_recompute, recompute
from phinetune.model.quantise import quantised_layers
from phinetune.recipe import PeftConfig, TrainingConfig
from phinetune.train.estimate import expected_gb
from phinetune.train.loop import training_step
from phinetune.train.optimiser import make_optimizer, trainable_parameters

STD = 0.02
DRAWN = 1 << 24  # numbers, from which all weights are taken: drawing each would take a minute


def make_model(in_int8: bool, layers: int | None) -> Any:
    """Random weights, a tensor at a time, so that no second copy is ever held."""
    from transformers import Phi3Config, Phi3ForCausalLM

    attention.register()
    changes = {} if layers is None else {"num_hidden_layers": layers}
    with torch.device("meta"):
        config = Phi3Config(attn_implementation=attention.NAME, dtype=torch.bfloat16, **changes)
        model = Phi3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    numbers = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).mul_(STD).bfloat16()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1:
                weight = torch.ones(parameter.shape, dtype=torch.bfloat16)
            else:
                weight = drawn(numbers, parameter.shape)
                if in_int8 and isinstance(module, nn.Linear) and module is not model.lm_head:
                    weight = int8.quantise(weight)
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config)
    model.config.use_cache = False
    fast.install(model)
    return model.requires_grad_(False).eval()


def drawn(numbers: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The same numbers again and again, each time from another place."""
    weight = torch.empty(shape, dtype=numbers.dtype)
    flat = weight.view(-1)
    place = int(torch.randint(numbers.numel(), (1,)))
    done = 0
    while done < flat.numel():
        count = min(numbers.numel() - place, flat.numel() - done)
        flat[done : done + count] = numbers[place : place + count]
        done, place = done + count, 0
    return weight


def main() -> None:
    job = job_io.read()
    torch.manual_seed(0)
    native.prepare(torch.device("cpu"))
    with MemoryPeak() as memory:
        begin = time.perf_counter()
        model = make_model(job["int8"], job.get("layers"))
        peft = PeftConfig(r=job["r"], lora_alpha=job["lora_alpha"], lora_dropout=0.0, target_modules="all-linear")
        config = TrainingConfig(learning_rate=job["learning_rate"], optim="adamw_torch_fused")
        adapt_model(model, peft, job["seed"])
        with torch.no_grad():
            for name, parameter in trainable_parameters(model).items():
                if name.endswith("lora_B"):
                    parameter.normal_(0, STD)
        keep_freed_memory()  # behind the weights, between which nothing is to be left free
        model.train()
        optimizer = make_optimizer(model, config, peft)
        made = {"seconds": time.perf_counter() - begin, "gb": memory.gb}

        rows = [torch.randint(32000, (job["length"],)).tolist() for _ in range(job["rows"])]
        batch = Batch(max(job["length"], min(job["rows"] * job["length"], job["pack_tokens"])), job["length"])
        recomputed = job.get("recomputed")
        if recomputed is None:
            recomputed = layers_to_recompute(model, batch, job["limit_gb"] * 1e9 - memory_in_use())
        recompute(model, recomputed)
        expected = expected_gb(model, batch)

        def step(rows: list[list[int]], number: int) -> float:
            begin = time.perf_counter()
            training_step(
                model,
                optimizer,
                [Example(f"row {i}", ids, [True] * len(ids)) for i, ids in enumerate(rows)],
                learning_rate=job["learning_rate"],
                max_grad_norm=1.0,
                max_batch_tokens=job["pack_tokens"],
                seed=(job["seed"], number),
            )
            return time.perf_counter() - begin

        warmup = step([rows[0][:64]], 0)  # compiles
        if job.get("profile"):
            step(rows, 0)  # memory is had from the system once
            profiled(step, rows, job["profile"])
            return
        seconds = [step(rows, 1)]
        peak = memory.gb
    result = {"made": made, "peak_gb": peak, "expected_gb": expected, "recomputed": recomputed, "warmup": warmup}
    if job["probe"]:  # behind the peak, which the probe's own tensors would raise
        probe = Products(model, min(job["pack_tokens"], batch.tokens))
        probe.rate()
        rates = [probe.rate()]
    seconds.append(step(rows, 2))
    if job["probe"]:
        rates.append(probe.rate())
        rate = len(rates) / sum(1 / rate for rate in rates)  # of seconds, not of rates
        flop = 4 * probe.weights * job["rows"] * job["length"]
        result |= {"rates_gflops": [rate / 1e9 for rate in rates], "roofline": flop / seconds[-1] / rate}
    result |= {"seconds": seconds, "int8_layers": len(quantised_layers(model).names)}
    job_io.answer(result | {"versions": job_io.versions("phinetune", "torch", "transformers")})


def profiled(step: Any, rows: list[list[int]], where: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        seconds = step(rows, 1)
    table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60)
    Path(where).write_text(f"{seconds:.1f} s\n{table}\n", encoding="utf-8")
    job_io.answer({"seconds": seconds})


if __name__ == "__main__":
    main()
