"""An adapter folded into its base for good: a folder that anything reads which reads the base.

Layer by layer: W + ΔW in fp32, rounded once.  The base's weights lie in their mapped files, and what is merged is
written as soon as a shard is full, so memory holds a shard and a layer, never the model.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from phinetune.adapter.publish import MERGED, SENTENCEPIECE
from phinetune.adapter.tuned import base_of, device_of, load_tuned
from phinetune.errors import AdapterError
from phinetune.files import named
from phinetune.hub import hub_answers
from phinetune.kernels.quantised import QuantisedWeight
from phinetune.lora.layer import LoRALayer
from phinetune.lora.modules_to_save import ModulesToSaveWrapper
from phinetune.machine.disk import check_room, flush, naming_full_disk
from phinetune.model import filed_dtype, load_tokenizer, smollm2, stop_ids
from phinetune.model.files import CONFIG, INDEX
from phinetune.model.quantise import in_4bit
from phinetune.recipe import ModelKwargs

SHARD_BYTES = 10**9
METADATA = {"format": "pt", "written_by": "phinetune merge"}
Quantise = Callable[[Tensor], Tensor]


def merge_adapter(
    folder: str | Path,
    output: str | Path,
    kwargs: ModelKwargs,
    dtype: str = "auto",
    *,
    dequantised: bool = False,
    allow_template_mismatch: bool = False,
    overwrite: bool = False,
) -> Path:
    """Writes base + adapter as a plain model, with the run's tokenizer and template and a generation config that stops
    where turns end.

    Args:
        folder: of the adapter.
        output: of the merged model; not there yet, but for one that may be replaced (`overwrite`).
        kwargs: where the base is.
        dtype: of the merged weights; `auto`: that of the base's files.
        dequantised: onto the base as 4 bits of the kind that `kwargs` names leave it, which is what QLoRA trained on.

    Raises:
        AdapterError, ModelError: as `load_tuned`, or if `output` is there.
        RunError: if the disk has no room; nothing is left of the attempt.
    """
    output = named(output)
    as_filed = _as_filed(folder, kwargs)
    if output.exists():
        _check_replaceable(output, overwrite)
    cpu, trained_on = torch.device("cpu"), device_of(Path(folder))
    model, tokenizer = load_tuned(folder, as_filed, allow_template_mismatch=allow_template_mismatch, device=cpu)

    def in_few_bits(weight: Tensor) -> Tensor:
        return in_4bit(weight.to(trained_on), kwargs).to(cpu)  # a processor of another kind may round otherwise

    written_in = getattr(torch, as_filed.dtype if dtype == "auto" else dtype)
    check_room(output, sum(p.numel() for p in model.parameters()) * written_in.itemsize)
    work = output.with_name(f".tmp-{output.name}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with naming_full_disk(output):
            _write_shards(_merged(model, written_in, in_few_bits if dequantised else None), work)
            _describe(model, tokenizer, written_in, work)
            if sentencepiece := _sentencepiece(tokenizer, *base_of(Path(folder), as_filed)):
                shutil.copyfile(sentencepiece, work / SENTENCEPIECE)
            for path in work.iterdir():
                flush(path)
            if output.exists():
                shutil.rmtree(output)
            work.rename(output)
            flush(output.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return output


def _check_replaceable(output: Path, overwrite: bool) -> None:
    """Raises AdapterError for what is there, unless it is a merged model and may be replaced."""
    if not overwrite:
        raise AdapterError(str(output), "is there already", "give another output folder, or --overwrite")
    known = {path for pattern in MERGED for path in output.glob(pattern)}
    there = {path for path in output.rglob("*") if not path.is_dir()} if output.is_dir() else {output}
    foreign = sorted(there - known)
    is_model, weights = (output / CONFIG).is_file(), [*output.glob("*.safetensors")]
    if foreign or not is_model or not weights or not all(map(_is_merged, weights)):
        what = f"holds {foreign[0].name}" if foreign else f"holds {'another' if is_model else 'no'} model"
        raise AdapterError(str(output), f"{what}, which no merge wrote, so it is kept", "give another output folder")


def _is_merged(weights: Path) -> bool:
    """Whether a file of weights is a merge's; a base's own may be called the same."""
    try:
        with safe_open(weights, "pt") as file:
            return dict(file.metadata() or {}).get("written_by") == METADATA["written_by"]
    except (SafetensorError, OSError):
        return False


def _as_filed(folder: str | Path, kwargs: ModelKwargs) -> ModelKwargs:
    """The base in the dtype of its files, so that its weights stay mapped."""
    dtype = filed_dtype(*base_of(Path(folder), kwargs))
    return kwargs.model_copy(update={"load_in_4bit": False, "load_in_8bit": False, "dtype": dtype})


@torch.no_grad()
def _merged(model: Any, dtype: torch.dtype, quantise: Quantise | None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the plain model's state dict, one at a time."""
    head, inside = model.get_output_embeddings(), ""
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, ModulesToSaveWrapper):
            inside, own = f"{path}.", module.active_module.state_dict()
        elif module is head and is_tied(model):
            continue
        else:
            goes_through = quantise if isinstance(module, nn.Linear) and module is not head else None
            own = _own_tensors(module, dtype, goes_through)
        for name, tensor in own.items():
            plain = tensor.dequantise(dtype) if isinstance(tensor, QuantisedWeight) else tensor
            yield f"{path}.{name}".lstrip("."), plain.to(dtype) if plain.is_floating_point() else plain


def is_tied(model: Any) -> bool:
    """Whether the head is the embedding table, in the merged model too."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    touched = any(isinstance(module, LoRALayer | ModulesToSaveWrapper) for module in (head, table))
    return head is not None and not touched and head.weight is table.weight


def _own_tensors(module: nn.Module, dtype: torch.dtype, quantise: Quantise | None) -> dict[str, Tensor]:
    """What a module holds itself, without its children, and what is saved of it; adapters folded in."""
    weight: Any = module._parameters.get("weight")
    if quantise is not None and not isinstance(weight, QuantisedWeight):
        module._parameters["weight"] = nn.Parameter(quantise(weight), requires_grad=False)
    plain = module.to_base(dtype) if isinstance(module, LoRALayer) else module
    own = {name: parameter.detach() for name, parameter in plain._parameters.items() if parameter is not None}
    if quantise is not None:
        module._parameters["weight"] = weight  # the mapped one again
    kept = plain._buffers.keys() - plain._non_persistent_buffers_set
    return own | {name: buffer for name, buffer in plain._buffers.items() if name in kept and buffer is not None}


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Files of `SHARD_BYTES` as they fill up, and their index."""
    weight_map: dict[str, str] = {}
    total, shards = 0, 0
    shard: dict[str, Tensor] = {}

    def write() -> None:
        nonlocal shards
        shards += 1
        name = f"shard-{shards}"
        save_file({key: tensor.contiguous() for key, tensor in shard.items()}, folder / name, metadata=METADATA)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for key, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            write()
        shard[key] = tensor
        total += tensor.nbytes
    write()
    final = {
        f"shard-{n}": "model.safetensors" if shards == 1 else f"model-{n:05}-of-{shards:05}.safetensors"
        for n in range(1, shards + 1)
    }
    for name, called in final.items():
        (folder / name).rename(folder / called)
    if shards > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {key: final[name] for key, name in weight_map.items()},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _describe(model: Any, tokenizer: Any, dtype: torch.dtype, folder: Path) -> None:
    """config.json, generation_config.json, tokenizer and template: what plain transformers needs, and no code."""
    config, generation = model.config, model.generation_config
    config.dtype, config.use_cache = dtype, True
    config.tie_word_embeddings = is_tied(model)
    if hasattr(config, "auto_map"):
        del config.auto_map
    config.save_pretrained(folder)
    generation.eos_token_id = stop_ids(model, tokenizer)
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    # As it is: save_pretrained refuses what a base may come with, a temperature without do_sample, say.
    generation.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)


def _sentencepiece(tokenizer: Any, base: str, kwargs: ModelKwargs) -> Path | None:
    """The base's tokenizer.model, by which llama.cpp's converter reads Phi-3 and Llama; None where there is none, or
    it lacks tokens that were added since. transformers writes it no more."""
    from transformers.utils import cached_file

    if base == smollm2.NAME or base.endswith(".gguf"):
        return None
    options: dict[str, Any] = {"revision": kwargs.revision, "cache_dir": kwargs.cache_dir, "token": kwargs.token}
    options |= {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    found = cached_file(base, SENTENCEPIECE, local_files_only=not hub_answers(), **options)
    if found is None:
        return None
    own = load_tokenizer(base, kwargs, {"chat_template": tokenizer.chat_template})
    return Path(found) if own.get_vocab() == tokenizer.get_vocab() else None
