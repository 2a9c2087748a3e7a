"""An adapter for servers that know one rank and one scaling."""

from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from phinetune.adapter.peft_format import (
    BASE_WEIGHT,
    BEGIN_AT_PRODUCT,
    MATRICES,
    PREFIX,
    by_layer,
    plain_number,
    read_adapter,
    scaling_from,
    write_adapter,
)
from phinetune.errors import AdapterError


def make_portable(source: str | Path, target: str | Path) -> None:
    """Writes an adapter that servers with one rank and one scaling for all layers (vLLM) answer with rightly.

    What `rank_pattern` and `alpha_pattern` say is folded into the tensors: ranks padded with zeros to the largest, the
    scaling of the odd layers multiplied into B.

    Raises:
        AdapterError: for DoRA, biases and whole modules, which such servers refuse, or a target that isn't empty.
    """
    config, tensors = read_adapter(source)
    target = Path(target)
    if target.is_dir() and any(target.iterdir()):
        raise AdapterError(str(target), "is not empty", "give a new folder")
    foreign = [name for name in ("use_dora", "modules_to_save") if config.get(name)]
    foreign += [f"bias={config['bias']}"] if config.get("bias") not in (None, "none") else []
    foreign += [config["init_lora_weights"]] if config.get("init_lora_weights") in BEGIN_AT_PRODUCT else []
    foreign += ["a saved embedding table"] if any(key.endswith(BASE_WEIGHT) for key in tensors) else []
    if foreign:
        raise AdapterError(str(source), f"uses {', '.join(foreign)}, which has no portable form", "merge it instead")
    layers, _ = by_layer(tensors)
    matrices = {name: MATRICES[MATRICES[True][0] in own] for name, own in layers.items()}
    for name, own in layers.items():
        if faulty := [key for key in matrices[name] if key not in own or not own[key].ndim]:
            raise AdapterError(str(source), f"{PREFIX}{name}{faulty[0]} is missing, or no matrix", "save it again")
    ranks = {name: own[matrices[name][0]].shape[0] for name, own in layers.items()}
    scalings = {name: scaling_from(config, name, rank) for name, rank in ranks.items()}
    r, scaling = max(ranks.values()), Counter(scalings.values()).most_common(1)[0][0] or 1.0
    portable: dict[str, Tensor] = {}
    for name, own in layers.items():
        key_A, key_B = matrices[name]
        if own[key_A].ndim != 2:
            raise AdapterError(str(source), f"adapts the convolution {name}, which has no portable form", "merge it")
        lora_A, lora_B = own[key_A], own[key_B]
        if scalings[name] != scaling:
            lora_B = (lora_B.float() * (scalings[name] / scaling)).to(lora_B.dtype)
        missing = r - ranks[name]
        portable[PREFIX + name + key_A] = nn.functional.pad(lora_A, (0, 0, 0, missing)).contiguous()
        portable[PREFIX + name + key_B] = nn.functional.pad(lora_B, (0, missing)).contiguous()
    flat: dict[str, Any] = {
        "r": r,
        "lora_alpha": plain_number(scaling * r),
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }
    target.mkdir(parents=True, exist_ok=True)
    write_adapter(target, {**config, **flat}, portable)
