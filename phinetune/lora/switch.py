"""The adapters of a model: which there are, which are on, and folding them into the weights and out again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from phinetune.lora.biases import (
    accept_trained_biases,
    base_biases,
    forget_trained_biases,
    trained_biases,
    tuned_biases,
)
from phinetune.lora.layer import LoRALayer
from phinetune.lora.modules_to_save import ModulesToSaveWrapper, saved_modules
from phinetune.lora.targets import TargetError

Adapters = str | Sequence[str] | Mapping[str, float]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Name and layer of everything in the model that has LoRA parameters."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer) and module.has_lora:
            yield name, module


def adapter_names(model: nn.Module) -> list[str]:
    """Every adapter of the model."""
    names = [name for _, layer in lora_layers(model) for name in layer.adapters]
    names += [name for _, wrapper in saved_modules(model) for name in wrapper.modules_to_save]
    return list(dict.fromkeys(names))


def active_adapters(model: nn.Module) -> dict[str, float]:
    """Name -> weight of the adapters that are on."""
    active: dict[str, float] = {}
    for holder in _holders(model):
        active.update(holder.active_adapters)
    return active


def set_adapter(model: nn.Module, adapters: Adapters) -> None:
    """Chooses the adapters that the model answers with, and that train: "a", ["a", "b"] or {"a": 0.7, "b": 0.3}.

    Several are added up: y = x Wᵀ + Σ weight · s · x Aᵀ Bᵀ.

    Raises:
        TargetError: if the model has no adapter of a name, or none is given; nothing is changed.
    """
    weights = _weights(adapters)
    if not weights:
        raise TargetError("no adapter is named: for the base, use lora.disabled(model)")
    check_known(model, weights)
    if trained_biases(model) and any(weight != 1 for weight in weights.values()):
        raise TargetError("trained biases can't be weighted: give the adapter a weight of 1")
    for path, wrapper in saved_modules(model):
        mine = {name: weight for name, weight in weights.items() if name in wrapper.modules_to_save}
        if len(mine) > 1 or any(weight != 1 for weight in mine.values()):
            raise TargetError(f"modules_to_save: {path} was trained whole, and can't be weighted or added up: {mine}")
    for holder in _holders(model):
        if isinstance(holder, ModulesToSaveWrapper):
            holder.active_adapters = {n: w for n, w in weights.items() if n in holder.modules_to_save}
            for name, module in holder.modules_to_save.items():
                module.requires_grad_(name in weights)
        else:
            holder.active_adapters = {n: w for n, w in weights.items() if n in holder.adapters}
            for name in holder.adapters:
                for own in holder.lora_tensors(name):
                    if own in holder._parameters:
                        holder.get_parameter(own).requires_grad_(name in weights)
    for name in trained_biases(model):
        model.get_parameter(name).requires_grad_(True)


def check_known(model: nn.Module, adapters: Iterable[str]) -> None:
    """Raises TargetError for names that no adapter of the model has."""
    there = adapter_names(model)
    if unknown := [name for name in adapters if name not in there]:
        raise TargetError(f"no adapter is called {', '.join(map(repr, unknown))}: there are {there}")


def switch_off(model: nn.Module, adapter_name: str) -> None:
    """Takes an adapter out of those that are active, and freezes it."""
    for holder in _holders(model):
        holder.active_adapters = {n: w for n, w in holder.active_adapters.items() if n != adapter_name}
        if isinstance(holder, ModulesToSaveWrapper):
            if adapter_name in holder.modules_to_save:
                holder.modules_to_save[adapter_name].requires_grad_(False)
        else:
            for tensor in holder.lora_tensors(adapter_name).values():
                tensor.requires_grad_(False)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Drops an adapter, and with the last one the biases that train; the layers stay, plain where they have no other.

    Where it was the only active one, none is: switch another on with `set_adapter`.

    Raises:
        TargetError: if there is none of that name.
    """
    check_known(model, [adapter_name])
    if adapter_names(model) == [adapter_name]:
        forget_trained_biases(model)
    switch_off(model, adapter_name)
    for holder in list(_holders(model)):
        if isinstance(holder, ModulesToSaveWrapper):
            if adapter_name in holder.modules_to_save:
                del holder.modules_to_save[adapter_name]
        elif adapter_name in holder.adapters:
            holder.delete_adapter(adapter_name)


@contextmanager
def enabled(model: nn.Module, adapters: Adapters | None = None) -> Iterator[None]:
    """The model with its adapters (or with these, and their weights) on, for the length of a `with` block."""
    before = [(holder, holder.active_adapters) for holder in _holders(model)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if adapters is not None:
            set_adapter(model, adapters)
        with _switched(model, on=True):
            yield
    finally:
        for holder, active in before:
            holder.active_adapters = active  # type: ignore[assignment]
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, trained modules and biases: the base, for the length of a `with` block."""
    with _switched(model, on=False):
        yield


@contextmanager
def _switched(model: nn.Module, on: bool) -> Iterator[None]:
    before = [(holder, holder.lora_enabled) for holder in _holders(model)]
    for holder, _ in before:
        holder.lora_enabled = on
    try:
        with tuned_biases(model) if on else base_biases(model):
            yield
    finally:
        for holder, was_on in before:
            holder.lora_enabled = was_on


def fuse(model: nn.Module) -> None:
    """Folds every active ΔW into a merged weight, so that inference costs one product a layer.

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
    """The model with its adapters folded in, for the length of a `with` block; what was folded in before stays so."""
    apart = [layer for _, layer in lora_layers(model) if not layer.merged]
    fuse(model)
    try:
        yield
    finally:
        for layer in apart:
            layer.unmerge()


def unload(model: nn.Module) -> None:
    """Replaces every LoRA layer by a plain one that holds W + ΔW: the reverse of `adapt`, tuned.

    An adapted embedding that was tied to the head isn't any more: set `config.tie_word_embeddings` to False before a
    transformers model is saved.
    """
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALayer)]:
        replace_module(model, name, layer.to_base())
    for name, wrapper in list(saved_modules(model)):
        replace_module(model, name, wrapper.unwrap())
    accept_trained_biases(model)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where `name` points to.

    Raises:
        TargetError: if that is the model itself.
    """
    if not name:
        raise TargetError("the model is itself the layer, and can't be replaced in place: use from_base or to_base")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _holders(model: nn.Module) -> Iterator[LoRALayer | ModulesToSaveWrapper]:
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) or (isinstance(module, LoRALayer) and module.has_lora):
            yield module


def _weights(adapters: Adapters) -> dict[str, float]:
    """{"a": 1.0} of "a", ["a"] or {"a": 1.0}."""
    if isinstance(adapters, Mapping):
        return {name: float(weight) for name, weight in adapters.items()}
    return dict.fromkeys([adapters] if isinstance(adapters, str) else adapters, 1.0)
