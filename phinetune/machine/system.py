"""The machine and the versions that a run was made with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ["phinetune", "torch", "transformers", "tokenizers", "peft", "bitsandbytes"]
INSTRUCTIONS = ["avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm"]


def versions() -> dict[str, str | None]:
    """Of the packages that a run stands on; None for one that isn't installed."""
    return {name: _version(name) for name in PACKAGES}


def system() -> dict[str, str]:
    return {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def cpu() -> dict[str, Any]:
    """Its name, its cores, and those of its instructions that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = set((about.get("flags") or about.get("Features") or "").split())
    return {
        "name": about.get("model name") or platform.processor() or platform.machine(),
        "family": about.get("cpu family"),
        "cores": os.cpu_count(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
