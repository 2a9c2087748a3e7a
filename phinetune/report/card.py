"""The model card of an adapter or a merged model, filled from its run."""

from pathlib import Path
from typing import Any

from phinetune.report.page import render
from phinetune.report.run import naming_damage, read_run
from phinetune.untrusted import read_json

TOLD = ("model_kwargs", "training_config", "peft_config")
PRIVATE = {"output_dir", "logging_dir", "cache_dir", "token", "run_name", "project"}


def model_card(run: str | Path, repository: str, merged: bool = False) -> str:
    """README.md of a run's adapter, or of its merged model, as the Hub reads it: YAML, then Markdown.

    Raises:
        phinetune.errors.InputError: if the folder holds no run.
    """
    from phinetune.model import hub_name  # torch's seconds are for those who ask for a card

    found = read_run(Path(run))
    with naming_damage(Path(run)):
        model = str(found.settings.get("model", found.summary.get("model", "")))
        values: dict[str, Any] = {
            "run": found,
            "repository": repository,
            "merged": merged,
            "model": model,
            "base": hub_name(_base_of(Path(run)) or model),
            "changed": [setting for setting in found.about.get("settings", []) if _is_told(setting)],
        }
        return render("card.md.jinja", escaped=False, **values)


def _base_of(run: Path) -> str | None:
    """The base that a run's adapter names, which means the same from any folder."""
    found = read_json(run / "adapter_config.json") if (run / "adapter_config.json").is_file() else {}
    return found.get("base_model_name_or_path") if isinstance(found, dict) else None


def _is_told(setting: dict[str, Any]) -> bool:
    """What was asked for of model, training and adapter; not where things lie on the machine of whoever trained."""
    section, _, name = setting["path"].partition(".")
    return section in TOLD and name not in PRIVATE and setting["origin"] != "default"
