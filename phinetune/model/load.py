"""The base model and its tokenizer, from a Hub id, a local folder, a .gguf file, or `smollm2`."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from phinetune.errors import ModelError
from phinetune.hub import hub_answers
from phinetune.model import attention, smollm2
from phinetune.model.family import FLAT_FAMILIES
from phinetune.model.quantise import quantise_layers, sample_ids
from phinetune.recipe import ModelKwargs

T = TypeVar("T")
log = logging.getLogger(__name__)


def load_tokenizer(model: str, kwargs: ModelKwargs, tokenizer_kwargs: dict[str, Any] | None = None) -> Any:
    """The model's own tokenizer, with its chat template.

    Raises:
        ModelError: if it can't be had, isn't a fast tokenizer (masks need character offsets), or has no template.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer.from_pretrained, model, kwargs, **(tokenizer_kwargs or {}))
    if not tokenizer.is_fast:
        raise ModelError(f"model {model}", "has no fast tokenizer (tokenizer.json)", "convert it with transformers")
    if not tokenizer.chat_template:
        raise ModelError(
            f"model {model}",
            "its tokenizer has no chat template",
            "tune the instruct version, or set tokenizer_kwargs.chat_template",
        )
    return tokenizer


def load_model(model: str, kwargs: ModelKwargs, device: torch.device | None = None) -> Any:
    """The base model in evaluation mode, frozen, on `device` (CPU by default).

    Raises:
        ModelError: if it can't be had or can't be read, or isn't to be had in 8 bits on this device.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    from phinetune.model import fast

    attention.register()
    device = device or torch.device("cpu")
    if kwargs.load_in_8bit and device.type != "cpu":
        what = "means bitsandbytes' 8-bit on a GPU, which isn't supported yet"
        raise ModelError("model_kwargs.load_in_8bit", what, "leave it out, or set training_config.use_cpu")
    options: dict[str, Any] = {"dtype": getattr(torch, resolve_dtype(kwargs.dtype, device, warn=False))}
    if model.endswith(".gguf"):
        options["quantization_config"] = GgufConfig(dequantize=True)
    config = _from_pretrained(AutoConfig.from_pretrained, model, kwargs)
    implementation = kwargs.attn_implementation
    if implementation == "auto" and config.model_type in FLAT_FAMILIES:
        implementation = attention.NAME
    if implementation != "auto":
        options["attn_implementation"] = implementation
    loaded = _from_pretrained(AutoModelForCausalLM.from_pretrained, model, kwargs, **options)
    loaded.config.use_cache = kwargs.use_cache
    if implementation == attention.NAME:
        fast.install(loaded)
    loaded.requires_grad_(False).eval()
    if kwargs.load_in_8bit:
        quantise_layers(loaded, sample_ids(_any_tokenizer(model, kwargs), loaded.config.vocab_size))
    return loaded.to(device)


def _any_tokenizer(model: str, kwargs: ModelKwargs) -> Any | None:
    """The model's tokenizer, if it has one."""
    from transformers import AutoTokenizer

    try:
        return _from_pretrained(AutoTokenizer.from_pretrained, model, kwargs)
    except ModelError:
        return None


def resolve_dtype(name: str, device: torch.device, warn: bool = True) -> str:
    """`auto` is bfloat16, but float32 on a CPU on which bfloat16 products are slower than float32 ones."""
    asked = name == "auto" or (name == "bfloat16" and warn)
    ratio = bfloat16_speed() if device.type == "cpu" and asked else 1.0
    if name == "bfloat16" and ratio < 1:
        log.warning(f"this CPU multiplies bfloat16 at {ratio:.2f} times float32's rate: dtype=float32 is faster here")
    return ("bfloat16" if ratio >= 1 else "float32") if name == "auto" else name


def bfloat16_speed() -> float:
    """bfloat16's rate over float32's on this CPU, at a small model's shape (some 0.1 s)."""
    seconds = {dtype: min(_time_product(dtype) for _ in range(3)) for dtype in (torch.float32, torch.bfloat16)}
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _time_product(dtype: torch.dtype) -> float:
    a, b = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    begin = time.perf_counter()
    torch.nn.functional.linear(a, b)
    return time.perf_counter() - begin


def revision_of(model: str, kwargs: ModelKwargs) -> str | None:
    """Which version of a model is meant: the embedded one's sha256, else what the recipe names."""
    return smollm2.GGUF_SHA256 if model == smollm2.NAME else kwargs.revision


def pick_device(use_cpu: bool) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")


def _from_pretrained(load: Callable[..., T], model: str, kwargs: ModelKwargs, **options: Any) -> T:
    """One way to every file: finds where `model` is, and turns what goes wrong into a ModelError."""
    where = f"model {model}"
    path = Path(model).expanduser()
    options["trust_remote_code"] = False
    from_hub = False
    if model == smollm2.NAME:
        source = str(smollm2.smollm2_folder())
        options["local_files_only"] = True
    elif model.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(where, "no such file", "give the path of a .gguf file")
        source = str(path.parent)
        options |= {"gguf_file": path.name, "local_files_only": True}
    elif path.is_dir():
        source = str(path)
        options["local_files_only"] = True
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(where, "no such folder", "give a Hub id (owner/name), a local folder, a .gguf file or smollm2")
    else:
        source, from_hub = model, True
        options |= {"revision": kwargs.revision or "main", "cache_dir": kwargs.cache_dir, "token": kwargs.token}
        options["local_files_only"] = not hub_answers()
    try:
        return load(source, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        if from_hub and options["local_files_only"]:
            raise ModelError(
                where,
                "is not in the local cache, and the Hugging Face Hub does not answer",
                "connect, or give a local folder, a .gguf file, or smollm2 (the embedded model)",
            ) from error
        raise ModelError(where, f"can't be loaded ({reason})", "check the name, the files and model_kwargs") from error
