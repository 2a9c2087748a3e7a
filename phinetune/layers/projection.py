"""What a linear module computes, as weights and low-rank factors: plain layers, phinetune's, PEFT's."""

from typing import Any

import torch
from torch import Tensor, nn

from phinetune.lora.functional import Block, Factors, Projection
from phinetune.lora.layer import be_called
from phinetune.lora.linear import Linear, MergedLinear


def computing_dtype(x: Tensor) -> torch.dtype:
    """What products of `x` are computed in: autocast's dtype where it is on.  A fast path switches autocast off for
    itself and asks for weights of this dtype."""
    device = x.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # there is none on meta
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


def is_watched(module: nn.Module) -> bool:
    """Whether somebody else sees a module's calls, by hooks or a forward of its own: it can't be passed by then.

    Hooks that see nothing are lora's own, and transformers' recorders, which stay when nothing is recorded any more.
    """
    if torch.nn.modules.module._has_any_global_hook():
        return True
    hooks = [hook for hook in module._forward_hooks.values() if not str(hook.__module__).startswith("transformers.")]
    hooks += [hook for hook in module._forward_pre_hooks.values() if hook is not be_called]
    return bool(hooks or module._backward_hooks or module._backward_pre_hooks) or "forward" in module.__dict__


def projection_of(module: nn.Module, dtype: torch.dtype) -> Projection | None:
    """What a module does with an input of a dtype; None if it isn't a frozen product in it with LoRA updates."""
    if type(module) is nn.Linear:
        projection: Projection | None = Projection((module.weight,), (module.bias,))
    elif type(module) in (Linear, MergedLinear):
        projection = _of_ours(module)
    elif hasattr(module, "base_layer") and hasattr(module, "lora_variant"):
        projection = _of_pefts(module)
    else:
        return None
    if projection is None or is_watched(module):
        return None
    tensors = [*projection.weights, *(bias for bias in projection.biases if bias is not None)]
    if any(tensor.requires_grad or tensor.dtype != dtype for tensor in tensors):
        return None
    return projection


def _of_ours(layer: Any) -> Projection | None:
    if any(adapter.use_dora for adapter in layer.adapters.values()) or (layer.merged and not torch.is_grad_enabled()):
        return None
    layer.outdate()
    projection: Projection = layer.projection()
    return projection


def _of_pefts(layer: Any) -> Projection | None:
    """`peft.tuners.lora.Linear` (PEFT 0.21): y = base(x) + Σ scaling · B(A(dropout(x))) over its active adapters."""
    base = layer.base_layer
    if type(base) is not nn.Linear or is_watched(base) or layer.merged or layer.lora_variant:
        return None
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    updates, dropouts = [], set()
    for name in names:
        lora_A, lora_B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        is_plain = type(lora_A) is type(lora_B) is nn.Linear and lora_B.bias is None
        if not (is_plain and isinstance(dropout, nn.Dropout | nn.Identity)):
            return None
        if any(map(is_watched, (lora_A, lora_B, dropout))):
            return None
        r = lora_A.weight.shape[0]
        block = Block(slice(0, base.out_features), slice(0, r), slice(0, lora_B.weight.numel()), layer.scaling[name])
        updates.append(Factors(lora_A.weight, lora_B.weight, (block,)))
        dropouts.add(dropout.p if isinstance(dropout, nn.Dropout) and layer.training else 0.0)
    if len(dropouts) > 1:
        return None
    return Projection((base.weight,), (base.bias,), tuple(updates), max(dropouts, default=0.0))
