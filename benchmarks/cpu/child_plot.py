"""The plot of cost by row length."""

from typing import Any

import job_io
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # a backend is chosen first


def draw(job: dict[str, Any]) -> None:
    lengths = [int(length) for length in job["by_length"]]
    points = list(job["by_length"].values())
    ours = [1e3 * point["seconds_a_token"] for point in points]
    # The linears' share at the first length, and attention's by its FLOP at the same rate.
    flop = [job["linear_flop"] + point["attention_flop"] for point in points]
    by_flop = [ours[0] * value / flop[0] for value in flop]
    by_attention = [ours[0] + 1e3 * (point["own_attention"] - points[0]["own_attention"]) for point in points]
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    axes.plot(lengths, ours, "o-", label="phinetune, measured")
    axes.plot(lengths, by_flop, "--", color="grey", label="growth by attention's FLOP, six products")
    axes.plot(lengths, by_attention, "-.", color="grey", label="growth by attention's own time")
    axes.plot(lengths, [1e3 * point["attention_alone"] for point in points], ":", label="torch's attention by itself")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens a row")
    axes.set_ylabel("ms a token, forward, backward and update")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(job["to"], dpi=150)


if __name__ == "__main__":
    draw(job_io.read())
    job_io.answer({})
