"""PEFT's adapter format in and out, and the tuned model it makes."""

from phinetune.adapter.load import load_adapter
from phinetune.adapter.merge import merge_adapter
from phinetune.adapter.peft_format import CONFIG_FILE, TENSOR_FILE, read_adapter
from phinetune.adapter.portable import make_portable
from phinetune.adapter.publish import check_repository, files_to_publish, publish
from phinetune.adapter.save import adapter_config, adapter_tensors, save_adapter
from phinetune.adapter.tuned import is_adapter, load_tuned, recipe_of, run_folders

__all__ = [
    "CONFIG_FILE",
    "TENSOR_FILE",
    "adapter_config",
    "adapter_tensors",
    "check_repository",
    "files_to_publish",
    "is_adapter",
    "load_adapter",
    "load_tuned",
    "make_portable",
    "merge_adapter",
    "publish",
    "read_adapter",
    "recipe_of",
    "run_folders",
    "save_adapter",
]
