"""One frozen linear layer in int8 beside bfloat16, at the shapes of Phi-3-mini: forward and input gradient.

    python benchmarks/int8_linear.py [--tokens 2048 512] [--rounds 7]

Contenders take turns, round by round, and medians are compared: torch's bfloat16 products, ours, ours without looking
for outliers, and torch's int8 product by itself, which is what can't be had for less.  Errors are relative, in norm,
against fp32; `scaled` is the output's with four input channels times 50.  Results: benchmarks/results/int8_linear.json.
Large results are handed back to the system at once by glibc's allocator and then cost a page fault each 4 KB again, in
bfloat16 as in int8: MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483648 keeps them.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phinetune.kernels import int8

RESULTS = Path(__file__).parent / "results" / "int8_linear.json"
LAYERS = {"qkv_proj": (3072, 9216), "o_proj": (3072, 3072), "gate_up_proj": (3072, 16384), "down_proj": (8192, 3072)}


def medians(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, behind one round of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return {name: 1000 * statistics.median(taken) for name, taken in seconds.items()}


def without_outliers(call: Callable[[], Any]) -> Callable[[], Any]:
    def changed() -> None:
        looked_for, int8.OUTLIERS = int8.OUTLIERS, 0
        try:
            call()
        finally:
            int8.OUTLIERS = looked_for

    return changed


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.float() - exact).norm() / exact.norm())


def measure(inputs: int, outputs: int, tokens: int, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(outputs, inputs)).bfloat16()
    x, dy = torch.randn(tokens, inputs).bfloat16(), torch.randn(tokens, outputs).bfloat16()
    quantised = int8.quantise(weight)
    x8, dy8, codes = x.to(torch.int8), dy.to(torch.int8), quantised.codes
    ways: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {
            "bf16": lambda: x @ weight.T,
            "int8": lambda: int8.linear(x, quantised),
            "int8_no_outliers": without_outliers(lambda: int8.linear(x, quantised)),
            "int_mm": lambda: torch._int_mm(x8, codes.T),
        },
        "gradient": {
            "bf16": lambda: dy @ weight,
            "int8": lambda: int8.input_gradient(dy, quantised),
            "int8_no_outliers": without_outliers(lambda: int8.input_gradient(dy, quantised)),
            "int_mm": lambda: torch._int_mm(dy8, codes),
        },
    }
    took = {way: medians(contenders, rounds) for way, contenders in ways.items()}
    figures = {f"{way}_{name}_ms": round(ms, 2) for way in took for name, ms in took[way].items()}
    figures |= {f"{way}_ratio": round(took[way]["bf16"] / took[way]["int8"], 2) for way in took}
    both = {name: sum(took[way][name] for way in took) for name in took["forward"]}
    figures["ratio"] = round(both["bf16"] / both["int8"], 2)
    figures["outliers_cost"] = round(both["int8"] / both["int8_no_outliers"] - 1, 3)

    exact = weight.float()
    scaled = x.clone()
    scaled[:, torch.randperm(inputs)[:4]] *= 50
    figures["error"] = round(relative_error(int8.linear(x, quantised), x.float() @ exact.T), 4)
    figures["error_scaled"] = round(relative_error(int8.linear(scaled, quantised), scaled.float() @ exact.T), 4)
    figures["error_gradient"] = round(relative_error(int8.input_gradient(dy, quantised), dy.float() @ exact), 4)
    figures["memory"] = round(quantised.nbytes / weight.nbytes, 4)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 512])
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }
    for name, (inputs, outputs) in LAYERS.items():
        for tokens in asked.tokens:
            figures = measure(inputs, outputs, tokens, asked.rounds)
            results[f"{name}_{tokens}"] = figures
            print(f"{name} {inputs}->{outputs}, {tokens} tokens: {json.dumps(figures)}", flush=True)
    for tokens in asked.tokens:
        each = [results[f"{name}_{tokens}"] for name in LAYERS]
        total = {
            kind: sum(f[f"forward_{kind}_ms"] + f[f"gradient_{kind}_ms"] for f in each) for kind in ("bf16", "int8")
        }
        results[f"layer_{tokens}_ratio"] = round(total["bf16"] / total["int8"], 2)
        print(f"a whole layer, {tokens} tokens: {results[f'layer_{tokens}_ratio']} times bfloat16's rate")
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
