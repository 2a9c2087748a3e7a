"""Rows a second against TRL + PEFT and LitGPT, and memory: every contender a process of its own, in turns."""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import job_io
from rows import ROOT, Rows

Contender = Callable[[], dict[str, Any]]

OURS = ROOT / ".venv" / "bin" / "python"
TRL = ROOT / ".venv-trl" / "bin" / "python"
LITGPT = ROOT / ".venv-litgpt" / "bin" / "python"

# What a user of TRL can set: bf16 weights, no checkpointing, and how rows are laid out.
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "grouped": {"layout": "grouped", "autocast": True},
    "grouped, no autocast": {"layout": "grouped", "autocast": False},
    "packed": {"layout": "packed", "autocast": True},
    "padding-free": {"layout": "padding_free", "autocast": True},
    "batches of 4": {"layout": "grouped", "autocast": True, "batch_rows": 4},
    "batches of 2": {"layout": "grouped", "autocast": True, "batch_rows": 2},
    "batches of 1": {"layout": "grouped", "autocast": True, "batch_rows": 1},
}
# What takes more: a subclass that computes transformers' loss.
TRL_BEYOND: dict[str, dict[str, Any]] = {
    "grouped, own loss": {"layout": "grouped", "autocast": True, "loss": "transformers"},
    "packed, own loss": {"layout": "packed", "autocast": True, "loss": "transformers"},
    "batches of 4, own loss": {"layout": "grouped", "autocast": True, "batch_rows": 4, "loss": "transformers"},
    "batches of 2, own loss": {"layout": "grouped", "autocast": True, "batch_rows": 2, "loss": "transformers"},
    "batches of 1, own loss": {"layout": "grouped", "autocast": True, "batch_rows": 1, "loss": "transformers"},
}
OURS_IN_BFLOAT16 = "ours, bfloat16"
LITGPT_BATCHES = {f"batches of {rows}": rows for rows in (1, 2, 4, 8)}
# What phinetune sets for itself (kernels/allocator.py, cli/__init__.py), by the environment.
MEMORY_KEPT = {"THP_MEM_ALLOC_ENABLE": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def rate(run: dict[str, Any]) -> float:
    """Real tokens of finished rows a second."""
    return float(run["tokens"] / run["seconds"])


def contenders(job: dict[str, Any], rows: Rows, default_rows: int, checkpoint: str) -> dict[str, Contender]:
    batch, a_step = job["batch_rows"], job["rows_a_step"]

    def trl(settings: dict[str, Any], environment: dict[str, str] | None = None) -> Contender:
        own = {"loss": "trl", "attention": "sdpa", "batch_rows": batch, **settings, "default": False}
        own["autocast"] = own["autocast"] and job["dtype"] == "bfloat16"
        if own["layout"] == "packed":  # as many packs a step as hold about its rows
            tokens = sum(map(len, rows.grouped)) / len(rows.grouped) * a_step
            own["accumulation"] = max(1, round(tokens / job["pack_tokens"]))
        else:
            own["accumulation"] = a_step // own["batch_rows"]
        return lambda: job_io.ask(TRL, "child_trl.py", {**job, **own, "rows": rows.grouped}, environment)

    def litgpt(batch_rows: int, environment: dict[str, str] | None = None) -> Contender:
        own = {"what": "train", "checkpoint": checkpoint, "batch_rows": batch_rows, "rows": rows.grouped}
        return lambda: job_io.ask(LITGPT, "child_litgpt.py", {**job, **own}, environment)

    default = {"default": True, "loss": "trl", "rows": rows.some(default_rows)}
    ours = {**job, "what": "speed", "rows": rows.shuffled}
    in_bfloat16 = {**ours, "dtype": "bfloat16"}
    return {
        "ours": lambda: job_io.ask(OURS, "child_ours.py", ours),
        OURS_IN_BFLOAT16: lambda: job_io.ask(OURS, "child_ours.py", in_bfloat16),
        "TRL, defaults": lambda: job_io.ask(TRL, "child_trl.py", {**job, **default}),
        **{f"TRL, {name}": trl(settings) for name, settings in {**TRL_SETTINGS, **TRL_BEYOND}.items()},
        **{f"TRL, {name}, memory kept": trl(settings, MEMORY_KEPT) for name, settings in TRL_BEYOND.items()},
        **{f"LitGPT, {name}": litgpt(size) for name, size in LITGPT_BATCHES.items()},
        **{f"LitGPT, {name}, memory kept": litgpt(size, MEMORY_KEPT) for name, size in LITGPT_BATCHES.items()},
    }


def run(name: str, contender: Contender) -> dict[str, Any]:
    found = contender()
    print(f"{name:40} {rate(found):7.1f} tokens/s  {found['seconds']:6.1f} s  {found['gb']:5.2f} GB", flush=True)
    return found


def measure(
    job: dict[str, Any], rows: Rows, pilot_rows: Rows, default_rows: int, rounds: int, only: list[str] | None
) -> dict[str, Any]:
    """A short pilot of all variants (or some, by name), then rounds of ours, TRL's defaults, each kind's faster two."""
    with tempfile.TemporaryDirectory() as work:
        checkpoint = str(Path(work) / "litgpt")
        has_litgpt = LITGPT.is_file()
        if has_litgpt:
            job_io.ask(LITGPT, "child_litgpt.py", {**job, "what": "convert", "checkpoint": checkpoint})

        everyone = contenders({**job, "passes": 1}, pilot_rows, default_rows, checkpoint)
        tried = [name for name in everyone if name not in ("ours", OURS_IN_BFLOAT16, "TRL, defaults")]
        if job["dtype"] != "bfloat16":  # there it is "TRL, grouped"
            tried.remove("TRL, grouped, no autocast")
        tried = [name for name in tried if has_litgpt or not name.startswith("LitGPT")]
        tried = [name for name in tried if not only or name in only]
        pilot = {name: run(name, everyone[name]) for name in tried}

        def faster_two(names: list[str]) -> list[str]:
            return sorted(set(names) & set(pilot), key=lambda name: rate(pilot[name]), reverse=True)[:2]

        settings = [f"TRL, {name}" for name in TRL_SETTINGS]
        chosen = [*faster_two(settings), *faster_two([name for name in tried if name.startswith("TRL")])]
        chosen += faster_two([name for name in tried if name.startswith("LitGPT")])
        ours = ["ours"] if job["dtype"] == "bfloat16" else ["ours", OURS_IN_BFLOAT16]
        chosen = list(dict.fromkeys([*ours, *chosen, *(["TRL, defaults"] if default_rows else [])]))
        everyone = contenders(job, rows, default_rows, checkpoint)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
        for _ in range(rounds):
            for name in chosen:
                runs[name].append(run(name, everyone[name]))

    median = {name: statistics.median(map(rate, runs[name])) for name in chosen}
    groups = {
        "vs_trl_tuned": [name for name in chosen if name in settings],
        "vs_trl_best": [name for name in chosen if name.startswith("TRL") and name != "TRL, defaults"],
        "vs_trl_default": [name for name in chosen if name == "TRL, defaults"],
        "vs_litgpt": [name for name in chosen if name.startswith("LitGPT")],
    }
    against = {key: max(names, key=lambda name: median[name]) for key, names in groups.items() if names}
    result: dict[str, Any] = {"vs_litgpt": None, "against": against, "spread": {}}
    for key, name in against.items():
        ratios = [rate(a) / rate(b) for a, b in zip(runs["ours"], runs[name], strict=True)]
        result[key] = round(statistics.median(ratios), 3)
        result["spread"][key] = [round(min(ratios), 3), round(max(ratios), 3)]
    gb = {name: statistics.median(found["gb"] for found in runs[name]) for name in chosen}
    for key, memory in (("vs_trl_tuned", "memory_vs_trl_tuned"), ("vs_trl_best", "memory_vs_trl_best")):
        result[memory] = round(gb["ours"] / gb[against[key]], 3)
    result["contenders"] = {
        name: {
            "tokens_per_second": round(median[name], 1),
            "rows_per_second": round(statistics.median(found["rows"] / found["seconds"] for found in runs[name]), 3),
            "gb": round(gb[name], 3),
            "tokens_per_second_spread": [round(f(map(rate, runs[name])), 1) for f in (min, max)],
            "warmup_seconds": round(statistics.median(found["warmup_seconds"] for found in runs[name]), 1),
            **{key: runs[name][0][key] for key in ("rows", "tokens", "steps", "trainable", "threads")},
            "loss": runs[name][0].get("loss"),
        }
        for name in chosen
    }
    result["pilot"] = {
        name: {"tokens_per_second": round(rate(found), 1), "gb": round(found["gb"], 3)} for name, found in pilot.items()
    }
    result["peer_versions"] = {}
    for name in chosen:
        result["peer_versions"] |= runs[name][0]["versions"]
    return result
