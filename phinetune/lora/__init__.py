"""LoRA layers and their arithmetic, with loralib's interface; needs torch and nothing else.

    import phinetune.lora as lora          # in place of: import loralib as lora

    layer = lora.Linear(in_features, out_features, r=16)
    lora.mark_only_lora_as_trainable(model)
    torch.save(lora.lora_state_dict(model), path)
    model.load_state_dict(torch.load(path), strict=False)

or on a live model: `lora.adapt(model, ["q_proj", "v_proj"], r=16, lora_alpha=32)`.
"""

from phinetune.lora.adapt import TargetError, adapt, disabled, fuse, fused, lora_layers, unfuse, unload
from phinetune.lora.layers import Linear, LoRALayer, MergedLinear
from phinetune.lora.state import lora_state_dict, mark_only_lora_as_trainable

__all__ = [
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "TargetError",
    "adapt",
    "disabled",
    "fuse",
    "fused",
    "lora_layers",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "unfuse",
    "unload",
]
