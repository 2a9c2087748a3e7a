"""LoRA layers and their arithmetic, with loralib's interface; needs torch and nothing else.

    import phinetune.lora as lora          # in place of: import loralib as lora

    layer = lora.Linear(in_features, out_features, r=16)
    lora.mark_only_lora_as_trainable(model)
    torch.save(lora.lora_state_dict(model), path)
    model.load_state_dict(torch.load(path), strict=False)

or on a live model: `lora.adapt(model, ["q_proj", "v_proj"], r=16, lora_alpha=32)`.
"""

from phinetune.lora.adapt import adapt
from phinetune.lora.combine import add_weighted_adapter
from phinetune.lora.conv import Conv1d, Conv2d, Conv3d
from phinetune.lora.embedding import Embedding
from phinetune.lora.layer import LoRALayer
from phinetune.lora.linear import Linear, MergedLinear
from phinetune.lora.modules_to_save import ModulesToSaveWrapper
from phinetune.lora.state import (
    enable_input_require_grads,
    load_lora_state_dict,
    lora_state_dict,
    mark_only_lora_as_trainable,
)
from phinetune.lora.switch import (
    active_adapters,
    adapter_names,
    delete_adapter,
    disabled,
    enabled,
    fuse,
    fused,
    lora_layers,
    set_adapter,
    unfuse,
    unload,
)
from phinetune.lora.targets import TargetError

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "ModulesToSaveWrapper",
    "TargetError",
    "active_adapters",
    "adapt",
    "adapter_names",
    "add_weighted_adapter",
    "delete_adapter",
    "disabled",
    "enable_input_require_grads",
    "enabled",
    "fuse",
    "fused",
    "load_lora_state_dict",
    "lora_layers",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "set_adapter",
    "unfuse",
    "unload",
]
