"""A tuned model, ready to answer: the base that an adapter names, the adapter on it, the run's own tokenizer."""

from pathlib import Path
from typing import Any

import torch

from phinetune.adapter.load import load_adapter
from phinetune.adapter.peft_format import CONFIG_FILE, read_adapter_config, read_chat_format
from phinetune.data import chat_fingerprint
from phinetune.errors import AdapterError
from phinetune.model import fused_parts, load_model, load_tokenizer, pick_device, smollm2
from phinetune.recipe import ModelKwargs, Recipe, load_recipe


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / CONFIG_FILE).is_file()


def run_folders(folder: Path) -> list[Path]:
    """The folder itself and, for a checkpoint, the run it belongs to."""
    folder = folder.absolute()  # `.` has a name, too
    return [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]


def recipe_of(run: Path) -> Recipe | None:
    """The resolved recipe of a run's folder, or of the run a checkpoint belongs to; the revision of its base is the
    adapter's to say, by a commit, where a recipe names what may move."""
    for folder in run_folders(run):
        if (folder / "recipe.yaml").is_file():
            recipe = load_recipe(folder / "recipe.yaml")[0]
            kwargs = recipe.model_kwargs.model_copy(update={"revision": None})
            return recipe.model_copy(update={"model_kwargs": kwargs})
    return None


def device_of(run: Path) -> torch.device:
    """Where a run would be made on this machine: it may have asked to stay off a GPU."""
    recipe = recipe_of(run)
    return pick_device(use_cpu=recipe is not None and recipe.training_config.use_cpu)


def base_of(folder: Path, kwargs: ModelKwargs, base: str | None = None) -> tuple[str, ModelKwargs]:
    """The base model of an adapter and where it is, in the revision that the adapter was made for.

    Raises:
        AdapterError: if it names none, or one that is another by now.
    """
    config = read_adapter_config(folder)
    revision = config.get("revision") if base is None else None  # of the base that it names
    base = base or config.get("base_model_name_or_path")
    if not isinstance(base or "", str) or not isinstance(revision or "", str):
        what = f"{CONFIG_FILE} names the base {base!r} in revision {revision!r}, which are no names"
        raise AdapterError(str(folder), what, "save the adapter again")
    if not base:
        mend = f"write base_model_name_or_path into its {CONFIG_FILE}"
        raise AdapterError(str(folder), "doesn't say which base model it belongs to", mend)
    if base == smollm2.NAME and revision not in (None, smollm2.GGUF_SHA256):
        raise AdapterError(str(folder), f"was made for another {base} ({revision})", "tune it again")
    return base, kwargs.model_copy(update={"revision": kwargs.revision or revision})


def load_tuned(
    folder: str | Path,
    kwargs: ModelKwargs,
    base: str | None = None,
    allow_template_mismatch: bool = False,
    device: torch.device | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) of an adapter folder; on the device that the run was made on, unless another is named.

    The tokenizer and its chat template are those saved beside the adapter (or, for a checkpoint, beside the run),
    else the base's.

    Raises:
        AdapterError, ModelError: if the adapter or its base can't be had, or the tokenizer or its chat template isn't
            the one that the adapter was tuned with.
    """
    folder = Path(folder)
    base, kwargs = base_of(folder, kwargs, base)
    own = [f for f in run_folders(folder) if (f / "tokenizer.json").is_file()]
    tokenizer = load_tokenizer(str(own[0]) if own else base, kwargs)
    if not allow_template_mismatch:
        _check_chat_format(folder, tokenizer)
    model = load_model(base, kwargs, device or device_of(folder))
    load_adapter(model, folder, fused_parts(model.config))
    return model.eval(), tokenizer


def _check_chat_format(folder: Path, tokenizer: Any) -> None:
    """Raises AdapterError if the adapter was tuned with another template or tokenizer; older ones don't say."""
    then, now = read_chat_format(folder), chat_fingerprint(tokenizer)
    changed = [f"chat {part}" if part == "template" else part for part in now if then.get(part, now[part]) != now[part]]
    if changed:
        what = f"was tuned with another {' and '.join(changed)} than the tokenizer at hand has: answers would differ"
        raise AdapterError(str(folder), what, "use those saved with it, or --allow-template-mismatch")
