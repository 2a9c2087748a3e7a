"""Adapters in: PEFT's two files as LoRA layers, trained modules and biases of a live model."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phinetune import lora
from phinetune.adapter.peft_format import (
    BASE_BIAS,
    BASE_WEIGHT,
    BEGIN_AT_PRODUCT,
    CONFIG_FILE,
    MAGNITUDE,
    MATRICES,
    PREFIX,
    by_layer,
    grouped_A,
    read_adapter,
    scaling_from,
)
from phinetune.errors import AdapterError
from phinetune.lora.adapt import add_to_layers, save_whole
from phinetune.lora.biases import is_bias, keep_base_biases, trained_biases
from phinetune.lora.layer import DEFAULT, LoRALayer
from phinetune.lora.modules_to_save import saved_modules
from phinetune.lora.switch import replace_module, switch_off
from phinetune.lora.targets import FusedParts, check_trainable, is_transposed, lora_class, whole_modules
from phinetune.untrusted import bounded

PATTERN_SECONDS, PATTERN_BYTES = 0.1, 1 << 28  # for the patterns of an adapter's configuration


def load_adapter(
    model: nn.Module, folder: str | Path, fused: FusedParts | None = None, adapter_name: str = DEFAULT
) -> dict[str, Any]:
    """Puts an adapter's layers into a model and fills them, in fp32; returns the configuration.

    On a model that has adapters it comes beside them, switched off (`lora.set_adapter` switches it on).

    Raises:
        AdapterError: if a file is missing or damaged, of a kind that isn't supported, or listing what doesn't fit the
            model; nothing is changed.
    """
    config, tensors = read_adapter(folder)
    layers, others = by_layer(tensors)
    modules = {name: module for name, module in model.named_modules() if lora_class(module) is not None}
    faults = [f"{name} is adapted, which the model has not" for name in layers if name not in modules]
    try:  # a configuration is data of strangers: anything may stand in it, a pattern that takes forever too
        misfits = {name: _misfits(name, modules[name], layers[name], config) for name in layers if name in modules}
        faults += [fault for found in misfits.values() for fault in found]
        fitting = [name for name, found in misfits.items() if not found]
        faults += _misplaced(model, others, config)
        with bounded(PATTERN_SECONDS, PATTERN_BYTES):  # the patterns alone: Phi-3's tensors take longer to look at
            scalings = {n: scaling_from(config, n, _rank(modules[n], layers[n])) for n in fitting}
        settings = {
            n: _settings(n, modules[n], layers[n], scaling, config, fused or {}) for n, scaling in scalings.items()
        }
    except (TypeError, ValueError, AttributeError, ArithmeticError, MemoryError, re.error, TimeoutError) as error:
        what = f"{CONFIG_FILE} can't be used ({error})"
        raise AdapterError(str(folder), what, "save the adapter again") from None
    before, there = lora.active_adapters(model), lora.adapter_names(model)
    if adapter_name in there:
        faults.append(f"the model has an adapter {adapter_name!r} already")
    if there and (trained_biases(model) or config.get("bias") not in (None, "none")):
        faults.append("biases train with one adapter alone, and the model has another")
    if not layers:
        faults.append("it holds no LoRA tensor")
    faults += [f"{name} isn't finite" for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise AdapterError(str(folder), "; ".join(faults[:3]) + more, "use the base model it was made for")

    try:
        check_trainable(model, whole_modules(model, config.get("modules_to_save") or ()), adapter_name)
        made = add_to_layers(model, adapter_name, settings, torch.float32)
    except (ValueError, TypeError) as error:
        raise AdapterError(str(folder), str(error), "use the base model it was made for") from None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in made.items():
        if layer is not modules[name]:
            replace_module(model, name, layer)
        _fill(layer, adapter_name, layers[name])
    _fill_others(model, layers, others, config.get("modules_to_save") or (), adapter_name)
    if before or not there:
        lora.set_adapter(model, before or adapter_name)
    else:
        switch_off(model, adapter_name)
    return config


def _rank(module: nn.Module, own: Mapping[str, Tensor]) -> int:
    """Of the whole layer: a convolution's groups have a share of it each."""
    return own[MATRICES[isinstance(module, nn.Embedding)][0]].shape[0]


def _settings(
    name: str,
    module: nn.Module,
    own: Mapping[str, Tensor],
    scaling: float,
    config: Mapping[str, Any],
    fused: FusedParts,
) -> dict[str, Any]:
    """What the layer's adapter is made with: r, lora_alpha, …"""
    suffix_B = MATRICES[isinstance(module, nn.Embedding)][1]
    r = _rank(module, own) // getattr(module, "groups", 1)
    settings: dict[str, Any] = {
        "r": r,
        "lora_alpha": scaling * r,
        "lora_dropout": config.get("lora_dropout") or 0.0,
        "use_dora": bool(config.get("use_dora")),
    }
    init = config.get("init_lora_weights")
    if init in BEGIN_AT_PRODUCT and lora_class(module) is lora.Linear:
        settings["init_lora_weights"] = init
    splits = list(fused.get(name.rpartition(".")[2], {}).values())
    if splits and not settings["use_dora"] and (ranks := _ranks_of_parts(own[suffix_B], splits)):
        settings["enable_lora"], settings["out_splits"] = [part > 0 for part in ranks], splits
        if len(set(ranks) - {0}) == 1:
            settings["r"], settings["lora_alpha"] = max(ranks), scaling * max(ranks)
        else:
            settings["r"], settings["lora_alpha"] = ranks, [scaling * part for part in ranks]
    return settings


@torch.no_grad()
def _fill(layer: LoRALayer, adapter_name: str, own: Mapping[str, Tensor]) -> None:
    suffix_A, suffix_B = MATRICES[isinstance(layer, nn.Embedding)]
    layer.load_product(adapter_name, _first_group(own[suffix_A], getattr(layer, "groups", 1)), own[suffix_B])
    if MAGNITUDE in own:
        layer.lora_tensor("lora_magnitude_vector", adapter_name).copy_(own[MAGNITUDE].flatten())


def _misfits(name: str, module: nn.Module, own: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
    """What is missing, or of a shape that the layer can't take."""
    weight = module.get_parameter("weight")
    suffix_A, suffix_B = MATRICES[isinstance(module, nn.Embedding)]
    if missing := [suffix for suffix in (suffix_A, suffix_B) if suffix not in own]:
        return [f"missing {PREFIX}{name}{suffix}" for suffix in missing]
    outputs = weight.shape[1 if isinstance(module, nn.Embedding) or is_transposed(module) else 0]
    bias, table = own.get(BASE_BIAS), own.get(BASE_WEIGHT)
    if bias is not None and (module._parameters.get("bias") is None or bias.shape != (outputs,)):
        return [f"{name} has a bias of {bias.numel()}, which the model's layer has not"]
    if table is not None and (table.shape != weight.shape or not _is_rounded_alike(table, weight)):
        return [f"{name} brings a table of its own, which isn't the model's"]
    if bool(config.get("use_dora")) != (MAGNITUDE in own):
        return [f"{name} has {'a' if MAGNITUDE in own else 'no'} lora_magnitude_vector against use_dora"]
    if MAGNITUDE in own and own[MAGNITUDE].numel() != outputs:
        return [f"{name} has {own[MAGNITUDE].numel()} magnitudes, the model's layer {outputs} outputs"]
    lora_A, lora_B = own[suffix_A], own[suffix_B]
    r, groups = lora_A.shape[0] if lora_A.ndim else 0, getattr(module, "groups", 1)
    if isinstance(module, nn.Embedding):
        expected = ((r, weight.shape[0]), (weight.shape[1], r))
    elif lora_class(module) is lora.Linear:
        expected = ((r, weight.numel() // outputs), (outputs, r))
    else:
        channels, pointwise = weight.shape[1] * groups, [1] * (weight.ndim - 2)
        expected = ((r, channels, *weight.shape[2:]), (weight.shape[0], r // groups, *pointwise))  # type: ignore[assignment]
        if set(module.dilation) != {1} or module.padding_mode != "zeros":  # type: ignore[arg-type]
            return [f"{name} is dilated or padded in a way that PEFT leaves out"]
    if (tuple(lora_A.shape), tuple(lora_B.shape)) != expected:
        return [f"{name} has A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}, the model needs {expected}"]
    if groups > 1 and not torch.equal(lora_A, grouped_A(_first_group(lora_A, groups), groups)):
        return [f"{name} mixes the channels of its {groups} groups, which no grouped convolution does"]
    return []


def _is_rounded_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same but for the dtype they lie in."""
    other = other.to(one.device)
    return torch.equal(one, other.to(one.dtype)) or torch.equal(one.to(other.dtype), other)


def _first_group(lora_A: Tensor, groups: int) -> Tensor:
    """A (r, in/groups, …) of a convolution's first group; anything else as it is."""
    return lora_A if groups == 1 else lora_A[: lora_A.shape[0] // groups, : lora_A.shape[1] // groups]


def _misplaced(model: nn.Module, others: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
    own = {
        name.replace(".original_module", ""): tensor
        for name, tensor in model.state_dict().items()
        if ".modules_to_save." not in name
    }
    saved = whole_modules(model, config.get("modules_to_save") or ())
    needed = {name for name in own if _owner(name, saved)}
    faults = [f"missing {PREFIX}{name}" for name in sorted(needed - others.keys())]
    for name, tensor in others.items():
        if name not in own or not (is_bias(name.rpartition(".")[2]) or _owner(name, saved)):
            faults.append(f"unexpected {PREFIX}{name}")
        elif own[name].shape != tensor.shape:
            faults.append(f"{name} has shape {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}")
    return faults


def _fill_others(
    model: nn.Module,
    layers: Mapping[str, Mapping[str, Tensor]],
    others: Mapping[str, Tensor],
    modules_to_save: Sequence[str],
    adapter_name: str,
) -> None:
    """Trained biases and whole modules."""
    biases = {f"{name}.bias": own[BASE_BIAS] for name, own in layers.items() if BASE_BIAS in own}
    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    saved = whole_modules(model, modules_to_save)
    for name, tensor in others.items():
        owner = _owner(name, saved)
        if owner is None:
            biases[name] = tensor
        else:
            states[owner][name.removeprefix(f"{owner}.")] = tensor
    keep_base_biases(model, list(biases), torch.float32)
    with torch.no_grad():
        for name, tensor in biases.items():
            model.get_parameter(name).copy_(tensor)
    for owner, state in states.items():
        save_whole(model, owner, adapter_name, torch.float32)
        dict(saved_modules(model))[owner].modules_to_save[adapter_name].load_state_dict(state)


def _owner(name: str, modules: Sequence[str]) -> str | None:
    """The module, of those that train whole, that holds this parameter."""
    return next((module for module in modules if name.startswith(f"{module}.")), None)


def _ranks_of_parts(lora_B: Tensor, splits: list[int]) -> list[int] | None:
    """The rank of each part of a fused layer, 0 where it has none; None where B isn't block-diagonal."""
    if lora_B.shape[0] != sum(splits):
        return None
    used = [part.any(0).nonzero().flatten() for part in lora_B.split(splits)]
    if not any(len(columns) for columns in used):
        return None
    adapted = [columns for columns in used if len(columns)]
    equal = lora_B.shape[1] // len(adapted)
    starts = [int(columns[0]) for columns in adapted]
    if lora_B.shape[1] % len(adapted) == 0 and all(
        i * equal <= int(c[0]) and int(c[-1]) < (i + 1) * equal for i, c in enumerate(adapted)
    ):
        starts = [i * equal for i in range(len(adapted))]
    starts[0] = 0
    stops = [*starts[1:], lora_B.shape[1]]
    if any(int(columns[-1]) >= stop for columns, stop in zip(adapted, stops, strict=True)) or starts != sorted(starts):
        return None
    ranks = iter([stop - start for start, stop in zip(starts, stops, strict=True)])
    return [next(ranks) if len(columns) else 0 for columns in used]
