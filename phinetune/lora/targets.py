"""Which layers a recipe's names mean: PEFT's rules, and names for the parts of fused layers."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from phinetune.kernels.quantised import QuantisedWeight
from phinetune.lora.conv import Conv1d, Conv2d, Conv3d
from phinetune.lora.embedding import Embedding
from phinetune.lora.layer import LoRALayer
from phinetune.lora.linear import Linear
from phinetune.lora.modules_to_save import saved_modules

T = TypeVar("T")
Names = str | Sequence[str]

ALL_LINEAR = "all-linear"

# A fused layer's own name -> the layers it stands for, in order, with their rows:
# {"qkv_proj": {"q_proj": 3072, "k_proj": 3072, "v_proj": 3072}}
FusedParts = Mapping[str, Mapping[str, int]]

KINDS: dict[type[nn.Module], type[LoRALayer]] = {
    kind._plain_type: kind for kind in (Linear, Embedding, Conv1d, Conv2d, Conv3d)
}


class TargetError(ValueError):
    """Target names that match nothing, that contradict each other, or that can't be adapted."""


def find_targets(
    model: nn.Module,
    target_modules: Names,
    *,
    exclude_modules: Names | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: Names | None = None,
    modules_to_save: Sequence[str] = (),
    fused: FusedParts | None = None,
) -> dict[str, list[str]]:
    """{layer: parts of it that are meant}, in the model's order; no parts where the whole layer is.

    Raises:
        TargetError: listing what matches nothing, with what the model has.
    """
    fused = fused or {}
    wrapped = tuple(f"{name}." for name, _ in saved_modules(model))
    adaptable = {
        name: module
        for name, module in model.named_modules()
        if lora_class(module) is not None and not name.startswith(wrapped)
    }
    for excluded in _each(exclude_modules):
        if not any(matches(name, excluded) for name in _with_parts(adaptable, fused)):
            raise TargetError(f"exclude_modules: {_shown(excluded)} matches none of {own_names(adaptable)}")
    whole = whole_modules(model, modules_to_save)
    free = {
        name: module for name, module in adaptable.items() if not f"{name}.".startswith(tuple(f"{w}." for w in whole))
    }
    if target_modules == ALL_LINEAR:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        linears = [n for n, m in free.items() if lora_class(m) is Linear and m is not head]
        if not linears:
            raise TargetError("target_modules='all-linear': the model has no nn.Linear to adapt")
        meant: dict[str, set[str | None]] = {name: {None} for name in linears}
    else:
        if isinstance(target_modules, str) and layers_to_transform is not None:
            raise TargetError("layers_to_transform is for target_modules as a list: a regex can say which layers")
        _refuse_whole(model, target_modules, modules_to_save, fused)
        meant = _named(free, target_modules, fused)

    targets: dict[str, list[str]] = {}
    for name in adaptable:  # in the model's order, whatever the order of the targets
        if name not in meant or matches(name, exclude_modules):
            continue
        parts = list(fused.get(name.rpartition(".")[2], ()))
        named = [part for part in parts if part in meant[name]]
        if None in meant[name] and named:
            raise TargetError(
                f"target_modules names both {name} and its parts {', '.join(named)}: name one or the other"
            )
        wanted = named or parts
        kept = [part for part in wanted if not matches(_sibling(name, part), exclude_modules)]
        if kept or not parts:
            targets[name] = kept if named or kept != wanted else []
    layers_to_transform = None if layers_to_transform == [] else layers_to_transform
    if layers_to_transform is not None or layers_pattern:
        targets = _in_layers(targets, layers_to_transform, layers_pattern)
    if not targets:
        raise TargetError("exclude_modules leaves nothing of target_modules: exclude less")
    if "" in targets:
        raise TargetError("the model is itself the layer, and can't be replaced in place: use lora.Linear.from_base")
    return targets


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer has its weight as (in, out), as transformers' Conv1D does."""
    return type(module).__name__ == "Conv1D" or bool(getattr(module, "fan_in_fan_out", False))


def lora_class(module: nn.Module) -> type[LoRALayer] | None:
    """The LoRA layer for a plain one; None if there is none. transformers' Conv1D is a linear layer."""
    if type(module).__name__ == "Conv1D":
        return Linear
    return next((own for plain, own in KINDS.items() if isinstance(module, plain)), None)


def whole_modules(model: nn.Module, modules_to_save: Sequence[str]) -> list[str]:
    """The outermost modules whose names end in one of these, PEFT's rule: "norm" means input_layernorm too."""
    found: list[str] = []
    for name, _ in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and name.endswith(tuple(modules_to_save)):
            found.append(name)
    return found


def matches(name: str, targets: Names | None) -> bool:
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


def part_names(name: str, parts: Sequence[str]) -> list[str]:
    """What patterns are matched with: the layer's own name, or its parts' as if they were layers."""
    return [_sibling(name, part) for part in parts] or [name]


def _named(adaptable: Iterable[str], target_modules: Names, fused: FusedParts) -> dict[str, set[str | None]]:
    """{layer: the parts that were named, None for the whole}."""
    candidates = _with_parts(adaptable, fused)
    hits: dict[str, set[str | None]] = {}
    missing = []
    for target in _each(target_modules):
        matched = [candidate for candidate in candidates if matches(candidate, target)]
        if not matched:
            missing.append(target if isinstance(target, str) else target[0])
        for candidate in matched:
            layer, part = candidates[candidate]
            hits.setdefault(layer, set()).add(part)
    if missing or not hits:
        raise TargetError(_nothing_matched(missing, candidates))
    return hits


def _refuse_whole(model: nn.Module, target_modules: Names, modules_to_save: Sequence[str], fused: FusedParts) -> None:
    """Raises TargetError for targets that mean nothing but modules that train whole, or parts of them."""
    whole = [*whole_modules(model, modules_to_save), *(path for path, _ in saved_modules(model))]
    inside = tuple(f"{name}." for name in whole)
    names = _with_parts([n for n, m in model.named_modules() if n in whole or lora_class(m) is not None], fused)
    for target in _each(target_modules):
        matched = [name for name in names if matches(name, target)]
        if matched and all(f"{name}.".startswith(inside) for name in matched):
            raise TargetError(
                f"target_modules: {_shown(target)} means {matched[0]}, which trains whole under modules_to_save: "
                "name it in one of the two"
            )


def _with_parts(adaptable: Iterable[str], fused: FusedParts) -> dict[str, tuple[str, str | None]]:
    """Every name a target may mean: real layers, and the parts of fused ones beside their siblings."""
    candidates: dict[str, tuple[str, str | None]] = {name: (name, None) for name in adaptable}
    for name in list(candidates):
        for part in fused.get(name.rpartition(".")[2], ()):
            candidates[_sibling(name, part)] = (name, part)
    return candidates


def _in_layers(
    targets: dict[str, list[str]], layers_to_transform: int | Sequence[int] | None, layers_pattern: Names | None
) -> dict[str, list[str]]:
    """PEFT's rule: the first number in a name is its layer's index, or the one behind `layers_pattern`."""
    if layers_to_transform is None:
        raise TargetError("layers_pattern says where a layer's number stands: give layers_to_transform with it")
    wanted = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    rules = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    indices = {
        name: next((int(found[1]) for rule in rules if (found := re.match(rule, name))), None) for name in targets
    }
    if absent := wanted - set(indices.values()):
        there = sorted(index for index in set(indices.values()) if index is not None)
        raise TargetError(f"layers_to_transform: no adapted layer has the number {min(absent)}; there are {there}")
    return {name: parts for name, parts in targets.items() if indices[name] in wanted}


def check_reachable(model: nn.Module, names: Iterable[str]) -> None:
    """Layers that are read past their forward pass, or that compute in another way, would be adapted in vain.

    Raises:
        TargetError: for such a layer.
    """
    mend = "leave it out of target_modules, or list it under exclude_modules"
    places = _places(model)
    for name in names:
        path, _, child = name.rpartition(".")
        module, parent = model.get_submodule(name), model.get_submodule(path)
        others = [n for place, n in places.get(id(module), {}).items() if place != (id(parent), child)]
        if others:
            raise TargetError(f"{name}: the same layer is also {', '.join(others)}, which would stay plain; {mend}")
        if module._parameters.get("weight") is None:
            raise TargetError(f"{name}: its weight is computed (by a parametrization, say); {mend}")
        if isinstance(parent, nn.MultiheadAttention):
            raise TargetError(f"{name}: nn.MultiheadAttention reads this weight without calling the layer; {mend}")
        if "forward" in module.__dict__:
            raise TargetError(
                f"{name}: its forward was replaced (by accelerate's hooks, say); adapt the model before that"
            )
        plain = next((plain for plain in KINDS if isinstance(module, plain)), None)
        if plain is not None and type(module).forward is not plain.forward and not isinstance(module, LoRALayer):
            raise TargetError(f"{name}: {type(module).__name__} computes in a way of its own; {mend}")


def check_trainable(model: nn.Module, modules_to_save: Sequence[str], adapter_name: str) -> None:
    """Whether copies of these modules can train under an adapter's name.

    Raises:
        TargetError: for a quantised one, or a name that their `nn.ModuleDict` can't have.
    """
    for name in modules_to_save:
        for own, parameter in model.get_submodule(name).named_parameters():
            if isinstance(parameter, QuantisedWeight) or not (parameter.is_floating_point() or parameter.is_complex()):
                raise TargetError(
                    f"modules_to_save: {name} is quantised ({own}), and what is quantised can't train: name it under "
                    "target_modules, for LoRA beside it, or load the model unquantised"
                )
    if modules_to_save and hasattr(nn.ModuleDict(), adapter_name):
        raise TargetError(
            f"adapter_name={adapter_name!r}: torch has the name itself where modules_to_save are kept; take another"
        )


def _places(model: nn.Module) -> dict[int, dict[tuple[int, str], str]]:
    """{id of a module: {(id of a parent, name there): a path}}: a block that is used twice is one parent."""
    places: dict[int, dict[tuple[int, str], str]] = {}
    for path, parent in model.named_modules():
        for child, module in parent._modules.items():
            places.setdefault(id(module), {})[id(parent), child] = f"{path}.{child}".lstrip(".")
    return places


def _each(names: Names | None) -> list[Names]:
    """One query an entry: a regex, or a list of one name."""
    if names is None:
        return []
    return [names] if isinstance(names, str) else [[name] for name in names]


def _sibling(name: str, part: str) -> str:
    return f"{name.rpartition('.')[0]}.{part}".lstrip(".")


def _nothing_matched(missing: Sequence[str], candidates: Mapping[str, object]) -> str:
    own = {candidate.rpartition(".")[2] for candidate in candidates}
    hint = ""
    if own & set(missing):
        hint = f" A string is a regex for the whole name: write [{missing[0]}] for layers of that name."
    elif close := [match for target in missing for match in difflib.get_close_matches(target, own, n=1)]:
        hint = f" Did you mean {', '.join(dict.fromkeys(close))}?"
    return (
        f"target_modules: nothing in the model is called {', '.join(map(repr, missing))}.{hint} "
        f"The model has: {own_names(candidates)} (or 'all-linear')"
    )


def _shown(query: Names) -> str:
    return repr(query if isinstance(query, str) else query[0])


def own_names(names: Iterable[str]) -> str:
    """For messages: the last words of names, each once."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))
