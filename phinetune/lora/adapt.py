"""LoRA on a live model: `adapt` swaps layers in by name."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from phinetune.lora.adapters import (
    active_adapters,
    adapter_names,
    keep_base_biases,
    replace_module,
    set_adapter,
)
from phinetune.lora.layer import DEFAULT, LoRALayer
from phinetune.lora.linear import Linear, MergedLinear
from phinetune.lora.modules_to_save import ModulesToSaveWrapper, saved_modules
from phinetune.lora.state import Bias, bias_names, mark_only_lora_as_trainable
from phinetune.lora.targets import (
    ALL_LINEAR,
    FusedParts,
    Names,
    TargetError,
    find_targets,
    from_pattern,
    lora_class,
    matches,
    own_names,
    part_names,
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
            Conv1D) but the output head. Names of `fused` parts count as layers: "q_proj" on Phi-3 means its
            rows of qkv_proj.
        adapter_name: a second call with another name adds a second adapter, which `set_adapter` switches on.
        r, lora_alpha, lora_dropout, use_rslora, use_dora, init_lora_weights: as in `Linear`.
        rank_pattern, alpha_pattern: r and lora_alpha for names that match a key, `(.*\\.)?(KEY)$`.
        exclude_modules: names that get no LoRA, matched as `target_modules` are.
        layers_to_transform, layers_pattern: only layers of these numbers, found behind this name in a path.
        modules_to_save: names of modules of which a whole copy trains.
        bias: which biases train: none, all, or lora_only (those of adapted layers).
        fused: which layers stand for several.
        dtype: of the LoRA parameters; the base's by default.

    Returns:
        The names of the layers that have the adapter.

    Raises:
        TargetError: if a name matches nothing (the message lists what the model has), if a fused layer and a part
            of it are both named, or a layer can't be adapted; nothing is changed.
    """
    to_save = list(modules_to_save or [])
    before = active_adapters(model)
    try:
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
    whole = [name for name, _ in model.named_modules() if matches(name, to_save)]
    for name in to_save:
        if not any(matches(module, [name]) for module in whole):
            raise TargetError(f"modules_to_save: no module is called {name!r}")
    if adapter_name in adapter_names(model):
        raise TargetError(f"adapter_name={adapter_name!r}: the model has an adapter of that name")
    if bias != "none" and before:
        raise TargetError(f"bias={bias!r}: biases train with one adapter only, and the model has {list(before)}")

    for name, parts in targets.items():
        settings: dict[str, Any] = {
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "use_rslora": use_rslora,
            "use_dora": use_dora,
            "init_lora_weights": init_lora_weights,
        }
        if parts:
            settings |= _settings_of_parts(name, parts, fused or {}, rank_pattern, alpha_pattern, r, lora_alpha)
        else:
            settings["r"] = from_pattern(rank_pattern, name, r)
            settings["lora_alpha"] = from_pattern(alpha_pattern, name, lora_alpha)
        add_to_layer(model, name, adapter_name, settings, dtype)
    for name in whole:
        save_whole(model, name, adapter_name)
    set_adapter(model, before or adapter_name)
    keep_base_biases(model, bias_names(model, bias))
    mark_only_lora_as_trainable(model, bias)
    return list(targets)


def add_to_layer(
    model: nn.Module, name: str, adapter_name: str, settings: dict[str, Any], dtype: torch.dtype | None
) -> LoRALayer:
    """Adds an adapter to one layer, in whose place a LoRA layer comes where it isn't one yet."""
    module = model.get_submodule(name)
    if isinstance(module, LoRALayer):
        module.add_adapter(adapter_name, module.settings(**settings), dtype)
        return module
    kind = lora_class(module)
    assert kind is not None
    if "enable_lora" in settings and kind is Linear:
        kind = MergedLinear
    layer = kind.from_base(module, adapter_name=adapter_name, dtype=dtype, **settings)
    replace_module(model, name, layer)
    return layer


def save_whole(model: nn.Module, name: str, adapter_name: str) -> None:
    """Gives an adapter a trained copy of a module."""
    module = model.get_submodule(name)
    if isinstance(module, ModulesToSaveWrapper):
        module.add_copy(adapter_name)
    elif not any(name.startswith(f"{wrapped}.") for wrapped, _ in saved_modules(model)):
        replace_module(model, name, ModulesToSaveWrapper(module, adapter_name))


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
