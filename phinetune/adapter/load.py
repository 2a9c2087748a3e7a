"""Adapters in: PEFT's two files as LoRA layers, trained modules and biases of a live model."""

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
    MAGNITUDE,
    MATRICES,
    PREFIX,
    by_layer,
    grouped_A,
    read_adapter,
    scaling_from,
)
from phinetune.errors import AdapterError
from phinetune.lora.adapt import add_to_layer, save_whole
from phinetune.lora.adapters import keep_base_biases
from phinetune.lora.layer import DEFAULT
from phinetune.lora.modules_to_save import saved_modules
from phinetune.lora.targets import FusedParts, lora_class, matches


def load_adapter(
    model: nn.Module, folder: str | Path, fused: FusedParts | None = None, adapter_name: str = DEFAULT
) -> dict[str, Any]:
    """Puts an adapter's layers into a model and fills them, in fp32; returns the configuration.

    On a model that has adapters it comes beside them, switched off (`lora.set_adapter` switches it on).

    Raises:
        AdapterError: as above, or listing what doesn't fit the model; nothing is changed.
    """
    config, tensors = read_adapter(folder)
    layers, others = by_layer(tensors)
    modules = {name: module for name, module in model.named_modules() if lora_class(module) is not None}
    faults = [f"{name} is adapted, which the model has not" for name in layers if name not in modules]
    faults += [fault for name in layers if name in modules for fault in _misfits(name, modules[name], layers[name])]
    faults += _misplaced(model, others, config)
    if adapter_name in lora.adapter_names(model):
        faults.append(f"the model has an adapter {adapter_name!r} already")
    if not layers:
        faults.append("it holds no LoRA tensor")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise AdapterError(str(folder), "; ".join(faults[:3]) + more, "use the base model it was made for")

    before = lora.active_adapters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, own in layers.items():
        _fill_layer(model, name, own, config, fused or {}, adapter_name)
    _fill_others(model, layers, others, config.get("modules_to_save") or (), adapter_name)
    lora.set_adapter(model, before or adapter_name)
    return config


def _misfits(name: str, module: nn.Module, own: Mapping[str, Tensor]) -> list[str]:
    """What is missing, or of a shape that the layer can't take."""
    weight = module.get_parameter("weight")
    suffix_A, suffix_B = MATRICES[isinstance(module, nn.Embedding)]
    if missing := [suffix for suffix in (suffix_A, suffix_B) if suffix not in own]:
        return [f"missing {PREFIX}{name}{suffix}" for suffix in missing]
    if BASE_BIAS in own and module._parameters.get("bias") is None:
        return [f"{name} has a bias, which the model's layer has not"]
    lora_A, lora_B = own[suffix_A], own[suffix_B]
    r, groups = lora_A.shape[0], getattr(module, "groups", 1)
    if isinstance(module, nn.Embedding):
        expected = ((r, weight.shape[0]), (weight.shape[1], r))
    elif isinstance(module, nn.Linear):
        transposed = getattr(module, "fan_in_fan_out", False)
        rows, columns = reversed(weight.shape) if transposed else weight.shape
        expected = ((r, columns), (rows, r))
    elif weight.ndim == 2:  # transformers' Conv1D
        expected = ((r, weight.shape[0]), (weight.shape[1], r))
    else:
        channels, pointwise = weight.shape[1] * groups, [1] * (weight.ndim - 2)
        expected = ((r, channels, *weight.shape[2:]), (weight.shape[0], r // groups, *pointwise))  # type: ignore[assignment]
    if (tuple(lora_A.shape), tuple(lora_B.shape)) != expected:
        return [f"{name} has A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}, the model needs {expected}"]
    if groups > 1 and not torch.equal(lora_A, grouped_A(_first_group(lora_A, groups), groups)):
        return [f"{name} mixes the channels of its {groups} groups, which no grouped convolution does"]
    return []


def _first_group(lora_A: Tensor, groups: int) -> Tensor:
    """A (r, in/groups, …) of a convolution's first group; anything else as it is."""
    return lora_A if groups == 1 else lora_A[: lora_A.shape[0] // groups, : lora_A.shape[1] // groups]


def _misplaced(model: nn.Module, others: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    saved = config.get("modules_to_save") or ()
    faults = []
    for name, tensor in others.items():
        if name not in own or not (name.endswith("bias") or _saved_owner(name, saved)):
            faults.append(f"unexpected {PREFIX}{name}")
        elif own[name].shape != tensor.shape:
            faults.append(f"{name} has shape {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}")
    return faults


def _fill_layer(
    model: nn.Module,
    name: str,
    own: Mapping[str, Tensor],
    config: Mapping[str, Any],
    fused: FusedParts,
    adapter_name: str,
) -> None:
    module = model.get_submodule(name)
    suffix_A, suffix_B = MATRICES[isinstance(module, nn.Embedding)]
    rank, groups = own[suffix_A].shape[0], getattr(module, "groups", 1)
    scaling = scaling_from(config, name, rank)
    r = rank // groups
    settings: dict[str, Any] = {"r": r, "lora_alpha": scaling * r, "use_dora": bool(config.get("use_dora"))}
    if not isinstance(module, nn.Embedding):
        settings["lora_dropout"] = config.get("lora_dropout") or 0.0
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init != "gaussian":
        settings["init_lora_weights"] = init
    splits = fused.get(name.rpartition(".")[2])
    if splits and not settings["use_dora"] and (ranks := _ranks_of_parts(own[suffix_B], list(splits.values()))):
        equal = len(set(ranks) - {0}) == 1
        settings |= {
            "r": max(ranks) if equal else ranks,
            "lora_alpha": scaling * max(ranks) if equal else [scaling * r for r in ranks],
            "enable_lora": [r > 0 for r in ranks],
            "out_splits": list(splits.values()),
        }
    if BASE_WEIGHT in own:  # an embedding's own table, perhaps trained or resized before
        weight = module.get_parameter("weight")
        if not torch.equal(weight, own[BASE_WEIGHT].to(weight)):
            with torch.no_grad():
                weight.copy_(own[BASE_WEIGHT])
    layer = add_to_layer(model, name, adapter_name, settings, torch.float32)
    layer.load_product(adapter_name, _first_group(own[suffix_A], groups), own[suffix_B])
    if MAGNITUDE in own:
        with torch.no_grad():
            layer.lora_tensor("lora_magnitude_vector", adapter_name).copy_(own[MAGNITUDE].flatten())


def _fill_others(
    model: nn.Module,
    layers: Mapping[str, Mapping[str, Tensor]],
    others: Mapping[str, Tensor],
    modules_to_save: Sequence[str],
    adapter_name: str,
) -> None:
    """Trained biases and whole modules."""
    biases = {f"{name}.bias": own[BASE_BIAS] for name, own in layers.items() if BASE_BIAS in own}
    saved: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in others.items():
        owner = _saved_owner(name, modules_to_save)
        if owner is None:
            biases[name] = tensor
        else:
            saved[owner][name.removeprefix(f"{owner}.")] = tensor
    keep_base_biases(model, list(biases))
    with torch.no_grad():
        for name, tensor in biases.items():
            model.get_parameter(name).copy_(tensor)
        for owner, state in saved.items():
            save_whole(model, owner, adapter_name)
            wrapper = dict(saved_modules(model))[owner]
            wrapper.modules_to_save[adapter_name].load_state_dict(state)


def _saved_owner(name: str, modules_to_save: Sequence[str]) -> str | None:
    """The module that trains whole and holds this parameter."""
    path = name.split(".")
    owners = (".".join(path[:depth]) for depth in range(1, len(path)))
    return next((owner for owner in owners if matches(owner, modules_to_save)), None)


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
