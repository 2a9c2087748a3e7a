"""The output folder of a run: claimed, begun, and emptied of an earlier run by name."""

import datetime
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from phinetune.data import Prepared, write_ledgers
from phinetune.errors import RecipeError
from phinetune.machine.disk import naming_full_disk, write_text
from phinetune.machine.system import device_name, system, versions
from phinetune.model import pick_device
from phinetune.recipe import Recipe, dump_recipe
from phinetune.recipe.explain import explain
from phinetune.report import ABOUT
from phinetune.train.checkpoint import list_checkpoints
from phinetune.train.log import run_log
from phinetune.untrusted import Untrusted, read_json

log = logging.getLogger(__name__)

# Everything a run writes into its folder.
WRITTEN = [
    "adapter_config.json", "adapter_model.safetensors", "additional_chat_templates", "answers.jsonl",
    "chat_format.json", "chat_template.jinja", "ledger.json", "metrics.jsonl", "recipe.yaml",
    "rejected.jsonl", "report.html", "run.json", "special_tokens_map.json", "summary.json", "tensorboard",
    "tokenizer*", "train.log", "wandb", "mlruns", ".tmp-checkpoint-*",
]  # fmt: skip


@contextmanager
def claimed(folder: Path, resume: bool, overwrite: bool) -> Iterator[None]:
    """For a block, the folder is this run's alone: made where it isn't there, and gone again if nothing comes into it.

    Raises:
        RecipeError: if another run goes on in it, or it holds something that is neither to be resumed nor overwritten.
    """
    where = f"output_dir {folder}"
    if folder.is_file():
        raise RecipeError(where, "is a file", "give a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with _locked(folder, where):
        try:
            _check_content(folder, where, resume, overwrite)
            yield
        finally:
            with suppress(OSError):  # something has come into it
                for path in made:
                    path.rmdir()


@contextmanager
def _locked(folder: Path, where: str) -> Iterator[None]:
    """A lock ends with the process that holds it, however that ends."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise RecipeError(where, "another run goes on in it", "wait for it, or give another output_dir") from None
        except OSError as error:
            log.warning(f"{where} can't be locked ({error.strerror}): let no other run write into it")
        if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
            break
        os.close(descriptor)  # of a folder that another run has just removed
    try:
        yield
    finally:
        os.close(descriptor)


def _check_content(folder: Path, where: str, resume: bool, overwrite: bool) -> None:
    """Refuses a folder that holds something, unless it is a run that is to be resumed or overwritten."""
    if not any(folder.iterdir()):
        return
    if resume:
        is_run = (folder / ABOUT).is_file() or list_checkpoints(folder)
        if not is_run and any(not path.name.startswith(".tmp-") for path in folder.iterdir()):
            raise RecipeError(where, "holds no run of phinetune's that could be resumed", "give that run's output_dir")
        return
    if not overwrite:
        raise RecipeError(where, "is not empty", "use --resume, --overwrite or another output_dir")
    has_most = all((folder / name).is_file() for name in ("recipe.yaml", "ledger.json", "train.log"))
    if not (_read_about(folder) or has_most):
        raise RecipeError(where, "holds no run of phinetune's, so it is not emptied", "give another output_dir")


@contextmanager
def begun(folder: Path, recipe: Recipe, data: Prepared, tokenizer: Any, fresh: bool, goes_on: bool) -> Iterator[str]:
    """The folder with what is known before training in it, and the log open; says when the run began.

    Args:
        fresh: empties it of an earlier run.
        goes_on: from a checkpoint, so that what an earlier life was made with counts.
    """
    if fresh:
        _remove_run(folder)
    about = _about(folder, recipe, goes_on)
    with naming_full_disk(folder):
        # First, since a folder that has it is known as a run's, however early that was killed.
        write_text(folder / ABOUT, json.dumps(about, indent=2, default=_as_json) + "\n")
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        fingerprints = {"fingerprint": data.fingerprint, "held_out_fingerprint": data.held_out_fingerprint}
        write_ledgers(folder, data.ledgers, data.rejected(), fingerprints)
        tokenizer.save_pretrained(folder)
    with run_log(folder, recipe.training_config.log_level):
        for earlier in about["earlier"]:
            unlike = [f"{n} {which}" for n, which in earlier.items() if which and which != _made_with(about).get(n)]
            if unlike:
                log.warning(f"earlier updates of this run were made with {', '.join(unlike)}, and rounded as it does")
        yield about["begun"]


def give_up_later(folder: Path, step: int, is_over: bool) -> None:
    """Removes what a later life wrote that is given up for a checkpoint of an earlier step: its checkpoints, and the
    summary of a run that isn't done any more."""
    for path in list_checkpoints(folder):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    if not is_over:
        (folder / "summary.json").unlink(missing_ok=True)


def _about(folder: Path, recipe: Recipe, goes_on: bool) -> dict[str, Any]:
    """run.json: when a run began, what it is made with, what it was made with earlier, where its settings came from."""
    before = _read_about(folder)
    about = {
        "begun": before.get("begun", datetime.datetime.now().astimezone().isoformat(timespec="seconds")),
        "versions": versions(),
        **system(),
        "device": device_name(pick_device(recipe.training_config.use_cpu)),
    }
    earlier = [*before.get("earlier", []), _made_with(before)] if before and goes_on else []
    return {
        **about,
        "earlier": [life for number, life in enumerate(earlier) if life not in (_made_with(about), *earlier[:number])],
        "settings": [setting._asdict() for setting in explain(recipe)],
    }


def _as_json(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else str(value)


def _made_with(about: dict[str, Any]) -> dict[str, Any]:
    """{package, python, system or device: which} of run.json"""
    return {**about.get("versions", {}), **{name: about.get(name) for name in (*system(), "device")}}


def _read_about(folder: Path) -> dict[str, Any]:
    """run.json of an earlier life; nothing where there is none or it is damaged, since no update depends on it."""
    try:
        found = read_json(folder / ABOUT)
        is_whole = isinstance(found["versions"], dict) and all(isinstance(e, dict) for e in found.get("earlier", []))
    except (FileNotFoundError, Untrusted, LookupError, TypeError, AttributeError):
        return {}
    return found if is_whole else {}


def _remove_run(folder: Path) -> None:
    """Removes what an earlier run wrote, by name; anything else in the folder is somebody else's."""
    found = [*list_checkpoints(folder), *(path for pattern in WRITTEN for path in folder.glob(pattern))]
    for path in sorted(found, key=lambda path: path.name == ABOUT):  # by which it is known as a run, to the last
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
