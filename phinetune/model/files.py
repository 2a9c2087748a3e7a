"""What a model's files must be like before a library reads them; phinetune.untrusted has the why."""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from phinetune.errors import ModelError
from phinetune.untrusted import PICKLES, Untrusted, check_file, check_folder, plain_name, read_json

CONFIG, ADAPTER_CONFIG, INDEX = "config.json", "adapter_config.json", "model.safetensors.index.json"
LOOKED_AT = [CONFIG, ADAPTER_CONFIG, INDEX, "tokenizer_config.json", "tokenizer.json"]  # of a Hub's model, in advance

# More than any model has. What asks for more would take all memory before a weight is read.
LARGEST = {"num_hidden_layers": 1_000, "num_attention_heads": 10_000, "num_key_value_heads": 10_000,
           "hidden_size": 1_000_000, "head_dim": 100_000, "intermediate_size": 10_000_000,
           "vocab_size": 10_000_000}  # fmt: skip
FEWEST_BITS = 4  # of a parameter in a file
PIECES, PIECE_BYTES = 64, 1 << 16  # of a file of weights, that it is known by


def check_model_files(where: str, place: str, options: Mapping[str, Any]) -> None:
    """Looks at the files of a model's folder, or of its snapshot in the Hub's cache.

    Raises:
        ModelError: for a link or a shard that leads out of the folder, pickled weights, an adapter in the model.
    """
    folder = Path(place) if Path(place).is_dir() else _snapshot(place, **options)
    if folder is None:
        return
    try:
        if "gguf_file" in options:
            check_file(folder / options["gguf_file"], folder)
            return
        check_folder(folder)
        _check_index(folder)
    except (Untrusted, OSError) as error:
        raise ModelError(where, f"is not read: {error}", "take it from where you trust it") from None
    if not (folder / CONFIG).exists():  # a tokenizer alone
        return
    if (folder / ADAPTER_CONFIG).exists():
        mend = "merge the adapter, or move its files to a folder of their own"
        raise ModelError(where, f"holds an adapter beside the model ({ADAPTER_CONFIG})", mend)
    by_suffix = {path.suffix: path.name for path in folder.iterdir()}
    if ".safetensors" not in by_suffix and (pickles := sorted(by_suffix.keys() & PICKLES)):
        what = f"has its weights as {by_suffix[pickles[0]]} alone: a pickle can run code, so it is not read"
        raise ModelError(where, what, "take a version in safetensors, or convert it where you trust it")


def check_sizes(where: str, place: str | None, config: Any) -> None:
    """Raises ModelError where a configuration describes a larger model than any, or than the files of a folder hold."""
    import torch
    from transformers import AutoModelForCausalLM

    for name, most in LARGEST.items():
        size = getattr(config, name, None)
        if isinstance(size, int) and not 0 < size <= most:
            raise ModelError(where, f"{CONFIG} has {name} {size:,}, which no model has", "get it again")
    files = sorted(Path(place).glob("*.safetensors")) if place is not None and Path(place).is_dir() else []
    if not files:
        return
    held, tensors = sum(path.stat().st_size for path in files), sum(_tensors(where, path) for path in files)
    layers = getattr(config, "num_hidden_layers", 0)
    if layers > tensors:
        what = f"{CONFIG} describes {layers:,} layers, and its files have {tensors:,} tensors"
        raise ModelError(where, what, "get all of its files again")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # from_pretrained is the one to say what is wrong with it
        return
    described = sum(parameter.numel() for parameter in model.parameters())
    if described * FEWEST_BITS > held * 8:
        what = f"{CONFIG} describes {described:,} parameters, and its files have {held:,} bytes"
        raise ModelError(where, what, "get all of its files again")


def _tensors(where: str, path: Path) -> int:
    """How many a file has."""
    try:
        with safe_open(path, "pt") as file:
            return len(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(where, f"{path.name} is damaged ({error})", "get it again") from None


def dtype_in_files(place: str, options: Mapping[str, Any]) -> str | None:
    """The dtype of the first weight in a model's safetensors files; None where there are none."""
    folder = Path(place) if Path(place).is_dir() else _snapshot(place, **options)
    for path in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        with safe_open(path, "pt") as file:
            names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
            dtypes = (names.get(file.get_slice(name).get_dtype()) for name in file.keys())  # noqa: SIM118
            return next(filter(None, dtypes), None)
    return None


def commit_of(place: str, options: Mapping[str, Any]) -> str | None:
    """The commit of a Hub's model that is in the cache."""
    snapshot = _snapshot(place, **options)
    return snapshot.name if snapshot is not None and snapshot.parent.name == "snapshots" else None


def digest_of(place: str, options: Mapping[str, Any]) -> str:
    """sha256 of what tells one model from another: its configuration, and of each file of weights the size and pieces
    from beginning to end, all of it up to 4 MB. What training changes is seen, a single tensor perhaps not; the whole
    of Phi-3's would take half a minute."""
    folder = Path(place)
    if "gguf_file" in options:
        files, config = [folder / options["gguf_file"]], b""
    else:
        files, config = sorted(folder.glob("*.safetensors")), (folder / CONFIG).read_bytes()
    digest = hashlib.sha256(config)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for number in range(PIECES):
                file.seek(max(size - PIECE_BYTES, 0) * number // (PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


@functools.cache
def _snapshot(place: str, **options: Any) -> Path | None:
    """The folder in the Hub's cache, with what is looked at in it; None where that can't be had."""
    from transformers.utils import cached_file

    found = None
    for name in LOOKED_AT:
        try:
            path = cached_file(place, name, _raise_exceptions_for_missing_entries=False, **options)
        except (OSError, ValueError):  # said by from_pretrained
            return None
        found = Path(path).parent if path else found
    return found


def _check_index(folder: Path) -> None:
    """Raises Untrusted unless every shard is called as a file of the folder."""
    if not (folder / INDEX).exists():
        return
    index = read_json(folder / INDEX)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict):
        raise Untrusted(f"{INDEX} has no weight_map")
    for name in shards.values():
        if not plain_name(name):
            raise Untrusted(f"{INDEX} names a shard {name!r}, which is not a file beside it")
