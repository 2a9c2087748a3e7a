"""Biases that train beside an adapter, and the base's own, kept so that the base can still be had."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import nn

from phinetune.lora.layer import LoRALayer
from phinetune.lora.modules_to_save import saved_modules

Bias = Literal["none", "all", "lora_only"]

_BASE = "lora_base_"  # in front of a bias's name: a buffer with what it was before it trained


def bias_names(model: nn.Module, bias: Bias) -> list[str]:
    """The biases that train under a choice of `bias`: parameters called bias, bias_… or …_bias (`in_proj_bias`).

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
        and (own.startswith("bias") or own.endswith("_bias"))
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


@contextmanager
def base_biases(model: nn.Module) -> Iterator[None]:
    """The model with the base's biases, for the length of a `with` block."""
    tuned = [(module.get_parameter(own), module.get_buffer(_BASE + own)) for _, module, own in _kept(model)]
    values = [bias.data for bias, _ in tuned]
    for bias, base in tuned:
        bias.data = base
    try:
        yield
    finally:
        for (bias, _), value in zip(tuned, values, strict=True):
            bias.data = value


def _kept(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(path, module, bias's own name) of each."""
    for path, module in model.named_modules():
        for buffer in module._buffers:
            if buffer.startswith(_BASE):
                yield path, module, buffer.removeprefix(_BASE)
