"""A tuned model, ready to answer: the base that an adapter names, the adapter on it, the run's own tokenizer."""

from pathlib import Path
from typing import Any

from phinetune.adapter.peft_format import CONFIG_FILE, load_adapter, read_adapter
from phinetune.errors import AdapterError
from phinetune.model import fused_parts, load_model, load_tokenizer, pick_device
from phinetune.recipe import ModelKwargs


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / CONFIG_FILE).is_file()


def load_tuned(folder: str | Path, kwargs: ModelKwargs, base: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of an adapter folder.

    The tokenizer and its chat template are those saved beside the adapter (or, for a checkpoint, beside the run),
    else the base's.

    Raises:
        AdapterError, ModelError: if the adapter or its base can't be had.
    """
    folder = Path(folder)
    config, _ = read_adapter(folder)
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise AdapterError(str(folder), "doesn't say which base model it belongs to", "name it with --base")
    kwargs = kwargs.model_copy(update={"revision": kwargs.revision or config.get("revision")})
    own = [f for f in (folder, folder.parent) if (f / "tokenizer.json").is_file()]
    tokenizer = load_tokenizer(str(own[0]) if own else base, kwargs)
    model = load_model(base, kwargs, pick_device(use_cpu=False))
    load_adapter(model, folder, fused_parts(model.config))
    return model.eval(), tokenizer
