"""Phi-3-mini at full size with random weights on a GPU: our training step against TRL + PEFT's, in turns.

    python benchmarks/gpu.py [--rounds 3] [--steps 10] [--batch 8] [--length 1024] [--kinds bf16 nf4]

Both sides train LoRA of rank 16 on all linear layers in bfloat16 on the same rows of random tokens, eight a step,
neighbours in length, without gradient checkpointing; `nf4` is QLoRA, by bitsandbytes on both sides.  TRL and PEFT are
taken from this environment (`pip install trl peft datasets bitsandbytes`); where `liger-kernel` is there, too, TRL runs
with and without it.  Writes benchmarks/results/gpu.json: tokens a second of each, ratios, memory, the share of the
card's own matrix products, and the versions.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import phinetune

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "liger_kernel")
RESULTS = Path(__file__).parent / "results" / "gpu.json"
R, ALPHA, LEARNING_RATE, WARM_UP = 16, 32, 2e-4, 3  # the last: steps that aren't timed


def make_model(folder: Path) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Phi3ForCausalLM._from_config(Phi3Config(), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def steps_of(count: int, batch: int, length: int) -> list[list[list[int]]]:
    """`batch` rows a step, from half of `length` up.

    Those of a step are neighbours in length, as a sampler that groups by length makes them: the least padding that a
    padding trainer can have.  The steps come in no order.
    """
    drawn = torch.randint(3, 32000, (count * batch, length), generator=torch.Generator().manual_seed(1))
    rows = sorted((row[: length - (i * 37) % (length // 2)].tolist() for i, row in enumerate(drawn)), key=len)
    steps = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    random.Random(0).shuffle(steps)
    return steps


def padding(steps: list[list[list[int]]]) -> float:
    """What padding adds to the tokens of a trainer that pads each step to its longest row, as a share."""
    padded = sum(len(step) * max(map(len, step)) for step in steps)
    return padded / sum(len(row) for step in steps for row in step) - 1


def ours(folder: Path, steps: list[list[list[int]]], kind: str) -> dict[str, Any]:
    from phinetune.data import Example
    from phinetune.machine.memory import memory_in_use
    from phinetune.measure.rates import Products
    from phinetune.model import adapt_model, load_model
    from phinetune.model.memory import Batch, bytes_to_come
    from phinetune.recipe import ModelKwargs, PeftConfig, TrainingConfig
    from phinetune.train.loop import training_step
    from phinetune.train.optimiser import make_optimizer

    kwargs = ModelKwargs(dtype="bfloat16", load_in_4bit=kind == "nf4")
    model = load_model(str(folder), kwargs, torch.device("cuda"))
    peft = PeftConfig(r=R, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
    adapt_model(model, peft, 0)
    model.train()
    optimizer = make_optimizer(model, TrainingConfig(optim="adamw_torch_fused"), peft)
    batch = Batch(max(sum(map(len, step)) for step in steps), max(len(row) for step in steps for row in step))
    said = (memory_in_use(model.device) + bytes_to_come(model, batch)) / 1e9
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for number, step in enumerate(steps):
        examples = [Example("", ids, [True] * len(ids)) for ids in step]
        begin = time.perf_counter()
        loss, _ = training_step(
            model,
            optimizer,
            examples,
            learning_rate=LEARNING_RATE,
            max_grad_norm=1.0,
            max_batch_tokens=1 << 20,
            seed=(0, number),
        )
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        losses.append(loss)
    found = {**figures(seconds, steps), "losses": losses, "gb_said": said, "first_step": seconds[0]}
    if kind == "bf16":
        probe = Products(model, batch.tokens)
        probe.rate()
        rate = statistics.median(probe.rate() for _ in range(5))
        found["roofline"] = 4 * probe.weights * found["tokens_per_second"] / rate
        found["products_tflops"] = rate / 1e12
    return found


def trl(folder: Path, steps: list[list[list[int]]], kind: str, liger: bool = False) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            torch.cuda.synchronize()
            ends.append(time.perf_counter())

    options: dict[str, Any] = {}
    if kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa", device_map="cuda", **options
    )
    torch.cuda.reset_peak_memory_stats()
    words = {"<unk>": 0, "<pad>": 1, "</s>": 2}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    with tempfile.TemporaryDirectory() as work:
        settings = SFTConfig(
            output_dir=work, bf16=True, report_to="none", save_strategy="no", num_train_epochs=1, disable_tqdm=True,
            gradient_checkpointing=False, per_device_train_batch_size=len(steps[0]), learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", max_length=None, train_sampling_strategy="sequential",
            use_liger_kernel=liger, logging_steps=1,
        )  # fmt: skip
        lora = LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_dict({"input_ids": [row for step in steps for row in step]}),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[Clock()],
        )
        begin = time.perf_counter()
        trainer.train()
    seconds = [b - a for a, b in zip([begin, *ends], ends, strict=False)]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {**figures(seconds, steps), "losses": losses}


def figures(seconds: list[float], steps: list[list[list[int]]]) -> dict[str, Any]:
    tokens = [sum(map(len, step)) for step in steps]
    return {
        "tokens_per_second": sum(tokens[WARM_UP:]) / sum(seconds[WARM_UP:]),
        "gb": torch.cuda.max_memory_allocated() / 1e9,
    }


SIDES = {"ours": ours, "trl": trl, "trl_liger": lambda *given: trl(*given, liger=True)}


def in_turns(folder: Path, asked: argparse.Namespace, kind: str) -> dict[str, Any]:
    names = [name for name in SIDES if name != "trl_liger" or installed("liger_kernel")]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(asked.rounds):
        for name, of in list(runs.items()):
            command = [sys.executable, __file__, "--child", name, "--kinds", kind, "--model", str(folder)]
            command += ["--steps", str(asked.steps), "--batch", str(asked.batch), "--length", str(asked.length)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode and name == "ours":
                raise SystemExit(f"{kind} ours failed:\n{done.stderr[-3000:]}")
            if done.returncode:
                print(f"{kind} {name} failed and is left out:\n{done.stderr[-3000:]}", flush=True)
                del runs[name]
                continue
            of.append(json.loads(done.stdout.splitlines()[-1]))
            print(kind, name, json.dumps({key: value for key, value in of[-1].items() if key != "losses"}), flush=True)
    rates = {name: [run["tokens_per_second"] for run in of] for name, of in runs.items()}
    found: dict[str, Any] = {}
    for peer in [name for name in runs if name != "ours"]:
        ratios = [a / b for a, b in zip(rates["ours"], rates[peer], strict=True)]
        found[f"vs_{peer}"] = round(statistics.median(ratios), 3)
        found[f"vs_{peer}_spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
    first = {name: of[0]["losses"] for name, of in runs.items()}
    mine = runs["ours"][0]
    return {
        **found,
        "tokens_per_second": {name: round(statistics.median(of), 1) for name, of in rates.items()},
        "gb": {name: round(max(run["gb"] for run in of), 2) for name, of in runs.items()},
        "gb_said": round(mine["gb_said"], 2),
        "first_step_seconds": round(mine["first_step"], 2),
        "losses": {name: [round(losses[0], 4), round(losses[-1], 4)] for name, losses in first.items()},
        **{name: round(mine[name], 3) for name in ("roofline", "products_tflops") if name in mine},
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--kinds", nargs="+", choices=["bf16", "nf4"], default=["bf16", "nf4"])
    parser.add_argument("--model", type=Path, help="where the random model is; by default it is made anew")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=SIDES)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs CUDA; on a CPU it is `make bench`")
    if asked.child:
        print(
            json.dumps(
                SIDES[asked.child](asked.model, steps_of(asked.steps, asked.batch, asked.length), asked.kinds[0])
            )
        )
        return
    with tempfile.TemporaryDirectory() as work:
        folder = asked.model or Path(work)
        if not (folder / "config.json").is_file():
            make_model(folder)
        found = {
            "device": torch.cuda.get_device_name(),
            "rows": f"{asked.batch} a step, of {asked.length // 2} to {asked.length} tokens, neighbours in length",
            "padding": round(padding(steps_of(asked.steps, asked.batch, asked.length)), 4),
            "rounds": asked.rounds,
            "versions": {"phinetune": phinetune.__version__, **{name: installed(name) for name in PACKAGES}},
        }
        for kind in asked.kinds:
            found[kind] = in_turns(folder, asked, kind)
            asked.results.parent.mkdir(exist_ok=True)
            asked.results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
