"""LoRA on a live model: `adapt` swaps layers in by name, `fuse` folds them, `unfuse` unfolds them."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from phinetune.lora.layers import Linear, LoRALayer, MergedLinear

T = TypeVar("T")

ALL_LINEAR = "all-linear"

# A fused layer's own name -> the layers it stands for, in order, with their rows:
# {"qkv_proj": {"q_proj": 3072, "k_proj": 3072, "v_proj": 3072}}
FusedParts = Mapping[str, Mapping[str, int]]


class TargetError(ValueError):
    """Target names that match nothing, or that contradict each other."""


def adapt(
    model: nn.Module,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    *,
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    fused: FusedParts | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Puts LoRA layers in place of a model's linear layers; everything else is frozen.

    Args:
        model: any module; changed in place.
        target_modules: as in PEFT's LoraConfig. A list takes exact names and `.suffix`es; a string is a
            regex that must match the whole name; "all-linear" takes every `nn.Linear` but the output
            head.  Names of `fused` parts count as layers: "q_proj" on Phi-3 means its rows of qkv_proj.
        r, lora_alpha, lora_dropout, use_rslora: as in `Linear`.
        rank_pattern, alpha_pattern: r and lora_alpha for names that match a key, `(.*\\.)?(KEY)$`.
        exclude_modules: names that get no LoRA, matched as `target_modules` are.
        fused: which layers stand for several.
        dtype: of the LoRA parameters; the base's by default.

    Returns:
        The names of the layers that were replaced.

    Raises:
        TargetError: if a target matches nothing (the message lists what the model has), or if a fused
            layer and a part of it are both named with different meanings.
    """
    try:
        targets = _match_targets(model, target_modules, exclude_modules, fused or {})
        for key in (*(rank_pattern or {}), *(alpha_pattern or {})):
            if not any(from_pattern({key: True}, name, False) for name in targets):
                raise TargetError(f"rank_pattern or alpha_pattern: {key!r} matches none of {_own_names(targets)}")
    except re.error as error:
        raise TargetError(f"{error.pattern!r} is not a regular expression ({error})") from None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parts in targets.items():
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        options: dict[str, Any] = {
            "r": from_pattern(rank_pattern, name, r),
            "lora_alpha": from_pattern(alpha_pattern, name, lora_alpha),
            "lora_dropout": lora_dropout,
            "use_rslora": use_rslora,
            "dtype": dtype,
        }
        layer: Linear
        if parts:
            splits = (fused or {})[name.rpartition(".")[2]]
            layer = MergedLinear.from_base(
                base,
                **options,
                enable_lora=[part in parts for part in splits],
                out_splits=list(splits.values()),
            )
        else:
            layer = Linear.from_base(base, **options)
        replace_module(model, name, layer)
    return list(targets)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Name and layer of everything in the model that has LoRA parameters."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.has_lora:
            yield name, module


def fuse(model: nn.Module) -> None:
    """Folds every ΔW into a merged weight, so that inference costs one product a layer.

    Costs a second copy of the adapted weights; the base stays as it is, and training goes on from
    `unfuse(model)` (or `model.train()`) as if nothing had been.
    """
    for _, layer in lora_layers(model):
        layer.merge()


def unfuse(model: nn.Module) -> None:
    """Drops the merged weights: the exact reverse of `fuse`."""
    for _, layer in lora_layers(model):
        layer.unmerge()


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """The model with its adapters folded in, for the length of a `with` block."""
    fuse(model)
    try:
        yield
    finally:
        unfuse(model)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The model without its adapters: the base, for the length of a `with` block."""
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.lora_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_enabled = True


def unload(model: nn.Module) -> None:
    """Replaces every LoRA layer by a plain one that holds W + ΔW: the reverse of `adapt`, tuned."""
    for name, layer in list(lora_layers(model)):
        replace_module(model, name, layer.to_base())


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where `name` points to."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _match_targets(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None,
    fused: FusedParts,
) -> dict[str, list[str]]:
    """{layer: parts of it that were named}; no parts where the whole layer was."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, LoRALayer)
    }
    for excluded in [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or ():
        query: str | Sequence[str] = excluded if isinstance(exclude_modules, str) else [excluded]
        if not any(_matches(name, query) for name in linears):
            raise TargetError(f"exclude_modules: {excluded!r} matches none of {_own_names(linears)}")
    if target_modules == ALL_LINEAR:
        whole = [n for n, module in linears.items() if module is not head and not _matches(n, exclude_modules)]
        if not whole:
            raise TargetError("target_modules='all-linear': the model has no nn.Linear to adapt")
        return {name: [] for name in whole}

    # Every name a target may mean: real layers, and the parts of fused ones beside their siblings.
    candidates: dict[str, tuple[str, str | None]] = {linear: (linear, None) for linear in linears}
    for name in linears:
        parent, _, own = name.rpartition(".")
        for part in fused.get(own, ()):
            candidates[f"{parent}.{part}".lstrip(".")] = (name, part)

    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    hits: dict[str, set[str | None]] = {}
    missing = []
    for target in wanted:
        query = target if isinstance(target_modules, str) else [target]
        matched = [c for c in candidates if _matches(c, query)]
        if not matched:
            missing.append(target)
        for candidate in matched:
            linear, meant = candidates[candidate]
            if not _matches(candidate, exclude_modules) and not _matches(linear, exclude_modules):
                hits.setdefault(linear, set()).add(meant)
    if missing or not hits:
        raise TargetError(_nothing_matched(missing or wanted, candidates))

    targets: dict[str, list[str]] = {}
    for name in linears:  # in the model's order, whatever the order of the targets
        if name in hits:
            parts = [part for part in fused.get(name.rpartition(".")[2], ()) if part in hits[name]]
            if None in hits[name] and parts:
                raise TargetError(
                    f"target_modules names both {name} and its parts {', '.join(parts)}: name one or the other"
                )
            targets[name] = parts
    return targets


def _matches(name: str, targets: str | Sequence[str] | None) -> bool:
    """PEFT's rule: a string is a regex for the whole name, a list holds names and suffixes."""
    if targets is None:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def from_pattern(pattern: Mapping[str, T] | None, name: str, default: T) -> T:
    r"""PEFT's rule for rank_pattern and alpha_pattern: keys are regexes `(.*\.)?(KEY)$`, the first match wins."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _nothing_matched(missing: Sequence[str], candidates: Mapping[str, object]) -> str:
    own_names = {candidate.rpartition(".")[2] for candidate in candidates}
    hint = ""
    if own_names & set(missing):
        hint = f" A string is a regex for the whole name: write [{missing[0]}] for layers of that name."
    elif close := [match for target in missing for match in difflib.get_close_matches(target, own_names, n=1)]:
        hint = f" Did you mean {', '.join(dict.fromkeys(close))}?"
    return (
        f"target_modules: nothing in the model is called {', '.join(map(repr, missing))}.{hint} "
        f"The model has: {_own_names(candidates)} (or 'all-linear')"
    )


def _own_names(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))
