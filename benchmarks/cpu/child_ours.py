"""Our training step, timed: rows a second, its share of the machine's product rate, its cost by length."""

import os
import statistics
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as phinetune's command line does, before torch is imported

import job_io
import torch
import torch.nn.functional as F

from phinetune.data import Example, batches
from phinetune.kernels import allocator, native, separate
from phinetune.kernels.attention import rotary_attention
from phinetune.machine.garbage import garbage_set_aside
from phinetune.measure.rates import Products, share_reached
from phinetune.model import adapt_model, load_model
from phinetune.recipe import ModelKwargs, PeftConfig, TrainingConfig
from phinetune.train.loop import training_step
from phinetune.train.optimiser import make_optimizer, trainable_parameters


def leave_out(technique: str) -> None:
    """Ours without one of its techniques."""
    if technique == "sharing":
        batches.lay_out.__defaults__ = (*batches.lay_out.__defaults__[:-1], 1 << 30)
    elif technique == "allocator":
        allocator.keep_freed_memory = lambda: False
    else:
        there = native.library
        native.library = lambda name, *dtype: None if name == technique else there(name, *dtype)


class Trainee:
    """The adapted model with its optimiser, and one step of it."""

    def __init__(self, job: dict[str, Any]) -> None:
        for technique in job.get("without", []):
            leave_out(technique)
        native.prepare(torch.device("cpu"))
        allocator.keep_freed_memory()  # as `train` does
        settings = ModelKwargs(dtype=job["dtype"], **job.get("model_kwargs", {}))
        peft = PeftConfig(r=job["r"], lora_alpha=job["lora_alpha"], lora_dropout=0.0, target_modules="all-linear")
        config = TrainingConfig(learning_rate=job["learning_rate"], optim="adamw_torch_fused")
        self.job = job
        self.model = load_model("smollm2", settings)
        adapt_model(self.model, peft, job["seed"])
        self.model.train()
        self.optimizer = make_optimizer(self.model, config, peft)
        self.pack_tokens = job["pack_tokens"]

    def step(self, rows: Sequence[list[int]], number: int = 0) -> tuple[float, float]:
        """(seconds, loss)"""
        begin = time.perf_counter()
        loss, _ = training_step(
            self.model,
            self.optimizer,
            examples_of(rows),
            learning_rate=self.job["learning_rate"],
            max_grad_norm=1.0,
            max_batch_tokens=self.pack_tokens,
            seed=(self.job["seed"], number),
        )
        return time.perf_counter() - begin, loss


def examples_of(rows: Sequence[list[int]]) -> list[Example]:
    return [Example(f"row {i}", ids, [True] * len(ids)) for i, ids in enumerate(rows)]


def steps_of(rows: list[list[int]], rows_a_step: int) -> Iterator[list[list[int]]]:
    for start in range(0, len(rows), rows_a_step):
        yield rows[start : start + rows_a_step]


def speed(trainee: Trainee) -> dict[str, Any]:
    job = trainee.job
    rows, rows_a_step = job["rows"], job["rows_a_step"]
    warmup = sum(trainee.step(rows[:rows_a_step])[0] for _ in range(job["warmup_steps"]))
    ran = [
        (*trainee.step(step, number), len(step))
        for _ in range(job["passes"])
        for number, step in enumerate(steps_of(rows, rows_a_step))
    ]
    return {
        "seconds": sum(seconds for seconds, _, _ in ran),
        "warmup_seconds": warmup,
        "steps": len(ran),
        "rows": len(rows) * job["passes"],
        "tokens": sum(map(len, rows)) * job["passes"],
        "loss": statistics.mean(loss for _, loss, _ in ran[: len(ran) // job["passes"]]),
        "trainable": sum(p.numel() for p in trainable_parameters(trainee.model).values()),
    }


def roofline(trainee: Trainee) -> dict[str, Any]:
    """Our step and the model's own products in turns: 4 × weights × tokens a second, over the products' rate."""
    job = trainee.job
    steps = [examples_of(step) for step in steps_of(job["rows"], job["rows_a_step"])]
    share = share_reached(trainee.model, trainee.optimizer, steps, trainee.pack_tokens, job["learning_rate"])
    return {
        "tokens": share.tokens,
        "seconds": share.seconds,
        "rate_gflops": share.rate / 1e9,
        "rate_gflops_spread": [min(share.rates) / 1e9, max(share.rates) / 1e9],
        "achieved_gflops": share.achieved / 1e9,
        "roofline": share.of_rate,
    }


def cost(trainee: Trainee) -> dict[str, Any]:
    """Seconds a token of steps whose rows all have one length, and those of attention alone, ours and torch's.

    Lengths take turns; the first, in which memory is had, doesn't count.
    """
    job = trainee.job
    ids = [i for row in job["rows"] for i in row]
    steps: dict[int, list[float]] = {length: [] for length in job["lengths"]}
    attention: dict[int, list[float]] = {length: [] for length in job["lengths"]}
    by_torch: dict[int, list[float]] = {length: [] for length in job["lengths"]}
    for turn in range(job["repeats"] + 1):
        for length in job["lengths"]:
            count = max(1, job["tokens_a_step"] // length)
            line = (ids * (count * length // len(ids) + 1))[: count * length]
            rows = [line[start : start + length] for start in range(0, len(line), length)]
            trainee.pack_tokens = max(job["pack_tokens"], length)
            seconds = trainee.step(rows)[0] / len(line)
            own = own_attention_seconds(trainee.model, length, trainee.pack_tokens // length)
            alone = attention_seconds(trainee.model, length) / length
            if turn > 0:
                steps[length].append(seconds)
                attention[length].append(own)
                by_torch[length].append(alone)
    by_length = {
        str(length): {
            "seconds_a_token": statistics.median(steps[length]),
            "each": steps[length],
            "own_attention": statistics.median(attention[length]),
            "attention_each": attention[length],
            "attention_alone": statistics.median(by_torch[length]),
            "attention_flop": attention_flop(trainee.model.config, length),
        }
        for length in job["lengths"]
    }
    return {"by_length": by_length, "linear_flop": 4 * Products(trainee.model, 1).weights}


def attention_flop(config: Any, length: int) -> float:
    """A token's in all layers, forward and backward: six products over half the square."""
    heads, _, width = heads_of(config)
    return 6.0 * length * heads * width * config.num_hidden_layers


def heads_of(config: Any) -> tuple[int, int, int]:
    """(query heads, key-value heads, width of a head)"""
    heads = config.num_attention_heads
    return heads, config.num_key_value_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def own_attention_seconds(model: Any, length: int, rows: int) -> float:
    """Seconds a token of our attention in all layers, forward and backward, for a line of such rows."""
    (heads, kv_heads, width), tokens = heads_of(model.config), rows * length
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width, dtype=model.dtype, requires_grad=True)
    cos, sin = torch.rand(2, tokens, width)
    dout = torch.randn(tokens, heads * width, dtype=model.dtype)
    paths = separate(range(0, tokens + 1, length))
    attend = lambda: rotary_attention(qkv, cos, sin, kv_heads, paths, width**-0.5).backward(dout)  # noqa: E731
    return median_seconds(attend) * float(model.config.num_hidden_layers) / tokens


def attention_seconds(model: Any, length: int) -> float:
    """A row's causal attention in all layers, forward and backward, by torch."""
    heads, kv_heads, width = heads_of(model.config)
    counts = (heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(1, n, length, width, dtype=model.dtype, requires_grad=True) for n in counts)
    dout = torch.randn_like(q)
    attend = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).backward(dout)  # noqa: E731
    return median_seconds(attend) * float(model.config.num_hidden_layers)


def median_seconds(call: Callable[[], None]) -> float:
    call()  # warms up
    return statistics.median(timeit.repeat(call, number=1, repeat=3))


def main() -> None:
    job = job_io.read()
    trainee = Trainee(job)
    with garbage_set_aside():  # as `train` does
        result = {"speed": speed, "roofline": roofline, "cost": cost}[job["what"]](trainee)
    result["threads"] = torch.get_num_threads()
    result["versions"] = job_io.versions("phinetune", "torch", "transformers")
    job_io.answer(result)


if __name__ == "__main__":
    main()
