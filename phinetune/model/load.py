"""The base model and its tokenizer, from a Hub id, a local folder, a .gguf file, or `smollm2`."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from phinetune.errors import ModelError
from phinetune.hub import hub_answers
from phinetune.kernels import native
from phinetune.kernels.compiled import gpu_has_bfloat16
from phinetune.layers import attention
from phinetune.model import smollm2
from phinetune.model.family import FLAT_FAMILIES
from phinetune.model.files import check_model_files, check_sizes, commit_of, digest_of, dtype_in_files
from phinetune.model.quantise import quantise_by_bitsandbytes, quantise_layers, sample_ids, take_over
from phinetune.recipe import ModelKwargs

T = TypeVar("T")
log = logging.getLogger(__name__)


def load_tokenizer(model: str, kwargs: ModelKwargs, tokenizer_kwargs: dict[str, Any] | None = None) -> Any:
    """The model's own tokenizer, with its chat template.

    Raises:
        ModelError: if it can't be had, isn't a fast tokenizer (masks need character offsets), or has no template.
    """
    from transformers import AutoTokenizer

    source = _Source.of(model, kwargs)
    tokenizer = _from_pretrained(AutoTokenizer.from_pretrained, model, source, **(tokenizer_kwargs or {}))
    if not tokenizer.is_fast:
        raise ModelError(f"model {model}", "has no fast tokenizer (tokenizer.json)", "convert it with transformers")
    if not tokenizer.chat_template:
        raise ModelError(
            f"model {model}",
            "its tokenizer has no chat template",
            "tune the instruct version, or set tokenizer_kwargs.chat_template",
        )
    return tokenizer


def load_config(model: str, kwargs: ModelKwargs) -> Any:
    """The model's configuration.

    Raises:
        ModelError: if it can't be had, or describes what no model is or its files don't hold.
    """
    return _config(model, _Source.of(model, kwargs))


def load_model(model: str, kwargs: ModelKwargs, device: torch.device | None = None, layers: int | None = None) -> Any:
    """The base model in evaluation mode, frozen, on `device` (CPU by default).

    With `layers`, only so many decoder layers of it, for a measurement: with their own weights where those are here,
    else with random ones.

    Raises:
        ModelError: if it can't be had or can't be read, or not in the bits that are asked for.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    from phinetune.layers import fast

    attention.register()
    device = device or torch.device("cpu")
    source = _Source.of(model, kwargs)
    config = _config(model, source)
    dtype = resolve_dtype(kwargs.dtype, device)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if model.endswith(".gguf"):
        options["quantization_config"] = GgufConfig(dequantize=True)
    implementation = kwargs.attn_implementation
    if implementation == "auto" and config.model_type in FLAT_FAMILIES:
        implementation = attention.NAME
    if implementation != "auto":
        options["attn_implementation"] = implementation
    comes_in_few_bits = bool(getattr(config, "quantization_config", None))
    if comes_in_few_bits:  # transformers takes such a model to a GPU by itself
        options["device_map"] = {"": str(device)}
    if layers is None:
        loaded = _with_weights(model, source, options)
    else:
        cut(config, layers)
        try:
            loaded = _with_weights(model, source.local(), {**options, "config": config})
        except ModelError:
            for name in ("quantization_config", "device_map"):
                options.pop(name, None)
            loaded = AutoModelForCausalLM.from_config(config, **options)
    loaded.config.use_cache = kwargs.use_cache
    if implementation == attention.NAME:
        fast.install(loaded)
    loaded.requires_grad_(False).eval()
    if comes_in_few_bits:  # and leaves what else is in it in its files' dtype, float16 as a rule
        _cast(loaded, options["dtype"])
    _quantise(loaded, model, kwargs, device)
    return loaded.to(device)


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Parameters in 16 bits; what is kept in float32 beside them stays so."""
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(dtype)


def _quantise(loaded: Any, model: str, kwargs: ModelKwargs, device: torch.device) -> None:
    """As the settings ask, or as the model comes."""
    asked = "4 bits" if kwargs.load_in_4bit else "8 bits" if kwargs.load_in_8bit else None
    came_in = take_over(loaded)
    if came_in is not None and asked not in (None, came_in):
        raise ModelError(f"model_kwargs.load_in_{asked[0]}bit", f"{model} is kept in {came_in}", "leave it out")
    if came_in is not None or asked is None:
        return
    if asked == "8 bits" and device.type == "cpu":
        quantise_layers(loaded, sample_ids(_any_tokenizer(model, kwargs), loaded.config.get_text_config().vocab_size))
    else:
        quantise_by_bitsandbytes(loaded, kwargs, device)


def _config(model: str, source: "_Source") -> Any:
    from transformers import AutoConfig

    config = _from_pretrained(AutoConfig.from_pretrained, model, source)
    check_sizes(f"model {model}", None if model.endswith(".gguf") else source.place, config)
    return config


def _with_weights(model: str, source: "_Source", options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    options = {**options, "output_loading_info": True, "use_safetensors": True}
    loaded, info = _from_pretrained(AutoModelForCausalLM.from_pretrained, model, source, **options)
    if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
        names = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise ModelError(f"model {model}", f"its files lack {names}", "get all of them again")
    return loaded


def cut(config: Any, layers: int) -> None:
    """Leaves a configuration its first decoder layers."""
    config = config.get_text_config()
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def _any_tokenizer(model: str, kwargs: ModelKwargs) -> Any | None:
    """The model's tokenizer, if it has one."""
    from transformers import AutoTokenizer

    try:
        return _from_pretrained(AutoTokenizer.from_pretrained, model, _Source.of(model, kwargs))
    except ModelError:
        return None


def resolve_dtype(name: str, device: torch.device, model_type: str | None = None) -> str:
    """`auto` is bfloat16, but float32 on a CPU on which torch's bfloat16 products are slower than float32's, and on a
    GPU that has none.

    There a named bfloat16 is warned of, where `model_type` (`config.model_type`) says what is trained in it and no
    kernels are for that.
    """
    if device.type == "cuda":
        if name == "bfloat16" and model_type is not None and not gpu_has_bfloat16():
            log.warning("this GPU doesn't multiply bfloat16, as those from Ampere on do: dtype=float32 is faster here")
        return ("bfloat16" if gpu_has_bfloat16() else "float32") if name == "auto" else name
    has_kernels = model_type in FLAT_FAMILIES and native.library("decoder") is not None
    warns = name == "bfloat16" and model_type is not None and not has_kernels
    ratio = bfloat16_speed() if device.type == "cpu" and (name == "auto" or warns) else 1.0
    if warns and ratio < 1:
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
    """Which version of a model is meant: the embedded one's sha256, the commit of the Hub's; None for files that bear
    no version."""
    if model == smollm2.NAME:
        return smollm2.GGUF_SHA256
    revision: str | None = _Source.of(model, kwargs).options.get("revision")
    return None if revision == "main" and kwargs.revision is None else revision  # what isn't at hand has no commit yet


def full_name(model: str) -> str:
    """A model's name that means the same from any folder: a local path whole, any other as it is."""
    return str(Path(model).expanduser().absolute()) if _lies_here(model) else model


def hub_name(model: str) -> str | None:
    """What the base that an adapter names (`full_name`) is called on the Hub; None for one that lies on a machine."""
    if model == smollm2.NAME:
        return smollm2.HUB_NAME
    return model if _is_hub_id(model) and not model.endswith(".gguf") else None


def _is_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def _lies_here(model: str) -> bool:
    """Whether a name is that of a folder or a .gguf file on this machine."""
    return model != smollm2.NAME and (model.endswith(".gguf") or Path(model).expanduser().is_dir())


def filed_dtype(model: str, kwargs: ModelKwargs) -> str:
    """The dtype of a base's weights in its files."""
    if model.endswith(".gguf"):  # dequantised in
        return "float32"
    source = _Source.of(model, kwargs)
    own = getattr(_config(model, source), "dtype", None) or dtype_in_files(source.place, source.options)
    return str(own or "float32").removeprefix("torch.")


def version_of(model: str, kwargs: ModelKwargs) -> str:
    """`revision_of`, and of local files a digest of what is in them."""
    source = _Source.of(model, kwargs)
    return revision_of(model, kwargs) or ("main" if source.is_hub else digest_of(source.place, source.options))


def is_on_hub(model: str) -> bool:
    """Whether a name is a Hub id, of a model whose files may change under it."""
    return model != smollm2.NAME and not _lies_here(model)


def pick_device(use_cpu: bool) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")


class _Source(NamedTuple):
    """Where a model's files are, as `from_pretrained` is told."""

    place: str
    options: dict[str, Any]
    is_hub: bool = False

    @classmethod
    def of(cls, model: str, kwargs: ModelKwargs) -> "_Source":
        """
        Raises:
            ModelError: for a name that is nowhere.
        """
        where, path = f"model {model}", Path(model).expanduser()
        if model == smollm2.NAME:
            return cls(str(smollm2.smollm2_folder()), {"local_files_only": True})
        if model.endswith(".gguf"):
            if not path.is_file():
                raise ModelError(where, "no such file", "give the path of a .gguf file")
            return cls(str(path.parent), {"gguf_file": path.name, "local_files_only": True})
        if _lies_here(model):
            return cls(str(path), {"local_files_only": True})
        if not _is_hub_id(model):
            mend = "give a Hub id (owner/name), a local folder, a .gguf file or smollm2"
            raise ModelError(where, "no such folder", mend)
        options: dict[str, Any] = {"revision": kwargs.revision or "main", "local_files_only": not hub_answers()}
        options |= {"cache_dir": kwargs.cache_dir, "token": kwargs.token}
        # By its commit from here on: main may move while a run loads one file after the other.
        return cls(model, {**options, "revision": commit_of(model, options) or options["revision"]}, is_hub=True)

    def local(self) -> "_Source":
        """The same, without a download."""
        return self._replace(options={**self.options, "local_files_only": True})


def _from_pretrained(load: Callable[..., T], model: str, source: _Source, **options: Any) -> T:
    """One way to every file, with what goes wrong as a ModelError. No code that comes with a model is run."""
    where = f"model {model}"
    check_model_files(where, source.place, source.options)
    try:
        return load(source.place, **{**options, **source.options, "trust_remote_code": False})
    except Exception as error:  # files that aren't what their names say make libraries raise anything
        if source.is_hub and source.options["local_files_only"] and isinstance(error, OSError):
            raise ModelError(
                where,
                "is no folder here, is not in the local cache, and the Hugging Face Hub does not answer",
                "connect, or give a local folder, a .gguf file, or smollm2 (the embedded model)",
            ) from error
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it needs code of its own, and phinetune runs no code that comes with a model"
        raise ModelError(where, f"can't be loaded ({reason})", "check the name, the files and model_kwargs") from error
