"""Forward and backward of one adapted linear layer, beside the plain layer, loralib and PEFT, in one run.

    python benchmarks/lora_linear.py [--dtype bfloat16] [--features 3072] [--rank 16] [--tokens 2048] [--rounds 5]

The plain layer's forward and dX are what can't be had for less: its weight is frozen, so it has no third product.
Contenders take turns, round by round, and medians are compared.  Memory is counted exactly: what is kept for the
backward pass by storage (the parameters themselves aside), and the peak of everything alive between the call of
forward and the end of backward, from torch's own record of allocations, the layer and its input included.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import loralib
import peft
import record
import torch
from torch import Tensor, nn

from phinetune import lora
from phinetune.kernels.products import product

RESULTS = record.RESULTS / "lora_linear.json"


class InPanels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight.T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return product(dy, *ctx.saved_tensors), None


class BaseInPanels(nn.Linear):
    """The plain layer by our own products: what ours should be held against where torch has no fast bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        return InPanels.apply(input, self.weight)


def contenders(features: int, r: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The same base weight under each library; LoRA parameters in fp32 where the library can."""
    base = nn.Linear(features, features, bias=False, dtype=dtype).requires_grad_(False)
    theirs = loralib.Linear(features, features, r=r, lora_alpha=2 * r, bias=False, dtype=dtype)
    theirs.weight.data.copy_(base.weight)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"], lora_dropout=0.0)
    layers = {
        "base": base,
        "base, panels": BaseInPanels(features, features, bias=False, dtype=dtype).requires_grad_(False),
        "phinetune": lora.Linear.from_base(
            nn.Linear(features, features, bias=False, dtype=dtype), r=r, lora_alpha=2 * r, dtype=torch.float32
        ),
        "loralib": theirs,
        "peft": peft.get_peft_model(nn.Sequential(nn.Linear(features, features, bias=False, dtype=dtype)), config),
    }
    with torch.no_grad():
        for layer in layers.values():
            for name, parameter in layer.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.01)
                elif "lora_" not in name:
                    parameter.copy_(base.weight)
    return layers


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    layer(x).backward(dy)
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None


def seconds(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """What forward keeps for the backward pass, each storage once, the layer's own parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def peak_bytes(layer: nn.Module, x: Tensor, dy: Tensor) -> int:
    """The most that is alive at once: the layer, its input, and what forward and backward allocate."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layer(x).backward(dy)
    alive = peak = 0
    memory = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None
    given = sum(t.untyped_storage().nbytes() for t in (*layer.parameters(), x, dy))
    return given + peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--features", type=int, default=3072)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, asked.dtype)
    layers = contenders(asked.features, asked.rank, dtype)
    x = torch.randn(asked.tokens, asked.features, dtype=dtype, requires_grad=True)
    dy = torch.randn(asked.tokens, asked.features, dtype=dtype)
    times: dict[str, list[float]] = {name: [] for name in layers}
    few, few_dy = x.detach()[:8].requires_grad_(), dy[:8]
    for layer in layers.values():
        step(layer, few, few_dy)
    for _ in range(asked.rounds):
        for name, layer in layers.items():
            times[name].append(seconds(lambda layer=layer: step(layer, x, dy)))  # type: ignore[misc]

    peaks = {name: peak_bytes(layer, x, dy) for name, layer in layers.items()}
    rows, input_bytes = {}, x.untyped_storage().nbytes()
    for name, layer in layers.items():
        ratios = [own / base for own, base in zip(times[name], times["base"], strict=True)]
        rows[name] = {
            "seconds": round(statistics.median(times[name]), 4),
            "time_vs_base": round(statistics.median(ratios), 4),
            "kept_vs_input": round(kept_bytes(layer, x) / input_bytes, 4),
            "peak_vs_base": round(peaks[name] / peaks["base"], 4),
        }
    print(f"{asked.tokens} tokens, {asked.features} -> {asked.features}, r={asked.rank}, {asked.dtype}")
    print(f"{'':14}{'seconds':>10}{'time / base':>14}{'kept / input':>14}{'peak / base':>14}")
    for name, row in rows.items():
        print(
            f"{name:14}"
            + "".join(f"{value:{width}.3f}" for value, width in zip(row.values(), (10, 14, 14, 14), strict=True))
        )
    settings = {"settings": vars(asked), "versions": record.versions("torch", "peft", "loralib")}
    record.merge(RESULTS, {asked.dtype: {**settings, "threads": torch.get_num_threads(), **rows}})


if __name__ == "__main__":
    main()
