"""Checkpoints: written whole or not at all, and believed only if their manifest holds.

A checkpoint is written into a temporary folder beside its place: every file, then `manifest.json` with the
sha256 of each, all flushed to the disk, then one rename.  A kill at any moment leaves the old state or the
new one.  Nothing in it is a pickle.

    checkpoint-20/
      adapter_config.json, adapter_model.safetensors    the adapter, readable by PEFT
      parameters.safetensors                            what trains, bit for bit, by parameter name
      optimizer.safetensors                             AdamW's moments, by parameter name
      state.json                                        step, counters, recipe and data of the run
      manifest.json                                     sha256 of the above
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from phinetune import lora
from phinetune.adapter import CONFIG_FILE, TENSOR_FILE, save_adapter
from phinetune.errors import CheckpointError
from phinetune.files import sha256_of
from phinetune.machine.disk import check_room, flush, naming_full_disk
from phinetune.train.numbers import check_finite
from phinetune.train.optimiser import trainable_parameters
from phinetune.untrusted import Untrusted, check_file, plain_name, read_json

log = logging.getLogger(__name__)

PARAMETERS, OPTIMIZER = "parameters.safetensors", "optimizer.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
MINIMUM_KEPT = 2  # so that a damaged newest one has a whole one behind it
SMALL_FILES = 1 << 20  # bytes, more than a checkpoint's JSON, file headers and folders take
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Base:
    """What the adapter belongs to: the base model, the chat template and tokenizer it is tuned with."""

    model: str
    revision: str | None
    chat_format: Mapping[str, str] | None = None


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    base: Base,
    keep: int | None,
    best: int | None = None,
) -> Path:
    """Writes `folder/checkpoint-STEP`, then removes the oldest beyond `keep`, but not that of step `best`.

    Raises:
        RunError: if the disk has no room for it, or something in it isn't finite; what was there stays as it was.
    """
    final = checkpoint_of(folder, step)
    work, aside = folder / f".tmp-checkpoint-{step}", folder / f".tmp-checkpoint-{step}-old"
    parameters, moments = _parameters(model), _moments(model, optimizer)
    check_finite({**parameters, **moments}, f"step {step}")
    shutil.rmtree(work, ignore_errors=True)
    size = checkpoint_bytes(model)
    check_room(final, size)
    try:
        with naming_full_disk(final, size):
            work.mkdir()
            save_adapter(model, work, base.model, base.revision, chat_format=base.chat_format)
            save_file(parameters, work / PARAMETERS)
            save_file(moments, work / OPTIMIZER)
            (work / STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n", encoding="utf-8")
            digests = {path.name: sha256_of(path) for path in sorted(work.iterdir())}
            (work / MANIFEST).write_text(json.dumps({"sha256": digests}, indent=2) + "\n", encoding="utf-8")
            for path in work.iterdir():
                flush(path)
            flush(work)
            if final.exists():  # written by an earlier life of this run: set aside first, so that one of both is whole
                shutil.rmtree(aside, ignore_errors=True)
                final.rename(aside)
            work.rename(final)
            flush(folder)
            shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    there = list_checkpoints(folder)
    for old in there[len(there) if keep is None else max(keep, MINIMUM_KEPT) :]:
        if old != checkpoint_of(folder, best):
            shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoint_bytes(model: nn.Module) -> int:
    """What a checkpoint takes on disk: what trains, AdamW's two moments of it, and the adapter as PEFT reads it."""
    trained: int = sum(p.numel() * p.element_size() for p in trainable_parameters(model).values())
    return 3 * trained + adapter_bytes(model) + SMALL_FILES


def adapter_bytes(model: nn.Module) -> int:
    """What an adapter takes on disk: where parts of a fused layer have updates of their own, B is written as tall as
    the layer and as wide as all of them together."""
    size: int = sum(t.nbytes for t in _kept(model).values())
    for _, layer in lora.lora_layers(model):
        if isinstance(layer, lora.Linear):
            lora_A, lora_B, _ = layer.factors()
            size += max(0, layer.out_features * len(lora_A) - lora_B.numel()) * lora_B.element_size()
    return size


def most_at_once(saves: int, keep: int | None, keeps_best: bool) -> int:
    """Checkpoints that lie on the disk together, of so many that are written."""
    # One more is there before the oldest is removed.
    return saves if keep is None else min(saves, max(keep, MINIMUM_KEPT) + 1 + keeps_best)


def checkpoint_of(folder: Path, step: int | None) -> Path:
    return folder / f"checkpoint-{step}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Newest first; whether they are whole is not looked at."""
    found = [
        (int(match.group(1)), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose manifest holds; damaged ones are named and passed over."""
    for work in folder.glob(".tmp-checkpoint-*"):  # a save that was cut short
        final = folder / work.name.removeprefix(".tmp-").removesuffix("-old")
        if work.name.endswith("-old") and not final.exists():  # between its two renames
            work.rename(final)
        else:
            shutil.rmtree(work, ignore_errors=True)
    for path in list_checkpoints(folder):
        fault = find_fault(path)
        if fault is None:
            return path
        log.warning(f"{path} is damaged ({fault}): an earlier one is tried")
    return None


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None if it is whole."""
    try:
        digests = read_json(checkpoint / MANIFEST)["sha256"]
        for name in digests:
            if not plain_name(name):
                return f"its manifest names {name!r}"
            check_file(checkpoint / name, checkpoint)
            if sha256_of(checkpoint / name) != digests[name]:
                return f"{name} has changed"
        if missing := {CONFIG_FILE, TENSOR_FILE, PARAMETERS, OPTIMIZER, STATE} - digests.keys():
            return f"its manifest lacks {', '.join(sorted(missing))}"
        return next(filter(None, map(_tensor_fault, (checkpoint / name for name in (PARAMETERS, OPTIMIZER)))), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except Untrusted as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} can't be read ({error})"


def _tensor_fault(path: Path) -> str | None:
    """A manifest that speaks for a file doesn't make it what its name says."""
    try:
        with safe_open(path, "pt"):
            return None
    except SafetensorError as error:
        return f"{path.name} can't be read ({error})"


def prove(checkpoint: Path) -> None:
    """Raises CheckpointError unless a checkpoint is whole. Every byte of it is read."""
    fault = find_fault(checkpoint)
    if fault is not None:
        raise CheckpointError(str(checkpoint), f"can't be resumed: {fault}", "give an earlier checkpoint")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint that is proved.

    Raises:
        CheckpointError: if it is of no run.
    """
    try:
        state = read_json(checkpoint / STATE)
    except Untrusted as error:
        raise CheckpointError(str(checkpoint), f"can't be resumed: {error}", "give an earlier checkpoint") from None
    if not isinstance(state, dict) or not isinstance(state.get("identity", {}), dict):
        raise CheckpointError(str(checkpoint), f"can't be resumed: {STATE} is not of a run", "give another checkpoint")
    return state


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Puts what trains and AdamW's moments back, bit for bit, from a checkpoint that is proved.

    The adapter's own files are for others: what they round or fold isn't read back here.

    Raises:
        CheckpointError: if it doesn't fit the model.
    """
    trained = trainable_parameters(model)
    try:
        parameters, moments = load_file(checkpoint / PARAMETERS), load_file(checkpoint / OPTIMIZER)
        if foreign := parameters.keys() - _kept(model).keys():
            raise RuntimeError(f"{PARAMETERS} holds {min(foreign)}, which isn't trained")
        for key, value in moments.items():
            owner = trained.get(key.rpartition(".")[0])
            of_blocks = value.ndim == 1 and key.rpartition(".")[2].startswith(("qmap", "absmax"))
            if owner is None or not (of_blocks or value.shape in (owner.shape, ())):
                raise RuntimeError(f"{OPTIMIZER} holds {key} {tuple(value.shape)}, which doesn't fit")
        lora.load_lora_state_dict(model, parameters)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(str(checkpoint), str(error), "resume with its own recipe and model") from None
    if optimizer is None:
        return
    names = {parameter: name for name, parameter in trained.items()}
    in_order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {
        index: {key.rpartition(".")[2]: value for key, value in moments.items() if key.rpartition(".")[0] == name}
        for index, name in enumerate(in_order)
    }
    if not isinstance(optimizer, torch.optim.AdamW):  # bitsandbytes counts steps in plain numbers
        state = {index: {**own, "step": int(own["step"])} if own else own for index, own in state.items()}
    # torch's own loader knows what belongs on which device.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """What trains, and what PiSSA and OLoRA began with."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in _kept(model).items()}


def _kept(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**lora.lora_state_dict(model), **trainable_parameters(model)}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """{parameter.exp_avg: …, parameter.exp_avg_sq: …, parameter.step: …}, as the optimiser calls them"""
    # bitsandbytes' tables (qmap) are one for all parameters, and safetensors writes no tensor under two names.
    return {
        f"{name}.{key}": torch.as_tensor(value).detach().to("cpu", copy=key.startswith("qmap")).contiguous()
        for name, parameter in trainable_parameters(model).items()
        for key, value in optimizer.state[parameter].items()
    }
