"""Which parameters train, and the state dict that holds them: loralib's utilities, and a loader that is strict.

What belongs to LoRA is known from the model's structure and not from names: `flora_block.weight` is neither a LoRA
parameter nor a bias.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from phinetune.lora.biases import Bias, bias_names, keep_base_biases
from phinetune.lora.layer import LoRALayer
from phinetune.lora.modules_to_save import saved_modules


class Loaded(NamedTuple):
    """What `load_lora_state_dict` found: keys of the model that the state lacked, and keys it had no place for."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Freezes everything but the active adapters' parameters and, by `bias`, no, all, or the LoRA layers' biases.

    What the biases are by then is remembered as the base's (see `disabled`): load its weights before.

    Raises:
        ValueError: for another `bias`, before anything is changed.
    """
    biases = bias_names(model, bias)
    keep_base_biases(model, [name for name in biases if not model.get_parameter(name).is_meta])
    trained = {id(tensor) for tensor in _lora_tensors(model, active_only=True).values()}
    trained |= {id(model.get_parameter(name)) for name in biases}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """The LoRA parameters of all adapters (and trained modules, and biases, as above), detached, under the names
    of `model.state_dict()`.

    Raises:
        ValueError: for another `bias`.
    """
    biases = {name: model.get_parameter(name) for name in bias_names(model, bias)}
    return {name: tensor.detach() for name, tensor in {**_lora_tensors(model), **biases}.items()}


def load_lora_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], *, strict: bool = True) -> Loaded:
    """Loads what `lora_state_dict` (or loralib's) saved, all of it or nothing.

    Args:
        model: with the same LoRA layers.
        state_dict: LoRA parameters and perhaps biases; loralib's keys for convolutions are understood. Other keys of
            the model, as in a whole `model.state_dict()`, are loaded too.
        strict: missing LoRA parameters and unknown keys are an error; else they are returned.

    Raises:
        RuntimeError: listing every missing, unexpected or misshapen key; the model is unchanged.
    """
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    renamed = {_own_key(key, own): value for key, value in state_dict.items()}
    missing = sorted(_lora_tensors(model).keys() - renamed.keys())
    unexpected = sorted(renamed.keys() - own.keys())
    faults = [f"missing {key}" for key in missing] + [f"unexpected {key}" for key in unexpected] if strict else []
    for key in renamed.keys() & own.keys():
        if renamed[key].shape != own[key].shape:
            faults.append(f"{key} has shape {tuple(renamed[key].shape)}, the model's is {tuple(own[key].shape)}")
    if faults:
        raise RuntimeError("this state doesn't fit the model's LoRA layers: " + "; ".join(sorted(faults)))
    with torch.no_grad():
        for key in renamed.keys() & own.keys():
            own[key].copy_(renamed[key])
    return Loaded(missing, unexpected)


def enable_input_require_grads(model: nn.Module) -> list[RemovableHandle]:
    """Lets re-entrant checkpoints pass gradients on where the embeddings are frozen; returns what undoes it.

    Such a checkpoint gives its parameters no gradient unless an input asks for one (torch says so in a warning).
    The name is transformers'. Non-re-entrant checkpoints need nothing.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [module.register_forward_hook(_require_grad) for module in embeddings]


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()


def _lora_tensors(model: nn.Module, active_only: bool = False) -> dict[str, Tensor]:
    """Parameters of adapters, whole modules that train, and what PiSSA and OLoRA began with."""
    return dict(_each_lora_tensor(model, active_only))


def _each_lora_tensor(model: nn.Module, active_only: bool) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        if isinstance(module, LoRALayer):
            for adapter_name in module.active_adapters if active_only else module.adapters:
                for name, tensor in module.lora_tensors(adapter_name).items():
                    yield (f"{path}.{name}" if path else name), tensor
    for path, wrapper in saved_modules(model):
        for adapter_name, trained in wrapper.modules_to_save.items():
            if not active_only or adapter_name in wrapper.active_adapters:
                for name, tensor in trained.state_dict(keep_vars=True).items():
                    yield f"{path}.modules_to_save.{adapter_name}.{name}", tensor


def _own_key(key: str, own: Mapping[str, Tensor]) -> str:
    """loralib wraps its convolutions: `layer.conv.bias` is our `layer.bias`."""
    path, _, name = key.rpartition(".")
    if key not in own and (path == "conv" or path.endswith(".conv")):
        return f"{path.removesuffix('conv')}{name}"
    return key
