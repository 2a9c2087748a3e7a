"""Curves and bars as SVG that stands in a page by itself."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

INK = "#010203"  # becomes the page's own colour of text, so that a dark page has light axes
COLOURS = ("#3b7dd8", "#d9822b", "#2f9e6b", "#b5478f", "#8a6fd1", "#c0392b", "#4f8f98", "#7f7f7f")
SIZE = (5.6, 2.5)  # inches


class Series(NamedTuple):
    label: str
    steps: Sequence[float]
    values: Sequence[float]
    marked: bool = False
    """Drawn with a mark at each point: few of them, as evaluations are."""


def curves(title: str, unit: str, series: Sequence[Series]) -> str:
    """Values over steps; nothing where there are none."""
    series = [one for one in series if len(one.steps)]
    if not series:
        return ""
    with _plain_settings(title):
        figure, axes = _axes(title, "step", unit)
        for number, one in enumerate(series):
            mark = "o" if one.marked or len(one.steps) == 1 else None
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(one.steps, one.values, color=colour, label=one.label, marker=mark, markersize=3.5, linewidth=1.4)
        if len(series) > 1:
            axes.legend(frameon=False, labelcolor=INK, fontsize=8)
        return _svg(figure)


def bars(title: str, unit: str, bins: Sequence[tuple[int, int, int]], across: str) -> str:
    """A histogram: (from, to, how many)."""
    if not bins:
        return ""
    edges = [begin for begin, _, _ in bins]
    widths = [bins[0][1] - bins[0][0] + 1] * len(bins)
    with _plain_settings(title):
        figure, axes = _axes(title, across, unit)
        axes.bar(edges, [count for _, _, count in bins], width=widths, align="edge", color=COLOURS[0], edgecolor="none")
        return _svg(figure)


def _axes(title: str, across: str, up: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.set_xlabel(across, fontsize=8, color=INK)
    axes.set_ylabel(up, fontsize=8, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(alpha=0.25, color=INK, linewidth=0.5)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return figure, axes


@contextmanager
def _plain_settings(title: str) -> Iterator[None]:
    """matplotlib's own settings, whatever a matplotlibrc or the caller's session asks for: text by LaTeX, say. The same
    numbers give the same bytes; ids are unlike those of other charts in a page."""
    import matplotlib

    settings = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context({**settings, "svg.fonttype": "none", "svg.hashsalt": title}):
        yield


def _svg(figure: Any) -> str:
    with io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = file.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
