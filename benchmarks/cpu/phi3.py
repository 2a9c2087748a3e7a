"""Phi-3-mini at full size in bfloat16 and in int8, in turns; and what int8 costs in quality, on SmolLM2."""

import json
import statistics
from pathlib import Path
from typing import Any

import job_io
from rows import REAL, SHIPPED

# A step's rows, how they are laid, and what memory it is to stay below.
SHAPES = {
    "one row of 2,048": {"rows": 1, "length": 2048, "pack_tokens": 2048},
    "eight rows of 256": {"rows": 8, "length": 256, "pack_tokens": 1024},
}
LIMITS_GB = {"bf16": 12.0, "int8": 8.0}


def phi3(job: dict[str, Any], python: Path, rounds: int, layers: int | None = None) -> dict[str, Any]:
    """Peak memory of making the model and training, share of the bf16 rate, and int8's speed over bf16's.

    Speed is of each process's second step, behind a first one of the same rows.
    """
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {shape: {"bf16": [], "int8": []} for shape in SHAPES}
    for number in range(rounds):
        for shape, settings in SHAPES.items():
            for base, limit in LIMITS_GB.items():
                own = {**job, **settings, "int8": base == "int8", "limit_gb": limit, "probe": base == "bf16"}
                own["layers"] = layers
                run = job_io.ask(python, "child_phi3.py", own)
                told = {"shape": shape, "base": base, "round": number, **run}
                print(json.dumps({key: value for key, value in told.items() if key != "versions"}), flush=True)
                runs[shape][base].append(run)
    shares = {shape: [run["roofline"] for run in of["bf16"]] for shape, of in runs.items()}
    ratios = {
        shape: [a["seconds"][-1] / b["seconds"][-1] for a, b in zip(of["bf16"], of["int8"], strict=True)]
        for shape, of in runs.items()
    }
    slowest_share = min(shares.values(), key=statistics.median)
    slowest_ratio = min(ratios.values(), key=statistics.median)
    return {
        **{
            f"phi3_{base}_gb": round(max(run["peak_gb"] for of in runs.values() for run in of[base]), 2)
            for base in LIMITS_GB
        },
        "phi3_roofline": round(statistics.median(slowest_share), 3),
        "int8_speedup": round(statistics.median(slowest_ratio), 3),
        "spread": {
            "phi3_roofline": [round(min(slowest_share), 3), round(max(slowest_share), 3)],
            "int8_speedup": [round(min(slowest_ratio), 3), round(max(slowest_ratio), 3)],
        },
        "phi3": {
            shape: {
                "roofline": round(statistics.median(shares[shape]), 3),
                "int8_speedup": round(statistics.median(ratios[shape]), 3),
                **{
                    base: {
                        "seconds": round(statistics.median(run["seconds"][-1] for run in of[base]), 1),
                        "peak_gb": round(max(run["peak_gb"] for run in of[base]), 2),
                        "layers_recomputed": of[base][0]["recomputed"],
                    }
                    for base in LIMITS_GB
                },
            }
            for shape, of in runs.items()
        },
    }


def int8_loss(python: Path, steps: int) -> dict[str, Any]:
    """Held-out loss of SmolLM2 behind the same steps in int8 and in bfloat16."""
    source = str(REAL) if REAL.is_file() else SHIPPED
    losses = {
        base: job_io.ask(
            python, "child_int8.py", {"train": source, "eval": 0.06, "int8": base == "int8", "steps": steps}
        )
        for base in LIMITS_GB
    }
    tuned = {base: run["tuned"]["eval_loss"] for base, run in losses.items()}
    return {
        "int8_loss_ratio": round(tuned["int8"] / tuned["bf16"], 5),
        "int8_loss": {
            base: {
                "base": run["base"]["eval_loss"],
                "tuned": run["tuned"]["eval_loss"],
                "seconds": run["seconds"],
                "gb": round(run["gb"], 3),
            }
            for base, run in losses.items()
        },
    }
