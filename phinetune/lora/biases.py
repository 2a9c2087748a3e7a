"""Biases that train beside an adapter, and the base's own, kept so that the base can still be had."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, get_args

import torch
from torch import nn

from phinetune.lora.layer import LoRALayer
from phinetune.lora.modules_to_save import saved_modules

Bias = Literal["none", "all", "lora_only"]

_TUNED = "_lora_tuned_"  # in front of its name: an attribute with what it is now, while the base's is in its place
_BASE = "lora_base_"  # in front of a bias's name: a buffer with what it was before it trained


def is_bias(own_name: str) -> bool:
    """By a parameter's own name: bias, bias_ih_l0, in_proj_bias; nothing of the path before it."""
    return own_name.startswith("bias") or own_name.endswith("_bias")


def bias_names(model: nn.Module, bias: Bias) -> list[str]:
    """The biases that train under a choice of `bias`.

    Raises:
        ValueError: for another choice.
    """
    if bias not in get_args(Bias):
        raise ValueError(f"bias={bias!r}: must be one of {', '.join(get_args(Bias))}")
    if bias == "none":
        return []
    wrapped = tuple(f"{path}." for path, _ in saved_modules(model))  # they train whole, or not at all
    return [
        f"{path}.{own}".lstrip(".")
        for path, module in model.named_modules()
        for own, parameter in module._parameters.items()
        if parameter is not None
        and is_bias(own)
        and not path.startswith(wrapped)
        and (bias == "all" or (isinstance(module, LoRALayer) and module.has_lora))
    ]


def keep_base_biases(model: nn.Module, names: Sequence[str], dtype: torch.dtype | None = None) -> None:
    """Remembers biases before they train. Those of LoRA layers train in `dtype`, others in their own."""
    for name in names:
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        if _BASE + own not in module._buffers:
            bias = module.get_parameter(own)
            module.register_buffer(_BASE + own, bias.detach().clone(), persistent=False)
            if isinstance(module, LoRALayer) and dtype is not None:
                bias.data = bias.data.to(dtype)


def trained_biases(model: nn.Module) -> list[str]:
    """The biases that train, or that were loaded with an adapter."""
    return [f"{path}.{own}".lstrip(".") for path, _, own in _kept(model)]


def forget_trained_biases(model: nn.Module) -> None:
    """Puts the base's biases back for good."""
    for _, module, own in list(_kept(model)):
        module.get_parameter(own).data = module._buffers[_BASE + own]  # type: ignore[assignment]
        del module._buffers[_BASE + own]


def accept_trained_biases(model: nn.Module) -> None:
    """Makes the trained biases the model's own."""
    for _, module, own in list(_kept(model)):
        bias = module.get_parameter(own)
        bias.data = bias.data.to(module.get_buffer(_BASE + own).dtype)
        del module._buffers[_BASE + own]


def base_biases(model: nn.Module) -> AbstractContextManager[None]:
    """The model with the base's biases, for the length of a `with` block."""
    return _biases(model, _BASE)


def tuned_biases(model: nn.Module) -> AbstractContextManager[None]:
    """The model with the biases that trained, inside a block of `base_biases` too."""
    return _biases(model, _TUNED)


@contextmanager
def _biases(model: nn.Module, which: str) -> Iterator[None]:
    kept = [(module, _TUNED + own, own, module.get_parameter(own)) for _, module, own in _kept(model)]
    outermost = [note not in module.__dict__ for module, note, _, _ in kept]
    before = [bias.data for _, _, _, bias in kept]
    for module, note, own, bias in kept:
        tuned = module.__dict__.setdefault(note, bias.data)
        bias.data = tuned if which == _TUNED else module.get_buffer(_BASE + own)
    try:
        yield
    finally:
        for (module, note, _, bias), value, first in zip(kept, before, outermost, strict=True):
            bias.data = value
            if first:
                del module.__dict__[note]


def _kept(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(path, module, bias's own name) of each."""
    for path, module in model.named_modules():
        for buffer in module._buffers:
            if buffer.startswith(_BASE):
                yield path, module, buffer.removeprefix(_BASE)
