"""Merging Phi-3-mini at full size: memory and time of `phinetune merge`, and whether plain transformers reads it.

    python benchmarks/merge.py [FOLDER]       16 GB of disk, some minutes; random weights, r 16 on all linear layers

Figures go to benchmarks/results/merge.json.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from phinetune.machine.memory import MemoryPeak

ROOT = Path(__file__).parents[1]
RANK, ALPHA, LOOKED_AT = 16, 32, "model.layers.17.mlp.gate_up_proj"
READ = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.config._attn_implementation = "sdpa"
said = model.generate(torch.arange(5, 25)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
print(type(model).__name__, model.dtype, said.shape[1], "peft" in sys.modules, "phinetune" in sys.modules)
"""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="phinetune-merge-") as folder:
        base = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "phi3-mini"
        if not base.is_dir():
            subprocess.run([sys.executable, ROOT / "benchmarks" / "reliability" / "plans.py", base], check=True)
        found = measure(base, Path(folder))
    packages = ("phinetune", "torch", "transformers", "safetensors")
    found["versions"] = {name: importlib.metadata.version(name) for name in packages}
    (ROOT / "benchmarks" / "results" / "merge.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found))


def measure(base: Path, folder: Path) -> dict[str, Any]:
    adapter, merged = folder / "adapter", folder / "merged"
    write_adapter(base, adapter)
    begin = time.perf_counter()
    with MemoryPeak() as memory:
        subprocess.run([sys.executable, "-m", "phinetune", "merge", adapter, "-o", merged], check=True)
    seconds = time.perf_counter() - begin
    read = subprocess.run([sys.executable, "-c", READ, merged], capture_output=True, text=True, check=True)
    expected = tensor_of(base, f"{LOOKED_AT}.weight").float()
    lora_A, lora_B = (tensor_of(adapter, f"base_model.model.{LOOKED_AT}.lora_{x}.weight") for x in "AB")
    expected += ALPHA / RANK * lora_B @ lora_A
    off = (tensor_of(merged, f"{LOOKED_AT}.weight") != expected.bfloat16()).float().mean()
    return {
        "merge_peak_gb": round(memory.gb, 3),
        "merge_seconds": round(seconds, 1),
        "merge_gigabytes_written": round(sum(p.stat().st_size for p in merged.iterdir()) / 1e9, 2),
        "merge_read_as": read.stdout.strip(),
        "merge_share_of_weights_that_differ": float(off),
    }


def write_adapter(base: Path, folder: Path) -> None:
    """B is drawn too, so that merging changes every weight."""
    folder.mkdir()
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # it is no dictionary
                if "_proj.weight" in key:
                    rows, columns = file.get_slice(key).get_shape()
                    name = f"base_model.model.{key.removesuffix('.weight')}"
                    tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
                    tensors[f"{name}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": RANK,
        "lora_alpha": ALPHA, "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def tensor_of(folder: Path, key: str) -> torch.Tensor:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if key in file.keys():  # noqa: SIM118
                return file.get_tensor(key)
    raise KeyError(key)


if __name__ == "__main__":
    main()
