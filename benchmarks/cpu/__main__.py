"""Our training on a CPU against TRL + PEFT and LitGPT: `python benchmarks/cpu [SECTION …]`.

    gate      fp32 loss and gradients against PEFT's, also behind 20 steps; bfloat16's loss of each token against fp32's
              beside PEFT's; where ours differs or is further off, it ends before anything is timed
    speed     rows a second and memory, in rounds with all contenders in turns
    roofline  training's FLOP over the rate of the model's own products, in turns
    cost      seconds a token from 128 to 4,096 tokens a row, with a plot
    ablation  ours without one technique at a time, over ours
    overlay   200 steps in bfloat16 beside PEFT's, and PEFT's spread over seeds (an hour)
    inside_trl  SFTTrainer on an accelerated model (phinetune.accelerate), against the same on the model as it is
    precision  how far bfloat16's loss is from fp32's behind one update, by PEFT's layers and by ours
    prefix    rows that share a long beginning against the same rows without sharing
    phi3      Phi-3-mini at full size: a step's memory and its share of the product rate, in bfloat16 and in int8
    int8      what int8 costs in held-out loss
    table     writes the figures into docs/benchmarks.md

Every figure is of a process of its own.  A section's keys are merged into benchmarks/results/cpu.json, or another file
that is named, with the machine, the versions and the arguments that they are of.  `speed` and `inside_trl` go behind
`gate` even where they are named alone.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import job_io
import phi3 as phi3_section
import record
import speed as speed_section
import table as table_section
from rows import ROOT, all_rows, draw_rows

RESULTS = record.RESULTS / "cpu.json"
OURS, TRL = speed_section.OURS, speed_section.TRL
TOLERANCE = 1e-5

# What ours is without one of its techniques: settings of the child, and environment variables.
ABLATIONS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "a row at a time": ({"pack_tokens": 1}, {}),
    "each row its own beginning": ({"without": ["sharing"]}, {}),
    "attention by plain products": ({"without": ["attention"]}, {}),
    "layers by plain products": ({"without": ["decoder"]}, {}),
    "loss head by plain products": ({"without": ["loss"]}, {}),
    "no C++ at all": ({"without": ["attention", "decoder", "loss"]}, {}),
    "nothing compiled": ({}, {"PHINETUNE_COMPILE": "0"}),
    "freed memory given back": ({"without": ["allocator"]}, {"THP_MEM_ALLOC_ENABLE": "0"}),
}


def base_job(asked: argparse.Namespace) -> dict[str, Any]:
    """What all children are asked: model, adapter, optimiser, rows a step."""
    from phinetune.model.smollm2 import smollm2_folder
    from phinetune.recipe import DataConfig

    default_pack = DataConfig(train="any").max_batch_tokens
    return {
        "model": str(smollm2_folder()), "dtype": asked.dtype, "r": 16, "lora_alpha": 32, "learning_rate": 2e-4,
        "seed": 0, "rows_a_step": asked.rows_a_step, "batch_rows": 8,
        "pack_tokens": asked.pack_tokens or default_pack, "warmup_steps": 1, "passes": asked.passes,
    }  # fmt: skip


def gate(job: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    compared = draw_rows(4, 1, seed=1).shuffled  # short and long
    short = [row for row in all_rows()[0] if len(row) <= 160][: 4 * asked.gate_steps]
    own = {"what": "gate", "dtype": "float32", "compared": compared, "rows": short, "rows_a_step": 4}
    found = job_io.ask(OURS, "child_peft.py", {**job, **own})
    result = {key: found[key] for key in ("loss_rel_err", "grad_rel_err")}
    result["gate"] = {key: value for key, value in found.items() if key not in (*result, "versions", "gb")}
    print(json.dumps(result), flush=True)
    if max(result["loss_rel_err"], result["grad_rel_err"]) > TOLERANCE:
        raise SystemExit(f"loss or gradients differ from PEFT's by more than {TOLERANCE:.0e}: nothing is timed")
    rounded = job_io.ask(OURS, "child_peft.py", {**job, "what": "bfloat16", "compared": compared})
    result |= {"bf16_token_error": rounded["ours"], "bf16_token_error_peft": rounded["peft"]}
    result["gate"]["bfloat16"] = {key: rounded[key] for key in ("tokens", "mean_loss")}
    print(json.dumps({"bfloat16": rounded}), flush=True)
    if rounded["ours"] > rounded["peft"]:
        raise SystemExit("in bfloat16 ours is further from fp32's losses than PEFT's layers are: nothing is timed")
    return {**result, "peer_versions": found["versions"]}


def speed(job: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    rows = draw_rows(asked.rows, job["batch_rows"])
    pilot = draw_rows(asked.pilot_rows, job["batch_rows"])
    result = speed_section.measure(job, rows, pilot, asked.default_rows, asked.rounds, asked.peers)
    lengths = sorted(map(len, rows.shuffled))
    result["rows"] = {
        "source": rows.source, "count": len(lengths), "tokens": sum(lengths), "longest": lengths[-1],
        "median": statistics.median(lengths), "a_step": job["rows_a_step"],
    }  # fmt: skip
    return result


def roofline(job: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    rows = draw_rows(asked.rows, job["batch_rows"]).shuffled
    found = [job_io.ask(OURS, "child_ours.py", {**job, "what": "roofline", "rows": rows}) for _ in range(asked.rounds)]
    shares = [run["roofline"] for run in found]
    keys = ("rate_gflops", "achieved_gflops")
    return {
        "roofline": round(statistics.median(shares), 4),
        "spread": {"roofline": [round(min(shares), 4), round(max(shares), 4)]},
        "rates": {key: round(statistics.median(run[key] for run in found), 1) for key in keys},
    }


def cost(job: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    rows = draw_rows(asked.rows, job["batch_rows"]).shuffled
    own = {"what": "cost", "rows": rows, "lengths": asked.lengths, "tokens_a_step": max(asked.lengths), "repeats": 5}
    found = job_io.ask(OURS, "child_ours.py", {**job, **own})
    by_length, linear = found["by_length"], found["linear_flop"]
    first, last = by_length[str(asked.lengths[0])], by_length[str(asked.lengths[-1])]
    growths = [b / a for a, b in zip(first["each"], last["each"], strict=True)]
    turns = zip(first["each"], first["attention_each"], last["attention_each"], strict=True)
    by_attention = [1 + (b - a) / step for step, a, b in turns]
    result = {
        "cost_growth": round(statistics.median(growths), 3),
        "cost_growth_by_attention": round(statistics.median(by_attention), 3),
        "spread": {
            "cost_growth": [round(min(growths), 3), round(max(growths), 3)],
            "cost_growth_by_attention": [round(min(by_attention), 3), round(max(by_attention), 3)],
        },
        "cost_growth_by_attention_flop": round(
            (linear + last["attention_flop"]) / (linear + first["attention_flop"]), 3
        ),
        "cost_growth_with_torch_attention": round(
            1 + (last["attention_alone"] - first["attention_alone"]) / first["seconds_a_token"], 3
        ),
        "cost_per_length": by_length,
        "cost_linear_flop": linear,
    }
    plot = table_section.plot_of(asked.results)
    job_io.ask(OURS, "child_plot.py", {"by_length": by_length, "linear_flop": linear, "to": str(plot)})
    return result


def ablation(job: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory of ours without a technique, over ours, in turns."""
    own = {**job, "what": "speed", "rows": draw_rows(asked.rows, job["batch_rows"]).shuffled, "passes": 1}
    wanted = {name: what for name, what in ABLATIONS.items() if not asked.only or name in asked.only}
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in wanted}
    for _ in range(asked.rounds):
        whole = speed_section.run("ours", lambda: job_io.ask(OURS, "child_ours.py", own))
        for name, (settings, environment) in wanted.items():
            less = {**own, **settings}
            run = speed_section.run(name, lambda: job_io.ask(OURS, "child_ours.py", less, environment))  # noqa: B023
            ratios[name].append((speed_section.rate(run) / speed_section.rate(whole), run["gb"] / whole["gb"]))
    return {
        "ablation": {
            name: {
                "speed": round(statistics.median(speed for speed, _ in pairs), 3),
                "memory": round(statistics.median(memory for _, memory in pairs), 3),
            }
            for name, pairs in ratios.items()
        }
    }


def inside_trl(job: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """`SFTTrainer` in turns with and without `phinetune.accelerate`, by TRL's loss and by the model's own."""
    rows, accumulation = draw_rows(asked.rows, job["batch_rows"]), job["rows_a_step"] // job["batch_rows"]
    own = {**job, "default": False, "layout": "grouped", "attention": "sdpa", "rows": rows.grouped}
    own |= {"accumulation": accumulation, "autocast": job["dtype"] == "bfloat16"}
    trainers = {
        f"SFTTrainer, {name}{', accelerated' * accelerate}": {"loss": loss, "accelerate": accelerate}
        for name, loss in (("model's loss", "phinetune"), ("TRL's loss", "trl"))
        for accelerate in (True, False)
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trainers}
    for _ in range(asked.rounds):
        for name, settings in trainers.items():
            child: dict[str, Any] = {**own, **settings}
            ask = lambda: job_io.ask(TRL, "child_trl.py", child, {"PYTHONPATH": str(ROOT)})  # noqa: B023, E731
            runs[name].append(speed_section.run(name, ask))
    fast, model_loss, fast_trl_loss, trl_loss = trainers
    found: dict[str, Any] = {"spread": {}}
    for key, (one, other) in {
        "inside_trl_speedup": (fast, model_loss),
        "inside_trl_speedup_trl_loss": (fast_trl_loss, trl_loss),
        "inside_trl_speedup_both": (fast, trl_loss),
    }.items():
        pairs = zip(runs[one], runs[other], strict=True)
        ratios = [speed_section.rate(a) / speed_section.rate(b) for a, b in pairs]  # of the same rows
        found[key] = round(statistics.median(ratios), 3)
        found["spread"][key] = [round(min(ratios), 3), round(max(ratios), 3)]
    found["inside_trl"] = {
        name: {
            "rows_per_second": round(statistics.median(run["rows"] / run["seconds"] for run in of), 3),
            "tokens_per_second": round(statistics.median(map(speed_section.rate, of)), 1),
            "gb": round(statistics.median(run["gb"] for run in of), 3),
            "loss": of[0]["loss"],
        }
        for name, of in runs.items()
    }
    found["peer_versions"] = runs[fast][0]["versions"]
    return found


def precision(job: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """How far from fp32's loss bfloat16 is behind one update, by PEFT's layers and by ours, inside `SFTTrainer`."""
    rows = draw_rows(2 * job["rows_a_step"], job["batch_rows"])
    own = {**job, "default": False, "layout": "grouped", "attention": "sdpa", "loss": "phinetune", "rows": rows.grouped}
    own |= {"accumulation": job["rows_a_step"] // job["batch_rows"], "warmup_steps": 0}
    runs = {
        name: job_io.ask(TRL, "child_trl.py", {**own, **settings}, {"PYTHONPATH": str(ROOT)})
        for name, settings in {
            "fp32": {"dtype": "float32", "autocast": False, "accelerate": False},
            "bf16, PEFT's layers": {"autocast": True, "accelerate": False},
            "bf16, accelerated": {"autocast": True, "accelerate": True},
        }.items()
    }
    losses = {name: run["losses"] for name, run in runs.items()}
    print(json.dumps(losses), flush=True)
    exact, peft, ours = (of[1] for of in losses.values())
    errors = {"bf16_loss_error": abs(ours - exact), "bf16_loss_error_peft": abs(peft - exact)}
    return {"precision": losses, **errors, "peer_versions": runs["fp32"]["versions"]}


def overlay(job: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """Mean distance of our losses to PEFT's of the same seed, against PEFT's own over seeds.

    PEFT runs as it is, once with its sums rounded once (`child_peft.round_once`), and once in fp32, which is what
    bfloat16 means to compute.
    """
    everything, need = all_rows()[0], 4 * asked.overlay_steps
    longest = sorted(map(len, everything))[:need][-1]  # the shorter ones: PEFT takes minutes as it is
    rows = [row for row in everything if len(row) <= longest][:need]
    own = {**job, "what": "overlay", "rows": rows, "rows_a_step": 4}
    runs: dict[str, dict[str, Any]] = {"ours": {"trainer": "ours"}}
    seeds = {f"PEFT, seed {seed}": {"trainer": "peft", "seed": seed} for seed in range(asked.overlay_seeds)}
    runs |= seeds | {"PEFT, rounded once": {"trainer": "peft", "one_rounding": True}}
    runs |= {"PEFT in fp32": {"trainer": "peft", "dtype": "float32"}}
    losses: dict[str, list[float]] = {}
    for name, settings in runs.items():
        losses[name] = job_io.ask(OURS, "child_peft.py", {**own, **settings})["losses"]
        print(f"{name}: {losses[name][0]:.4f} -> {statistics.mean(losses[name][-20:]):.4f}", flush=True)

    def distance(one: str, other: str) -> float:
        return statistics.mean(abs(a - b) for a, b in zip(losses[one], losses[other], strict=True))

    spread = [distance(a, b) for i, a in enumerate(seeds) for b in list(seeds)[:i]]
    return {
        "overlay_mean_abs": distance("ours", "PEFT, seed 0"),
        "overlay_peft_spread": statistics.mean(spread) if spread else None,
        "overlay_to_rounded_once": distance("ours", "PEFT, rounded once"),
        "overlay_to_fp32": distance("ours", "PEFT in fp32"),
        "overlay_peft_to_rounded_once": distance("PEFT, seed 0", "PEFT, rounded once"),
        "overlay_peft_to_fp32": distance("PEFT, seed 0", "PEFT in fp32"),
        "overlay_steps": len(losses["ours"]),
        "overlay_last_loss": {name: statistics.mean(values[-20:]) for name, values in losses.items()},
        "overlay_losses": {name: [round(loss, 4) for loss in values] for name, values in losses.items()},
        "peer_versions": job_io.versions("peft"),
    }


def prefix(job: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """Rows with a long beginning in common, computed once and for each row, on eight layers of Phi-3's full width."""
    found = job_io.ask(OURS, "child_prefix.py", {"compared_layers": 4, "layers": 8, "rounds": asked.rounds})
    speedup, spread = found.pop("prefix_speedup"), found.pop("spread")
    print(json.dumps(found), flush=True)
    return {"prefix_speedup": round(speedup, 3), "spread": {"prefix_speedup": spread}, "prefix": found}


def phi3(job: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    return phi3_section.phi3(job, OURS, asked.phi3_rounds, asked.phi3_layers)


def int8(job: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    return phi3_section.int8_loss(OURS, asked.int8_steps)


SECTIONS: dict[str, Callable[[dict[str, Any], argparse.Namespace], dict[str, Any]]] = {
    "gate": gate,
    "speed": speed,
    "roofline": roofline,
    "cost": cost,
    "ablation": ablation,
    "overlay": overlay,
    "inside_trl": inside_trl,
    "precision": precision,
    "prefix": prefix,
    "phi3": phi3,
    "int8": int8,
}


def merge(name: str, found: dict[str, Any], asked: argparse.Namespace) -> None:
    """Puts a section's figures in the place of its former ones, with what they were measured on; other sections keep
    theirs."""
    held = record.read(asked.results)
    sections, spread = held.pop("sections", {}), held.pop("spread", {})
    for key in sections.get(name, {}).get("figures", []):
        held.pop(key, None)
        spread.pop(key, None)
    sections[name] = {
        "machine": record.machine(),
        "versions": job_io.versions("phinetune", "torch", "transformers") | found.pop("peer_versions", {}),
        "asked": {key: value for key, value in vars(asked).items() if key not in ("sections", "results")},
    }
    spread |= found.pop("spread", {})
    sections[name]["figures"] = sorted(found)
    held |= found
    kept_apart = {key for section in sections.values() for key in section["figures"]}
    if held.keys() <= kept_apart | {"machine", "versions"}:  # of a file from before sections were told apart
        held = {key: value for key, value in held.items() if key in kept_apart}
    record.write(asked.results, {**held, "spread": spread, "sections": sections})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=[], choices=[*SECTIONS, "table", []], metavar="SECTION")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=80)
    parser.add_argument("--rows-a-step", type=int, default=16)
    parser.add_argument("--passes", type=int, default=2, help="of ours over the rows, which takes less time for one")
    parser.add_argument("--pilot-rows", type=int, default=32)
    parser.add_argument("--default-rows", type=int, default=24, help="of TRL's defaults, which are slow; 0: not at all")
    parser.add_argument("--peers", nargs="+", help="variants to try, by name (such as 'TRL, packed'); all by default")
    parser.add_argument("--dtype", default="bfloat16", help="float32 where torch is slow in bfloat16: no AVX512-BF16")
    parser.add_argument("--results", type=Path, default=RESULTS, help="cpu_avx2.json for such a machine")
    parser.add_argument("--pack-tokens", type=int, help="ours and TRL's packs; phinetune's default where not given")
    parser.add_argument("--gate-steps", type=int, default=20)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--only", nargs="+", help="ablations by name")
    parser.add_argument("--overlay-steps", type=int, default=200)
    parser.add_argument("--overlay-seeds", type=int, default=3)
    parser.add_argument("--phi3-rounds", type=int, default=2, help="some six minutes each")
    parser.add_argument("--phi3-layers", type=int, help="of Phi-3-mini's 32, for a trial")
    parser.add_argument("--int8-steps", type=int, default=30)
    asked = parser.parse_args()
    names = asked.sections or list(SECTIONS)
    job = base_job(asked)
    if {"speed", "inside_trl"} & set(names) and "gate" not in names:
        names = ["gate", *names]  # before any timing
    for name in names:
        if name != "table":
            print(f"-- {name}", flush=True)
            merge(name, SECTIONS[name](job, asked), asked)
    table_section.write(asked.results)


if __name__ == "__main__":
    main()
