"""Whole modules that train beside the adapters: a head for a new task, embeddings for new tokens."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class ModulesToSaveWrapper(nn.Module):
    """A module and a trained copy of it for each adapter (PEFT's class of that name, and its attributes' names).

    The original stays as it is, so a weight that is tied to another layer's isn't trained there too.
    """

    def __init__(self, original_module: nn.Module, adapter_name: str, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active_adapters: dict[str, float] = {}
        self.lora_enabled = True
        self.add_copy(adapter_name, dtype)
        self.train(original_module.training)

    def add_copy(self, adapter_name: str, dtype: torch.dtype | None = None) -> None:
        """A copy that trains, in `dtype`: small steps would be rounded away in half precision."""
        self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module).to(dtype)

    @property
    def active_module(self) -> nn.Module:
        """The copy of the active adapter, else the original."""
        names = [name for name in self.active_adapters if name in self.modules_to_save]
        if not (names and self.lora_enabled):
            return self.original_module
        if len(names) > 1:
            raise ValueError(f"modules_to_save of {', '.join(names)} can't be added up: activate one of them")
        return self.modules_to_save[names[0]]

    def unwrap(self) -> nn.Module:
        """The active module, in the original's dtype."""
        return self.active_module.to(_dtype(self.original_module))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What goes into a copy is cast to its dtype, and what comes out to the original's."""
        active = self.active_module
        own, trained = _dtype(self.original_module), _dtype(active)
        if own is None or trained is None or own == trained:
            return active(*args, **kwargs)
        args, kwargs = tree_map(partial(_cast, dtype=trained), (args, kwargs))
        return tree_map(partial(_cast, dtype=own), active(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        """What a model asks of the module it put here (`embed_tokens.weight`) is the active one's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.active_module, name)


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def saved_modules(model: nn.Module) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    """Name and wrapper of every module that trains whole."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield name, module


def saved_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """{name of a parameter as if there were no wrapper: the trained copy's}."""
    return {
        f"{name}.{own}": tensor
        for name, wrapper in saved_modules(model)
        if adapter_name in wrapper.modules_to_save
        for own, tensor in wrapper.modules_to_save[adapter_name].state_dict(keep_vars=True).items()
    }
