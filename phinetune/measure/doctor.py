"""What machine this is, how phinetune will use it, and how much of its speed training reaches."""

from typing import Any

import torch

from phinetune.kernels import native
from phinetune.kernels.allocator import keep_freed_memory
from phinetune.kernels.compiled import can_compile
from phinetune.kernels.threads import settle_threads
from phinetune.machine.memory import MemoryPeak, memory_free, memory_total
from phinetune.machine.system import cpu, device_name, system, versions
from phinetune.measure.rates import rates_by_dtype, share_reached
from phinetune.model import adapt_model, load_model, load_tokenizer, pick_device, resolve_dtype
from phinetune.recipe import DataConfig, ModelKwargs, PeftConfig, TrainingConfig
from phinetune.train.optimiser import make_optimizer

KERNELS = {
    "attention": "packed attention", "decoder": "decoder layers", "loss": "the loss head", "products": "other products",
}  # fmt: skip
DTYPES = ("bfloat16", "float32")
STEPS, ROWS_A_STEP = 3, 16


def examine(training: bool = True) -> dict[str, Any]:
    """All that `phinetune doctor` says. Training: three steps of the embedded model, rank 16 on all linear layers, on
    the shipped example (half a minute)."""
    threads = settle_threads()
    kept = keep_freed_memory()
    device = pick_device(use_cpu=False)
    native.prepare(device)
    found: dict[str, Any] = {
        "versions": versions(),
        **system(),
        "device": device_name(device),
        "cpu": cpu(),
        "threads": threads,
        "memory_gb": {"total": memory_total() / 1e9, "free": memory_free() / 1e9},
        "gpu_memory_gb": _gpu_memory(device),
        "freed_memory_is_kept": kept,
        "compiler": " ".join(native.find_compiler()) or None,
        "compiled_passes": can_compile(device.type),
        "kernels": {name: native.kernels_for(getattr(torch, name)) if device.type == "cpu" else [] for name in DTYPES},
        "kernels_in": native.instructions(),
        "dtype": resolve_dtype("auto", device),
        "gflops": {name: round(rate / 1e9, 1) for name, rate in rates_by_dtype(device).items()},
    }
    return found | ({"training": _train(device, found["dtype"])} if training else {})


def _train(device: torch.device, dtype: str) -> dict[str, Any]:
    from importlib import resources

    from phinetune.data import prepare

    rows = str(resources.files("phinetune.data.shipped") / "orders.train.jsonl")
    config = DataConfig(train=rows)
    with MemoryPeak(device) as memory:
        examples = list(prepare(config, load_tokenizer("smollm2", ModelKwargs(), {}), seed=0).train)
        model = load_model("smollm2", ModelKwargs(dtype=dtype), device)
        peft = PeftConfig(r=16, target_modules="all-linear")
        adapt_model(model, peft, seed=0)
        model.train()
        optimizer = make_optimizer(model, TrainingConfig(optim="adamw_torch_fused"), peft)
        steps = [examples[i * ROWS_A_STEP : (i + 1) * ROWS_A_STEP] for i in range(STEPS)]
        share = share_reached(model, optimizer, steps, config.max_batch_tokens, learning_rate=1e-4)
    trained = sum(len(example.ids) for step in steps for example in step)
    return {
        "model": "smollm2",
        "tokens_per_second": round(trained / share.seconds, 1),
        "gflops": round(share.achieved / 1e9, 1),
        "gflops_of_its_products": round(share.rate / 1e9, 1),
        "share_of_rate": round(share.of_rate, 3),
        "peak_gb": round(memory.gb, 2),
    }


def _gpu_memory(device: torch.device) -> dict[str, float] | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return {"total": total / 1e9, "free": free / 1e9}
