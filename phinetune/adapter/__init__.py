"""PEFT's adapter format in and out."""

from phinetune.adapter.peft_format import (
    CONFIG_FILE,
    TENSOR_FILE,
    adapter_config,
    adapter_tensors,
    load_adapter,
    load_adapter_tensors,
    read_adapter,
    save_adapter,
)

__all__ = [
    "CONFIG_FILE",
    "TENSOR_FILE",
    "adapter_config",
    "adapter_tensors",
    "load_adapter",
    "load_adapter_tensors",
    "read_adapter",
    "save_adapter",
]
