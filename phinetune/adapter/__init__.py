"""PEFT's adapter format in and out, and the tuned model it makes."""

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
from phinetune.adapter.tuned import is_adapter, load_tuned, run_folders

__all__ = [
    "CONFIG_FILE",
    "TENSOR_FILE",
    "adapter_config",
    "adapter_tensors",
    "is_adapter",
    "load_adapter",
    "load_adapter_tensors",
    "load_tuned",
    "read_adapter",
    "run_folders",
    "save_adapter",
]
