"""report.html: what a run did, in one file that asks nobody for anything."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phinetune.machine.disk import write_text
from phinetune.report.charts import Series, bars, curves
from phinetune.report.run import Run, naming_damage, read_run

REPORT = "report.html"
ANSWERS = 50  # shown


def write_report(folder: Path) -> Path:
    """`report.html` in a run's folder.

    Raises:
        InputError: if the folder holds no run.
        RunError: if the disk is full.
    """
    run = read_run(folder)
    with naming_damage(folder):
        page = render(
            "run.html.jinja",
            run=run,
            charts=[chart for chart in _charts([run]) if chart],
            histograms=[chart for chart in _histograms(run) if chart],
            columns=_columns(run.metrics),
            answers=run.answers[:ANSWERS],
        )
    write_text(folder / REPORT, page)
    return folder / REPORT


def write_comparison(folders: Sequence[Path], path: Path) -> None:
    """Several runs in one page: their curves, their results, and in which settings they differ.

    Raises:
        InputError: if a folder holds no run.
        RunError: if the disk is full.
    """
    runs = [read_run(folder) for folder in folders]
    names = _names(runs)
    with naming_damage(*folders):
        settings = dict.fromkeys(name for run in runs for name in run.settings)
        values = {setting: [run.settings.get(setting) for run in runs] for setting in settings}
        differing = {setting: found for setting, found in values.items() if any(value != found[0] for value in found)}
        page = render(
            "comparison.html.jinja",
            runs=list(zip(names, runs, strict=True)),
            charts=[chart for chart in _charts(runs, names) if chart],
            differing=differing,
            metrics=list(dict.fromkeys(name for run in runs for name in run.summary.get("tuned", {}))),
        )
    write_text(path, page)


def _charts(runs: Sequence[Run], names: Sequence[str] = ("",)) -> list[str]:
    """Curves of one run, or of several over each other."""

    def of(key: str, label: str, marked: bool = False) -> list[Series]:
        return [
            Series(f"{name} {label}".strip(), *run.series(key), marked) for name, run in zip(names, runs, strict=True)
        ]

    losses = [*of("loss", "training"), *of("eval_loss", "held out", marked=True)]
    return [
        curves("Loss", "nats a supervised token", losses),
        curves("Learning rate", "", of("learning_rate", "")),
        curves("Gradient norm, before clipping", "", of("grad_norm", "")),
        curves("Throughput", "tokens a second", of("tokens_per_second", "")),
    ]


def _histograms(run: Run) -> list[str]:
    titles = {"train": "Lengths of the training rows", "eval": "Lengths of the held-out rows"}
    found = {split: run.ledger.get(split, {}).get("histogram", []) for split in titles}
    return [
        bars(titles[split], "rows", [(b["from"], b["to"], b["examples"]) for b in bins], "tokens")
        for split, bins in found.items()
    ]


def _columns(metrics: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for line in metrics for name in line))


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' own names where these tell them apart, else their paths."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def render(template: str, escaped: bool = True, **values: Any) -> str:
    """One of the room's templates, filled; `escaped` for HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("phinetune.report"), autoescape=escaped, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"number": _number, "exact": _exact}
    return environment.get_template(template).render(**values)


def _number(value: Any) -> str:
    """For reading: four digits that count."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _exact(value: Any) -> str:
    """As it stands in the files."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
