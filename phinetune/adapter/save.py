"""Adapters out: a model's LoRA layers, trained modules and biases as PEFT's two files."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from phinetune import lora
from phinetune.adapter.peft_format import BASE_BIAS, MAGNITUDE, MATRICES, PREFIX, grouped_A, plain_number, write_adapter
from phinetune.errors import AdapterError
from phinetune.lora.biases import trained_biases
from phinetune.lora.layer import DEFAULT, LoRALayer
from phinetune.lora.modules_to_save import saved_modules, saved_tensors

CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


def save_adapter(
    model: nn.Module,
    folder: Path,
    base: str,
    revision: str | None = None,
    adapter_name: str = DEFAULT,
    chat_format: Mapping[str, str] | None = None,
) -> None:
    """Writes both files into a folder that exists; into its subfolder `adapter_name` where that isn't "default".

    `chat_format` (`data.chat_fingerprint`) is what the adapter was tuned with, to be compared when it is loaded.

    Raises:
        AdapterError: if a layer has no PEFT form.
    """
    try:
        config = adapter_config(model, base, revision, adapter_name)
        tensors = adapter_tensors(model, adapter_name)
    except ValueError as error:
        raise AdapterError(f"adapter {adapter_name!r}", str(error), "or save lora.lora_state_dict(model)") from None
    folder = folder if adapter_name == DEFAULT else folder / adapter_name
    folder.mkdir(exist_ok=True)
    write_adapter(folder, config, tensors, chat_format)


def adapter_tensors(model: nn.Module, adapter_name: str = DEFAULT) -> dict[str, Tensor]:
    """Everything of an adapter under PEFT's names, contiguous, on the CPU."""
    tensors: dict[str, Tensor] = {}
    layers = _layers(model, adapter_name)
    for name, layer in layers.items():
        _check_form(name, layer, adapter_name)
        product = layer.product(adapter_name)
        lora_A, lora_B = product.lora_A, product.lora_B
        if isinstance(layer, CONVOLUTIONS):
            lora_A = grouped_A(lora_A.view(-1, *layer.weight.shape[1:]), layer.groups)
            lora_B = lora_B.view(*lora_B.shape, *[1] * len(layer.kernel_size))
        suffix_A, suffix_B = MATRICES[isinstance(layer, nn.Embedding)]
        tensors[name + suffix_A], tensors[name + suffix_B] = lora_A, lora_B
        if layer.adapters[adapter_name].use_dora:
            magnitude = layer.magnitude(adapter_name)
            if isinstance(layer, CONVOLUTIONS):
                magnitude = magnitude.view(1, -1, *[1] * len(layer.kernel_size))
            tensors[name + MAGNITUDE] = magnitude
    tensors |= saved_tensors(model, adapter_name)
    for name in trained_biases(model):
        owner = name.removesuffix(".bias")
        tensors[owner + BASE_BIAS if owner in layers else name] = model.get_parameter(name)
    return {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def adapter_config(
    model: nn.Module, base: str, revision: str | None = None, adapter_name: str = DEFAULT
) -> dict[str, Any]:
    """PEFT's adapter_config.json for the layers the model has."""
    layers = _layers(model, adapter_name)
    products = {name: layer.product(adapter_name) for name, layer in layers.items()}
    first = next(iter(layers.values())).adapters[adapter_name]
    groups = {name: getattr(layer, "groups", 1) for name, layer in layers.items()}
    ranks = {name: product.lora_A.shape[0] * groups[name] for name, product in products.items()}
    alphas = {
        name: product.scaling * (math.sqrt(ranks[name]) if first.use_rslora else ranks[name])
        for name, product in products.items()
    }
    r, lora_alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    biased = {name.removesuffix(".bias") for name in trained_biases(model)}
    saved = [name for name, wrapper in saved_modules(model) if adapter_name in wrapper.modules_to_save]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": plain_number(lora_alpha),
        "lora_dropout": max(layer.adapters[adapter_name].lora_dropout for layer in layers.values()),
        "bias": ("lora_only" if biased <= layers.keys() else "all") if biased else "none",
        "fan_in_fan_out": any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        "init_lora_weights": True,
        "target_modules": _shortest_names(model, list(layers)),
        "modules_to_save": saved or None,
        "rank_pattern": _pattern(model, ranks, r),
        "alpha_pattern": {key: plain_number(value) for key, value in _pattern(model, alphas, lora_alpha).items()},
        "use_rslora": first.use_rslora,
        "use_dora": first.use_dora,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _check_form(name: str, layer: LoRALayer, adapter_name: str) -> None:
    """PEFT's convolutions leave out dilation and padding mode, and its DoRA knows no groups."""
    if isinstance(layer, CONVOLUTIONS):
        if set(layer.dilation) != {1} or layer.padding_mode != "zeros":
            raise ValueError(f"{name}: PEFT computes dilated or non-zero-padded convolutions differently")
        if layer.groups > 1 and layer.adapters[adapter_name].use_dora:
            raise ValueError(f"{name}: PEFT can't read DoRA on a convolution of groups")


def _layers(model: nn.Module, adapter_name: str) -> dict[str, LoRALayer]:
    layers = {name: layer for name, layer in lora.lora_layers(model) if adapter_name in layer.adapters}
    if not layers:
        raise ValueError(f"no layer has an adapter of that name; there are {lora.adapter_names(model)}")
    return layers


def _shortest_names(model: nn.Module, names: list[str]) -> list[str]:
    """Own names where they mean exactly these modules (`o_proj`), full names otherwise."""
    return sorted({_short_name(model, name, set(names)) for name in names})


def _short_name(model: nn.Module, name: str, names: set[str]) -> str:
    own = name.rpartition(".")[2]
    namesakes = {n for n, _ in model.named_modules() if n.rpartition(".")[2] == own}
    return own if namesakes <= names else name


def _pattern(model: nn.Module, values: Mapping[str, float], usual: float) -> dict[str, Any]:
    """{regex: value} for the layers whose value isn't the usual one. A full name begins with ^: it is no suffix."""
    pattern: dict[str, Any] = {}
    for name, value in values.items():
        if value != usual:
            short = _short_name(model, name, {n for n, v in values.items() if v == value})
            pattern[("^" if short == name else "") + re.escape(short)] = value
    return pattern
