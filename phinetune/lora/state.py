"""Which parameters train, and the state dict that holds them: loralib's two utilities.

A LoRA parameter is one whose own name begins with `lora_`; a bias is one whose own name is `bias`.
The path in front of it says nothing: `flora_block.weight` is neither.
"""

from collections.abc import Iterator
from typing import Literal, get_args

from torch import Tensor, nn

from phinetune.lora.layers import LoRALayer

Bias = Literal["none", "all", "lora_only"]


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Freezes everything but the LoRA parameters and, by `bias`, no, all, or the LoRA layers' biases.

    Raises:
        ValueError: for another `bias`, before anything is changed.
    """
    trainable = dict(_selected(model, bias))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """The LoRA parameters (and biases, as above), detached, under the names of `model.state_dict()`."""
    return {name: parameter.detach() for name, parameter in _selected(model, bias)}


def _selected(model: nn.Module, bias: Bias) -> Iterator[tuple[str, nn.Parameter]]:
    if bias not in get_args(Bias):
        raise ValueError(f"bias={bias!r}: must be one of {', '.join(get_args(Bias))}")
    for path, module in model.named_modules():
        has_lora = isinstance(module, LoRALayer) and module.has_lora
        for name, parameter in module.named_parameters(recurse=False):
            is_bias = name == "bias" and (bias == "all" or (bias == "lora_only" and has_lora))
            if name.startswith("lora_") or is_bias:
                yield (f"{path}.{name}" if path else name), parameter
