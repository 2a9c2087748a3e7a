"""LoRA on a live model: `adapt` swaps layers in by name."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from phinetune.lora.biases import Bias, bias_names, keep_base_biases, trained_biases
from phinetune.lora.layer import DEFAULT, LoRALayer
from phinetune.lora.linear import Linear, MergedLinear
from phinetune.lora.modules_to_save import ModulesToSaveWrapper
from phinetune.lora.state import mark_only_lora_as_trainable
from phinetune.lora.switch import active_adapters, adapter_names, lora_layers, replace_module, set_adapter
from phinetune.lora.targets import (
    ALL_LINEAR,
    FusedParts,
    Names,
    TargetError,
    check_reachable,
    check_trainable,
    find_targets,
    from_pattern,
    lora_class,
    own_names,
    part_names,
    whole_modules,
)


def adapt(
    model: nn.Module,
    target_modules: Names = ALL_LINEAR,
    *,
    adapter_name: str = DEFAULT,
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    init_lora_weights: bool | str = True,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    exclude_modules: Names | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: Names | None = None,
    modules_to_save: Sequence[str] | None = None,
    bias: Bias = "none",
    fused: FusedParts | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Puts LoRA layers in place of a model's linear layers, embeddings and convolutions; all else is frozen.

    Args:
        model: any module; changed in place.
        target_modules: as in PEFT's LoraConfig. A list takes exact names and `.suffix`es; a string is a
            regex that must match the whole name; "all-linear" takes every `nn.Linear` (and transformers'
            Conv1D) but a language model's head. Names of `fused` parts count as layers: "q_proj" on Phi-3 means its
            rows of qkv_proj.
        adapter_name: a second call with another name adds a second adapter, which `set_adapter` switches on.
        r, lora_alpha, lora_dropout, use_rslora, use_dora, init_lora_weights: as in `Linear`.
        rank_pattern, alpha_pattern: r and lora_alpha for names that match a key, `(.*\\.)?(KEY)$`.
        exclude_modules: names that get no LoRA, matched as `target_modules` are.
        layers_to_transform, layers_pattern: only layers of these numbers, found behind this name in a path.
        modules_to_save: endings of names (as in PEFT) of modules of which a whole copy trains, in `dtype`; a
            classifier's new head (`score`), say, which "all-linear" would take.
        bias: which biases train: none, all, or lora_only (those of adapted layers).
        fused: which layers stand for several.
        dtype: of all that trains, but for biases outside adapted layers; by default float32, as in PEFT, since AdamW's
            small steps would be rounded away in half precision, and float64 in a model that has that.

    Returns:
        The names of the layers that have the adapter.

    Raises:
        TargetError: if a name matches nothing (the message lists what the model has), if a fused layer and a part
            of it are both named, or a layer can't be adapted or trained whole; nothing is changed.
    """
    if dtype is None:
        dtype = torch.float64 if any(p.dtype is torch.float64 for p in model.parameters()) else torch.float32
    to_save = list(modules_to_save or [])
    before = active_adapters(model)
    try:
        bias_names(model, bias)
        targets = find_targets(
            model,
            target_modules,
            exclude_modules=exclude_modules,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            modules_to_save=to_save,
            fused=fused,
        )
        adapted = [part for name, parts in targets.items() for part in part_names(name, parts)]
        for key in (*(rank_pattern or {}), *(alpha_pattern or {})):
            if not any(from_pattern({key: True}, name, False) for name in adapted):
                raise TargetError(f"rank_pattern or alpha_pattern: {key!r} matches none of {own_names(adapted)}")
    except re.error as error:
        raise TargetError(f"{error.pattern!r} is not a regular expression ({error})") from None
    for name in to_save:
        if not whole_modules(model, [name]):
            raise TargetError(f"modules_to_save: no module's name ends in {name!r}")
    there = adapter_names(model)
    if adapter_name in there:
        raise TargetError(f"adapter_name={adapter_name!r}: the model has an adapter of that name")
    if there and (bias != "none" or trained_biases(model)):
        raise TargetError(f"biases train with one adapter alone, and the model has {', '.join(there)}")
    for name in whole_modules(model, to_save):
        if adapted_within := [n for n, _ in lora_layers(model) if f"{n}.".startswith(f"{name}.")]:
            raise TargetError(f"modules_to_save: {name} has another adapter's LoRA on {adapted_within[0]}")
    check_trainable(model, whole_modules(model, to_save), adapter_name)

    settings: dict[str, Any] = {
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "use_dora": use_dora,
        "init_lora_weights": init_lora_weights,
    }
    each: dict[str, dict[str, Any]] = {}
    for name, parts in targets.items():
        if parts:
            ranks = _settings_of_parts(name, parts, fused or {}, rank_pattern, alpha_pattern, r, lora_alpha)
        else:
            ranks = {
                "r": from_pattern(rank_pattern, name, r),
                "lora_alpha": from_pattern(alpha_pattern, name, lora_alpha),
            }
        each[name] = settings | ranks
    layers = add_to_layers(model, adapter_name, each, dtype)
    if not any(adapter_name in layer.adapters for layer in layers.values()):
        raise TargetError(f"r={r} adapts nothing: give a rank of 1 or more")
    for name, layer in layers.items():
        if layer is not model.get_submodule(name):
            replace_module(model, name, layer)
    for name in whole_modules(model, to_save):
        save_whole(model, name, adapter_name, dtype)
    set_adapter(model, before or adapter_name)
    keep_base_biases(model, bias_names(model, bias), dtype)
    mark_only_lora_as_trainable(model, bias)
    return [name for name, layer in layers.items() if adapter_name in layer.adapters]


def add_to_layers(
    model: nn.Module, adapter_name: str, settings: Mapping[str, dict[str, Any]], dtype: torch.dtype | None
) -> dict[str, LoRALayer]:
    """Adds an adapter to layers, by name; those that are plain yet get a LoRA layer, which isn't put in place.

    Raises:
        TargetError: if a layer can't have it; nothing is changed.
    """
    layers: dict[str, LoRALayer] = {}
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    check_reachable(model, settings)
    try:
        for name, own in settings.items():
            layers[name] = _with_adapter(model.get_submodule(name), adapter_name, own, dtype)
    except Exception as error:
        for made, layer in layers.items():
            if layer is model.get_submodule(made):
                layer.delete_adapter(adapter_name)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        if isinstance(error, ValueError):
            raise TargetError(f"{name}: {error}") from None
        raise
    return layers


def _with_adapter(
    module: nn.Module, adapter_name: str, settings: dict[str, Any], dtype: torch.dtype | None
) -> LoRALayer:
    if isinstance(module, LoRALayer):
        module.add_adapter(adapter_name, module.make_adapter(**settings), dtype)
        return module
    kind = lora_class(module)
    assert kind is not None
    if "enable_lora" in settings and kind is Linear:
        kind = MergedLinear
    return kind.from_base(module, adapter_name=adapter_name, dtype=dtype, **settings)


def save_whole(model: nn.Module, name: str, adapter_name: str, dtype: torch.dtype | None = None) -> None:
    """Gives an adapter a trained copy of a module."""
    module = model.get_submodule(name)
    if isinstance(module, ModulesToSaveWrapper):
        module.add_copy(adapter_name, dtype)
    else:
        replace_module(model, name, ModulesToSaveWrapper(module, adapter_name, dtype))


def _settings_of_parts(
    name: str,
    parts: Sequence[str],
    fused: FusedParts,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
    r: int,
    lora_alpha: float,
) -> dict[str, Any]:
    """Flags, rows, ranks and alphas of a fused layer's parts: lists where they differ."""
    splits = fused[name.rpartition(".")[2]]
    names = dict(zip(parts, part_names(name, parts), strict=True))
    settings: dict[str, Any] = {
        "enable_lora": [part in parts for part in splits],
        "out_splits": list(splits.values()),
    }
    ranks = {part: from_pattern(rank_pattern, names[part], r) for part in parts}
    alphas = {part: from_pattern(alpha_pattern, names[part], lora_alpha) for part in parts}
    if len(set(ranks.values())) == len(set(alphas.values())) == 1:
        return settings | {"r": ranks[parts[0]], "lora_alpha": alphas[parts[0]]}
    return settings | {
        "r": [ranks.get(part, 0) for part in splits],
        "lora_alpha": [alphas.get(part, lora_alpha) for part in splits],
    }
