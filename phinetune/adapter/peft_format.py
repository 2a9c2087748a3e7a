"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT knows one A and one B a layer.  A `MergedLinear` with g adapted parts of rank r is written, exactly, as a
layer of rank R = g·r whose B is zero off the diagonal:

    lora_A (R, in) = [ A_q ]        lora_B (out, R) = [ B_q  .   ]   rows of q
                     [ A_v ]                          [  .   .   ]   rows of k, not adapted
                                                      [  .   B_v ]   rows of v

with lora_alpha·g, so that the scaling stays; layers whose rank or scaling differ from the rest go into
`rank_pattern` and `alpha_pattern`.  A B with such zeros is read back as a `MergedLinear`.

A convolution of g groups has R = r·g, and an A that is zero outside each group's own channels.

PiSSA and OLoRA learn W + s·(BA − B₀A₀) and are written as a plain adapter of rank 2r, [A; A₀] and [B, −B₀], that
belongs to the base as it was.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from phinetune.errors import AdapterError
from phinetune.lora.targets import from_pattern
from phinetune.machine.disk import replacing, write_text
from phinetune.untrusted import PICKLES, Untrusted, check_file, read_json

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
CHAT_FORMAT_FILE = "chat_format.json"  # ours: digests of the chat template and tokenizer it was tuned with
PREFIX = "base_model.model."

# Initialisations that change the base, and that can be computed from it again.
BEGIN_AT_PRODUCT = ("pissa", "olora")

# What an adapter may not ask for, with the values that ask for nothing. Initialisations that change the base at random
# or by data can't be begun again: on the pristine base their adapters would answer wrongly.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica", *BEGIN_AT_PRODUCT),
}

# Behind a layer's name. An embedding's matrices have names of their own.
MATRICES = {False: (".lora_A.weight", ".lora_B.weight"), True: (".lora_embedding_A", ".lora_embedding_B")}
MAGNITUDE, BASE_WEIGHT, BASE_BIAS = ".lora_magnitude_vector", ".base_layer.weight", ".base_layer.bias"
SUFFIXES = (*MATRICES[False], *MATRICES[True], MAGNITUDE, BASE_WEIGHT, BASE_BIAS)


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The configuration of an adapter folder.

    Raises:
        AdapterError: if it is missing or damaged, or of a kind that isn't supported.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(str(folder), f"holds no adapter ({CONFIG_FILE} is missing)", "give the folder of a run")
    try:
        config = read_json(folder / CONFIG_FILE)
    except (OSError, Untrusted) as error:
        raise AdapterError(str(folder), f"can't be read: {error}", "save the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(str(folder / CONFIG_FILE), "is not a LoRA adapter", "only peft_type LORA can be read")
    for name, harmless in UNSUPPORTED.items():
        if config.get(name) not in harmless:
            raise AdapterError(str(folder), f"{name}={config[name]!r} is not supported", "use PEFT for it")
    return config


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of an adapter folder.

    Raises:
        AdapterError: if a file is missing or damaged, or the adapter is of a kind that isn't supported.
    """
    folder, config = Path(folder), read_adapter_config(folder)
    try:
        check_file(folder / TENSOR_FILE, folder)
        return config, load_file(folder / TENSOR_FILE)
    except FileNotFoundError:
        if pickles := [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]:
            what = f"has its tensors as {pickles[0]} alone: a pickle can run code, so it is not read"
            raise AdapterError(str(folder), what, "convert it to safetensors where you trust it") from None
        raise AdapterError(str(folder), f"{TENSOR_FILE} is missing", "save the adapter again") from None
    except (SafetensorError, Untrusted) as error:
        raise AdapterError(str(folder / TENSOR_FILE), f"is damaged ({error})", "take an earlier checkpoint") from None


def read_chat_format(folder: str | Path) -> dict[str, str]:
    """The digests of the template and tokenizer that an adapter was tuned with; nothing where none were noted."""
    path = Path(folder) / CHAT_FORMAT_FILE
    try:
        noted = read_json(path) if path.exists() else {}
    except (OSError, Untrusted) as error:
        raise AdapterError(str(path), f"can't be read ({error})", "remove it to go on without") from None
    return noted if isinstance(noted, dict) else {}


def write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], chat_format: Mapping[str, str] | None = None
) -> None:
    """Both files, into a folder that exists; `chat_format` into a third, which PEFT passes over.

    Each is there whole or not at all, the configuration behind the tensors: what it stands beside can be read.
    """
    text = json.dumps(config, indent=2, sort_keys=True)
    with replacing(folder / TENSOR_FILE, sum(t.numel() * t.element_size() for t in tensors.values())) as work:
        save_file(tensors, work, metadata={"format": "pt"})
    write_text(folder / CONFIG_FILE, text + "\n")
    if chat_format is not None:
        write_text(folder / CHAT_FORMAT_FILE, json.dumps(chat_format, indent=2) + "\n")


def by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({layer: {suffix: tensor}}, whatever belongs to no adapted layer)."""
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if ".original_module." in name:  # PEFT's bias="all" saves biases of what it keeps aside
            continue
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        if suffix is None:
            others[name] = tensor
        else:
            layers[name.removesuffix(suffix)][suffix] = tensor
    return dict(layers), others


def grouped_A(lora_A: Tensor, groups: int) -> Tensor:
    """A (r·groups, in, …) of a grouped convolution as PEFT needs it, from ours, (r, in/groups, …).

    PEFT's A sees all channels, so each group has a copy of ours on its own channels and zeros on the others'.
    """
    r, width = lora_A.shape[:2]
    expanded = lora_A.new_zeros(groups, r, groups, *lora_A.shape[1:])
    for group in range(groups):
        expanded[group, :, group] = lora_A
    return expanded.reshape(groups * r, groups * width, *lora_A.shape[2:])


def scaling_from(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r, or alpha / √r with rslora."""
    alpha = from_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def plain_number(number: float) -> float | int:
    """1.0 is written 1."""
    return int(number) if float(number).is_integer() else number
