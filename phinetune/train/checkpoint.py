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
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from phinetune import lora
from phinetune.adapter import CONFIG_FILE, TENSOR_FILE, save_adapter
from phinetune.errors import CheckpointError
from phinetune.files import sha256_of
from phinetune.train.optimiser import trainable_parameters

log = logging.getLogger(__name__)

PARAMETERS, OPTIMIZER = "parameters.safetensors", "optimizer.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
MINIMUM_KEPT = 2  # so that a damaged newest one has a whole one behind it
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
) -> Path:
    """Writes `folder/checkpoint-STEP`, then removes the oldest beyond `keep`."""
    final = folder / f"checkpoint-{step}"
    work, aside = folder / f".tmp-checkpoint-{step}", folder / f".tmp-checkpoint-{step}-old"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        save_adapter(model, work, base.model, base.revision, chat_format=base.chat_format)
        save_file(_parameters(model), work / PARAMETERS)
        save_file(_moments(model, optimizer), work / OPTIMIZER)
        (work / STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n", encoding="utf-8")
        digests = {path.name: sha256_of(path) for path in sorted(work.iterdir())}
        (work / MANIFEST).write_text(json.dumps({"sha256": digests}, indent=2) + "\n", encoding="utf-8")
        for path in work.iterdir():
            _flush(path)
        _flush(work)
        if final.exists():  # written by an earlier life of this run: set aside first, so that one of both is whole
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
        work.rename(final)
        _flush(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if keep is not None:
        for old in list_checkpoints(folder)[max(keep, MINIMUM_KEPT) :]:
            shutil.rmtree(old, ignore_errors=True)
    return final


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
        digests = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name in digests:
            if Path(name).name != name:
                return f"its manifest names {name!r}"
            if sha256_of(checkpoint / name) != digests[name]:
                return f"{name} has changed"
        missing = {CONFIG_FILE, TENSOR_FILE, PARAMETERS, OPTIMIZER, STATE} - digests.keys()
        return f"its manifest lacks {', '.join(sorted(missing))}" if missing else None
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} can't be read ({error})"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint that is whole.

    Raises:
        CheckpointError: if it isn't.
    """
    fault = find_fault(checkpoint)
    if fault is not None:
        raise CheckpointError(str(checkpoint), f"can't be resumed: {fault}", "give an earlier checkpoint")
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return state


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts what trains and AdamW's moments back, bit for bit.

    The adapter's own files are for others: what they round or fold isn't read back here.
    """
    try:
        lora.load_lora_state_dict(model, load_file(checkpoint / PARAMETERS))
    except RuntimeError as error:
        raise CheckpointError(str(checkpoint), str(error), "resume with its own recipe and model") from None
    moments = load_file(checkpoint / OPTIMIZER)
    names = {parameter: name for name, parameter in trainable_parameters(model).items()}
    in_order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {key.rpartition(".")[2]: value for key, value in moments.items() if key.rpartition(".")[0] == name}
        for index, name in enumerate(in_order)
    }
    # torch's own loader knows what belongs on which device.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """What trains, and what PiSSA and OLoRA began with."""
    tensors = {**lora.lora_state_dict(model), **trainable_parameters(model)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """{parameter.exp_avg: …, parameter.exp_avg_sq: …, parameter.step: …}"""
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in trainable_parameters(model).items()
        for key, value in optimizer.state[parameter].items()
    }


def _flush(path: Path) -> None:
    """fsync: what was written survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
