"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT knows one A and one B a layer.  A `MergedLinear` with g enabled parts of rank r is written, exactly, as a
layer of rank R = g·r whose B is zero off the diagonal:

    lora_A (R, in) = [ A_q ]        lora_B (out, R) = [ B_q  .   ]   rows of q
                     [ A_v ]                          [  .   .   ]   rows of k, not adapted
                                                      [  .   B_v ]   rows of v

with lora_alpha·g, so that the scaling stays; layers whose rank or scaling differ from the rest go into
`rank_pattern` and `alpha_pattern`.  A B with such zeros is read back as a `MergedLinear`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phinetune import lora
from phinetune.errors import AdapterError
from phinetune.lora.adapt import FusedParts, from_pattern, replace_module
from phinetune.recipe import PeftConfig

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# What an adapter may not ask for yet, with the values that ask for nothing. PiSSA, OLoRA and the like change the
# base when they begin: on the pristine base their adapters would answer wrongly.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (True, False, None, "gaussian"),
}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every LoRA parameter of the model under PEFT's name, contiguous, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, layer in lora.lora_layers(model):
        lora_B = layer.lora_B.detach()
        if isinstance(layer, lora.MergedLinear):
            lora_B = lora_B.new_zeros(layer.out_features, layer.lora_A.shape[0])
            for block in layer.blocks:
                lora_B[block.out, block.a] = layer.lora_B.detach()[block.b]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora_B.cpu().contiguous()
    return tensors


def load_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fills the LoRA layers of an adapted model; every layer must be there, and nothing else.

    Raises:
        AdapterError: listing what is missing, unexpected or of another shape, before anything is changed.
    """
    layers = dict(lora.lora_layers(model))
    expected = {f"{PREFIX}{name}.lora_{x}.weight" for name in layers for x in "AB"}
    faults = [f"missing {key}" for key in sorted(expected - tensors.keys())]
    faults += [f"unexpected {key}" for key in sorted(tensors.keys() - expected)]
    values: list[tuple[nn.Parameter, Tensor]] = []
    for name, layer in layers.items() if not faults else ():
        lora_A, lora_B = (tensors[f"{PREFIX}{name}.lora_{x}.weight"] for x in "AB")
        if isinstance(layer, lora.MergedLinear) and lora_B.shape == (layer.out_features, layer.lora_A.shape[0]):
            lora_B = torch.cat([lora_B[block.out, block.a] for block in layer.blocks])
        for parameter, value in ((layer.lora_A, lora_A), (layer.lora_B, lora_B)):
            if parameter.shape != value.shape:
                faults.append(f"{name} has shape {tuple(value.shape)}, the model {tuple(parameter.shape)}")
            values.append((parameter, value))
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise AdapterError(where, "; ".join(faults[:5]) + more, "use the base model it was made for")
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)


def adapter_config(model: nn.Module, config: PeftConfig, base: str, revision: str | None = None) -> dict[str, Any]:
    """PEFT's adapter_config.json for the layers the model has."""
    layers = dict(lora.lora_layers(model))
    ranks = {name: layer.lora_A.shape[0] for name, layer in layers.items()}
    alphas = {
        name: layer.scaling * (math.sqrt(ranks[name]) if config.use_rslora else ranks[name])
        for name, layer in layers.items()
    }
    r = Counter(ranks.values()).most_common(1)[0][0]
    lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _plain(lora_alpha),
        "lora_dropout": config.lora_dropout,
        "bias": config.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": _shortest_names(model, list(layers)),
        "modules_to_save": None,
        "rank_pattern": _pattern(model, ranks, r),
        "alpha_pattern": {key: _plain(value) for key, value in _pattern(model, alphas, lora_alpha).items()},
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def save_adapter(model: nn.Module, folder: Path, config: PeftConfig, base: str, revision: str | None = None) -> None:
    """Writes both files into a folder that exists."""
    text = json.dumps(adapter_config(model, config, base, revision), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    save_file(adapter_tensors(model), folder / TENSOR_FILE, metadata={"format": "pt"})


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of an adapter folder.

    Raises:
        AdapterError: if a file is missing or damaged, or the adapter is of a kind that isn't supported.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(str(folder), f"holds no adapter ({CONFIG_FILE} is missing)", "give the folder of a run")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(
            str(folder / CONFIG_FILE), f"is not valid JSON ({error})", "save the adapter again"
        ) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(str(folder / CONFIG_FILE), "is not a LoRA adapter", "only peft_type LORA can be read")
    for name, harmless in UNSUPPORTED.items():
        if config.get(name) not in harmless:
            raise AdapterError(str(folder), f"{name}={config[name]!r} is not supported yet", "use PEFT for it")
    try:
        return config, load_file(folder / TENSOR_FILE)
    except FileNotFoundError:
        raise AdapterError(str(folder), f"{TENSOR_FILE} is missing", "save the adapter again") from None
    except SafetensorError as error:
        raise AdapterError(str(folder / TENSOR_FILE), f"is damaged ({error})", "take an earlier checkpoint") from None


def load_adapter(model: nn.Module, folder: str | Path, fused: FusedParts | None = None) -> dict[str, Any]:
    """Puts an adapter's layers into a plain model and fills them, in fp32; returns the configuration.

    Raises:
        AdapterError: as above, or if the model has no such layers.
    """
    config, tensors = read_adapter(folder)
    names = [
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")
    ]
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = [name for name in names if name not in linears]
    if unknown or not names:
        what = f"adapts {', '.join(unknown[:3])}, which the model has not" if unknown else "holds no LoRA tensor"
        raise AdapterError(str(folder), what, "use the base model it was made for")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        rank = tensors[f"{PREFIX}{name}.lora_A.weight"].shape[0]
        splits = (fused or {}).get(name.rpartition(".")[2])
        lora_B = tensors.get(f"{PREFIX}{name}.lora_B.weight")
        enabled = _enabled_parts(lora_B, list(splits.values())) if splits and lora_B is not None else None
        options: dict[str, Any] = {
            "lora_alpha": _scaling_from(config, name, rank),
            "lora_dropout": config.get("lora_dropout") or 0.0,
            "dtype": torch.float32,
        }
        layer: lora.Linear
        if splits and enabled:
            layout: dict[str, Any] = {"enable_lora": enabled, "out_splits": list(splits.values())}
            options["lora_alpha"] *= rank // sum(enabled)
            layer = lora.MergedLinear.from_base(base, r=rank // sum(enabled), **options, **layout)
        else:
            options["lora_alpha"] *= rank
            layer = lora.Linear.from_base(base, r=rank, **options)
        replace_module(model, name, layer)
    load_adapter_tensors(model, tensors, str(folder))
    return config


def _enabled_parts(lora_B: Tensor, splits: list[int]) -> list[bool] | None:
    """Which parts of a fused layer an expanded B adapts; None where it isn't block-diagonal."""
    if lora_B.shape[0] != sum(splits):
        return None
    rows = lora_B.split(splits)
    enabled = [bool(part.any()) for part in rows]
    if not any(enabled) or lora_B.shape[1] % sum(enabled) != 0:
        return None
    r = lora_B.shape[1] // sum(enabled)
    for index, part in enumerate(part for part, on in zip(rows, enabled, strict=True) if on):
        if part[:, : index * r].any() or part[:, (index + 1) * r :].any():
            return None
    return enabled


def _scaling_from(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r, or alpha / √r with rslora."""
    alpha = from_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _shortest_names(model: nn.Module, names: list[str]) -> list[str]:
    """Own names where they mean exactly these layers (`o_proj`), full names otherwise."""
    return sorted({_short_name(model, name, set(names)) for name in names})


def _short_name(model: nn.Module, name: str, names: set[str]) -> str:
    own = name.rpartition(".")[2]
    namesakes = {
        n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n.rpartition(".")[2] == own
    }
    return own if namesakes <= names else name


def _pattern(model: nn.Module, values: Mapping[str, float], usual: float) -> dict[str, Any]:
    """{regex: value} for the layers whose value isn't the usual one."""
    pattern: dict[str, Any] = {}
    for name, value in values.items():
        if value != usual:
            same = {n for n, v in values.items() if v == value}
            pattern[re.escape(_short_name(model, name, same))] = value
    return pattern


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
