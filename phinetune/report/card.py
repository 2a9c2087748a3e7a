"""The model card of an adapter or a merged model, filled from its run."""

from pathlib import Path
from typing import Any

from phinetune.report.page import render
from phinetune.report.run import naming_damage, read_run

EMBEDDED = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # dequantised from Q4_1, which the card says

TOLD = ("model_kwargs", "training_config", "peft_config")
PRIVATE = {"output_dir", "logging_dir", "cache_dir", "token", "run_name", "project"}


def model_card(run: str | Path, repository: str, merged: bool = False) -> str:
    """README.md of a run's adapter, or of its merged model, as the Hub reads it: YAML, then Markdown.

    Raises:
        phinetune.errors.InputError: if the folder holds no run.
    """
    found = read_run(Path(run))
    with naming_damage(Path(run)):
        model = str(found.settings.get("model", found.summary.get("model", "")))
        base = EMBEDDED.get(model, model)
        on_hub = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not base.endswith(".gguf")
        on_hub = on_hub and not Path(base).exists()
        values: dict[str, Any] = {
            "run": found,
            "repository": repository,
            "merged": merged,
            "model": model,
            "base": base if on_hub else None,
            "changed": [setting for setting in found.about.get("settings", []) if _is_told(setting)],
        }
        return render("card.md.jinja", escaped=False, **values)


def _is_told(setting: dict[str, Any]) -> bool:
    """What was asked for of model, training and adapter; not where things lie on the machine of whoever trained."""
    section, _, name = setting["path"].partition(".")
    return section in TOLD and name not in PRIVATE and setting["origin"] != "default"
