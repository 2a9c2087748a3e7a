"""QLoRA on a CPU beside PEFT + bitsandbytes: the same rows, steps and settings, and the held-out loss of each.

    python benchmarks/qlora.py        some ten minutes on two cores

SmolLM2-135M in NF4 with double quantisation, r 16 on all linear layers, without dropout, an epoch of 200 real chats
(the shipped orders where there are none), 50 held out; and ours in bfloat16 for the gap.  Each is a process of its own:
what one has freed would count as the next one's memory.  Figures go to benchmarks/results/qlora.json.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import torch
import torch.nn.functional as F

import phinetune
from phinetune.data import Plan, prepare
from phinetune.machine.memory import MemoryPeak
from phinetune.model import load_tokenizer
from phinetune.model.smollm2 import smollm2_folder
from phinetune.recipe import DataConfig, ModelKwargs, TrainingConfig

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "alpaca_en_demo.json"
ROWS, HELD_OUT, LONGEST = 200, 50, 512
TRAINING = {
    "learning_rate": 2e-4, "num_train_epochs": 1, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant",
    "seed": 42, "save_strategy": "no", "use_cpu": True,
}  # fmt: skip
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
SIDES = ("ours", "bf16", "peft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", choices=SIDES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run:
        print(json.dumps(run(asked.run)))
    else:
        measure()


def measure() -> None:
    train, held_out = chats()
    found: dict[str, Any] = {"rows": len(train), "held_out": len(held_out)}
    for name in SIDES:
        ran = subprocess.run([sys.executable, __file__, "--run", name], stdout=subprocess.PIPE, text=True, check=True)
        found |= json.loads(ran.stdout.splitlines()[-1])
        print(json.dumps(found), flush=True)
    found["loss_ratio"] = found["ours_eval_loss"] / found["peft_eval_loss"]
    found["gap_to_bf16"] = found["ours_eval_loss"] / found["bf16_eval_loss"] - 1
    found["versions"] = record.versions("phinetune", "torch", "transformers", "peft", "bitsandbytes")
    record.write(record.RESULTS / "qlora.json", {**found, "machine": record.machine()})
    print(json.dumps(found))


def run(name: str) -> dict[str, Any]:
    if name == "peft":
        return theirs(*chats())
    kwargs = {"dtype": "bfloat16", "load_in_4bit": name == "ours"}
    with tempfile.TemporaryDirectory(prefix="phinetune-qlora-") as folder:
        return ours(name, kwargs, *chats(), Path(folder) / name)


def chats() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if not REAL.is_file():
        rows = (ROOT / "phinetune" / "data" / "shipped" / "orders.train.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(row) for row in rows]
        return found[:-HELD_OUT], found[-HELD_OUT:]
    rows = json.loads(REAL.read_text(encoding="utf-8"))
    found = [
        {"messages": [
            {"role": "user", "content": "\n".join(part for part in (row["instruction"], row["input"]) if part)},
            {"role": "assistant", "content": row["output"]},
        ]}
        for row in rows if row["output"].strip() and len(row["output"]) < 1500
    ]  # fmt: skip
    return found[:ROWS], found[ROWS : ROWS + HELD_OUT]


def ours(name: str, kwargs: dict[str, Any], train: Any, held_out: Any, folder: Path) -> dict[str, Any]:
    result = phinetune.finetune(
        model="smollm2",
        model_kwargs=kwargs,
        train=train,
        eval=held_out,
        data={"max_length": LONGEST, "max_rejected": 0.05},
        training_config={**TRAINING, "output_dir": str(folder), "logging_steps": 20},
        peft_config=LORA,
        rehearsal=False,
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][1:]
    summary = result.summary
    return {
        f"{name}_base_eval_loss": summary["base"]["eval_loss"],
        f"{name}_eval_loss": summary["tuned"]["eval_loss"],
        f"{name}_peak_gb": summary["peak_gb"],
        f"{name}_tokens_per_second": round(sorted(rates)[len(rates) // 2], 1),
    }


def theirs(train: Any, held_out: Any) -> dict[str, Any]:
    """PEFT's layers on bitsandbytes', prepared as PEFT prepares them, in the plainest of loops: a row at a time."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tokenizer = load_tokenizer("smollm2", ModelKwargs())
    config = DataConfig(train="rows", eval="rows", max_length=LONGEST, max_rejected=0.05)
    data = prepare(config, tokenizer, TRAINING["seed"], train, held_out)
    steps = Plan(data.train.lengths, TRAINING["seed"], TrainingConfig(**TRAINING), LONGEST, data.weights)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    with MemoryPeak() as memory:
        model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.bfloat16, quantization_config=nf4)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        torch.manual_seed(TRAINING["seed"])
        model = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=TRAINING["learning_rate"])
        optimizer.param_groups[0]["weight_decay"] = 0.0
        model.train()
        before = mean_loss(model, data.eval)
        begin, tokens = time.perf_counter(), 0
        for step in range(len(steps)):
            rows = [data.train[row] for row in steps[step]]
            supervised = sum(row.supervised for row in rows)
            for row in rows:
                (loss_of(model, row) / supervised).backward()
                tokens += len(row.ids)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - begin
        after = mean_loss(model, data.eval)
    return {
        "peft_base_eval_loss": before,
        "peft_eval_loss": after,
        "peft_peak_gb": round(memory.gb, 3),
        "peft_tokens_per_second": round(tokens / seconds, 1),
    }


def loss_of(model: Any, row: Any) -> torch.Tensor:
    ids = torch.tensor(row.ids, dtype=torch.long)
    learnt = torch.tensor(row.mask, dtype=torch.bool)[1:]
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits[learnt], ids[1:][learnt], reduction="sum")


@torch.no_grad()
def mean_loss(model: Any, rows: Any) -> float:
    """In training mode, without dropout: in evaluation mode bitsandbytes packs its weights anew, and rounds them."""
    return float(sum(loss_of(model, row) for row in rows)) / sum(row.supervised for row in rows)


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    main()
