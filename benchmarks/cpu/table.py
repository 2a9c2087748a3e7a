"""The figures of cpu.json and cpu_avx2.json as tables in docs/benchmarks.md, each between two markers, so that none is
typed by hand."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rows import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"

# (key, what it is, form)
FIGURES = [
    ("vs_trl_tuned", "rows a second against TRL + PEFT, the fastest of its settings tried", "{:.2f} ×"),
    ("vs_trl_best", "against TRL with more than its settings, the fastest found", "{:.2f} ×"),
    ("vs_trl_default", "against TRL's defaults", "{:.2f} ×"),
    ("vs_litgpt", "against LitGPT", "{:.2f} ×"),
    ("roofline", "share of the rate of the model's own products", "{:.2f}"),
    ("memory_vs_trl_tuned", "peak memory against TRL + PEFT, the fastest of its settings tried", "{:.2f} ×"),
    ("memory_vs_trl_best", "peak memory against the fastest TRL found", "{:.2f} ×"),
    ("loss_rel_err", "fp32 loss against PEFT's, relative", "{:.1e}"),
    ("grad_rel_err", "fp32 adapter gradients against PEFT's, relative, the worst tensor", "{:.1e}"),
    ("bf16_token_error", "bf16 loss of a token, mean distance to fp32's", "{:.4f}"),
    ("bf16_token_error_peft", "the same by PEFT's layers", "{:.4f}"),
    ("overlay_mean_abs", "bf16 losses of 200 steps, mean distance to PEFT's run", "{:.4f}"),
    ("overlay_peft_spread", "the same between PEFT's own runs of three seeds", "{:.4f}"),
    ("overlay_to_rounded_once", "ours to PEFT's run whose sums are rounded once", "{:.4f}"),
    ("overlay_to_fp32", "ours to PEFT's run in fp32", "{:.4f}"),
    ("overlay_peft_to_rounded_once", "PEFT's as it is to PEFT's whose sums are rounded once", "{:.4f}"),
    ("overlay_peft_to_fp32", "PEFT's as it is to its own in fp32", "{:.4f}"),
    ("bf16_loss_error", "bf16 loss behind one update, distance to fp32's", "{:.4f}"),
    ("bf16_loss_error_peft", "the same by PEFT's layers", "{:.4f}"),
    ("cost_growth", "cost a token at 4,096 tokens a row over that at 128", "{:.2f} ×"),
    ("cost_growth_by_attention", "the same by our attention's own time", "{:.2f} ×"),
    ("cost_growth_by_attention_flop", "the same by attention's FLOP, of six products", "{:.2f} ×"),
    ("phi3_bf16_gb", "Phi-3-mini at full size, bf16, peak memory", "{:.1f} GB"),
    ("phi3_int8_gb", "Phi-3-mini at full size, int8, peak memory", "{:.1f} GB"),
    ("phi3_roofline", "Phi-3-mini, share of the bf16 rate", "{:.2f}"),
    ("int8_speedup", "Phi-3-mini, int8 base against our bf16, a step", "{:.2f} ×"),
    ("int8_loss_ratio", "held-out loss of an int8 tune over bf16's", "{:.4f}"),
    ("prefix_speedup", "shared prefix of 768 tokens, against our own unshared batches", "{:.2f} ×"),
    (
        "inside_trl_speedup",
        "accelerated model inside SFTTrainer, against it as it is, both by the model's loss",
        "{:.2f} ×",
    ),
    ("inside_trl_speedup_trl_loss", "the same, both by TRL's own loss: SFTTrainer unchanged", "{:.2f} ×"),
    ("inside_trl_speedup_both", "accelerated by the model's loss, against SFTTrainer unchanged", "{:.2f} ×"),
]


def rows_of(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def shown(form: str, value: float | None) -> str:
    return "–" if value is None else form.format(value)


def spread_of(form: str, values: list[float]) -> str:
    """Nothing where there was one round."""
    least, most = (shown(form, value) for value in values)
    return "" if values[0] == values[1] else f"{least} to {most}"


def measured_on(found: dict[str, Any]) -> list[str]:
    """A line where all sections were measured on one machine with the same versions, else one for each such group."""
    parts = [(f"`{name}`", of["machine"], of["versions"]) for name, of in found.get("sections", {}).items()]
    if "machine" in found:  # of a file from before sections were told apart
        parts.append(("the rest", found["machine"], found["versions"]))
    groups: list[tuple[list[str], dict[str, Any], dict[str, str]]] = []
    for name, machine, versions in parts:
        for names, same_machine, together in groups:
            if machine == same_machine and all(together.get(p, number) == number for p, number in versions.items()):
                names.append(name)
                together |= versions
                break
        else:
            groups.append(([name], machine, dict(versions)))
    lines = []
    for names, about, versions in groups:
        lines.append(
            f"Machine{' of ' + ', '.join(names) if len(groups) > 1 else ''}: {about.get('cpu', 'unknown')}, "
            f"{about['cores']} cores, {about.get('gb', '?')} GB, {', '.join(about.get('instructions', []))}. "
            f"Python {about['python']}; {', '.join(f'{p} {number}' for p, number in sorted(versions.items()))}.\n"
        )
    return lines


def plot_of(results: Path) -> Path:
    """Where the picture of the cost by row length belongs."""
    return PAGE.parent / "images" / f"cost_per_length{results.stem.removeprefix('cpu')}.png"


def render(found: dict[str, Any], plot: Path) -> str:
    """Markdown of all figures."""
    spread, against = found.get("spread", {}), found.get("against", {})
    figures = []
    for key, what, form in FIGURES:
        if key not in found:  # its section wasn't run
            continue
        low_high = spread_of(form, spread[key]) if key in spread else ""
        with_whom = f" ({against[key]})" if key in against else ""
        figures.append([what + with_whom, f"`{key}`", shown(form, found[key]), low_high])
    parts = rows_of(["figure", "key", "median", "least to most"], figures)

    if "contenders" in found:
        rows, asked = found["rows"], found.get("sections", {}).get("speed", {}).get("asked")
        parts.append(
            f"{rows['count']} rows of {rows['source']}, {rows['tokens']:,} tokens (median {rows['median']:.0f}, "
            f"longest {rows['longest']}), {rows['a_step']} rows a step"
            + (f"; {asked['rounds']} rounds, ours {asked['passes']} passes over them in each" if asked else "")
            + ":\n"
        )
        parts += rows_of(
            ["contender", "tokens/s", "least to most", "rows/s", "peak GB", "warm-up s"],
            (
                [
                    name,
                    f"{run['tokens_per_second']:.0f}",
                    spread_of("{:.0f}", run["tokens_per_second_spread"]),
                    f"{run['rows_per_second']:.2f}",
                    f"{run['gb']:.2f}",
                    f"{run['warmup_seconds']:.1f}",
                ]
                for name, run in found["contenders"].items()
            ),
        )
    if "pilot" in found:
        parts.append("All that was tried of the peers, once and in short:\n")
        parts += rows_of(
            ["variant", "tokens/s", "peak GB"],
            ([name, f"{run['tokens_per_second']:.0f}", f"{run['gb']:.2f}"] for name, run in found["pilot"].items()),
        )
    if "rates" in found:
        rates = found["rates"]
        parts.append(
            f"The model's own products run at {rates['rate_gflops']:.0f} GFLOP/s, "
            f"training at {rates['achieved_gflops']:.0f}.\n"
        )
    if "cost_per_length" in found:
        names = ("seconds_a_token", "own_attention", "attention_alone")
        parts += rows_of(
            ["tokens a row", "ms a token", "of it attention", "torch's attention"],
            (
                [f"{int(length):,}", *(f"{1e3 * at[name]:.3f}" for name in names)]
                for length, at in found["cost_per_length"].items()
            ),
        )
        parts.append(f"![Cost a token by row length](images/{plot.name})\n")
    if "ablation" in found:
        parts += rows_of(
            ["ours without", "speed", "memory"],
            ([name, f"{at['speed']:.2f} ×", f"{at['memory']:.2f} ×"] for name, at in found["ablation"].items()),
        )
    if "inside_trl" in found:
        parts.append("Inside SFTTrainer, the same rows in the same batches:\n")
        parts += rows_of(
            ["trainer", "rows/s", "tokens/s", "peak GB", "mean loss"],
            (
                [name, f"{at['rows_per_second']:.2f}", f"{at['tokens_per_second']:.0f}", f"{at['gb']:.2f}"]
                + [f"{at['loss']:.4f}"]
                for name, at in found["inside_trl"].items()
            ),
        )
    return "\n".join(parts + measured_on(found))


def write(results: Path, page: Path = PAGE) -> None:
    """Puts the tables between the page's markers for these results, if it has any."""
    begin, end = (f"<!-- figures of {results.name}: {edge} -->" for edge in ("begin", "end"))
    text = page.read_text(encoding="utf-8")
    if not results.is_file() or begin not in text:
        return
    before, _, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    assert found_end, f"{page.name} has both markers"
    tables = render(json.loads(results.read_text(encoding="utf-8")), plot_of(results))
    page.write_text(f"{before}{begin}\n{tables}\n{end}{after}", encoding="utf-8")
