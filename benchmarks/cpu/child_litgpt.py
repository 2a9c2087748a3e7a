"""LitGPT's LoRA fine-tuning, by its own `fit`, in its own environment: rows' real tokens a second, warm-up apart.

`what: convert` makes LitGPT's checkpoint of a Hugging Face folder; `what: train` trains on rows of token ids.
"""

import contextlib
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import job_io
import lightning as L
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune.lora import fit, get_lr_scheduler
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.utils import load_checkpoint
from torch.utils.data import DataLoader

NAME = "SmolLM2-135M-Instruct"


def convert(job: dict[str, Any]) -> dict[str, Any]:
    folder = Path(job["checkpoint"])
    shutil.copytree(job["model"], folder, dirs_exist_ok=True)
    convert_hf_checkpoint(folder, model_name=NAME, dtype="bfloat16")
    return {}


PRECISION = {"bfloat16": "bf16-true", "float32": "32-true"}


class Clock(torch.optim.AdamW):
    """AdamW that notes when each step ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ends: list[float] = []

    def step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().step(*args, **kwargs)
        self.ends.append(time.perf_counter())
        return result


def samples(rows: list[list[int]]) -> list[dict[str, Any]]:
    ids = [torch.tensor(row) for row in rows]
    counts = [{"raw": len(row), "raw_plus_prompt_template": len(row)} for row in rows]
    return [{"input_ids": i, "labels": i.clone(), "token_counts": c} for i, c in zip(ids, counts, strict=True)]


def train(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    micro, rows_a_step = job["batch_rows"], job["rows_a_step"]
    warmup, rows = job["rows"][:rows_a_step], job["rows"]
    steps = len(rows) // rows_a_step
    assert steps * rows_a_step == len(rows), "LitGPT's steps are whole"
    where = dict.fromkeys(("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp"), True)
    checkpoint = Path(job["checkpoint"])
    config = Config.from_file(
        checkpoint / "model_config.yaml", lora_r=job["r"], lora_alpha=job["lora_alpha"], lora_dropout=0.0, **where
    )
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=PRECISION[job["dtype"]])
    fabric.seed_everything(job["seed"])
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    clock = Clock([p for p in model.parameters() if p.requires_grad], lr=job["learning_rate"])
    optimizer = fabric.setup_optimizers(clock)
    load_checkpoint(fabric, model, checkpoint / "lit_model.pth", strict=False)
    loader = DataLoader(samples(warmup + rows), batch_size=micro, collate_fn=get_sft_collate_fn())
    some = DataLoader(samples(rows[:1]), batch_size=1, collate_fn=get_sft_collate_fn())  # `fit` validates first
    began = time.perf_counter()
    fit(
        fabric=fabric, model=model, optimizer=optimizer, scheduler=get_lr_scheduler(optimizer, 1, steps + 2),
        train_dataloader=loader, val_dataloader=some, devices=1, checkpoint_dir=checkpoint, out_dir=folder,
        train=TrainArgs(
            save_interval=None, log_interval=10**9, global_batch_size=rows_a_step, micro_batch_size=micro,
            lr_warmup_steps=1, epochs=2, max_steps=steps + 1,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False), data=None,
    )  # fmt: skip
    return {
        "seconds": clock.ends[-1] - clock.ends[0],
        "warmup_seconds": clock.ends[0] - began,
        "steps": steps,
        "rows": len(rows),
        "tokens": sum(map(len, rows)),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "threads": torch.get_num_threads(),
        "versions": job_io.versions("litgpt", "lightning", "torch"),
    }


if __name__ == "__main__":
    job = job_io.read()
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        result = convert(job) if job["what"] == "convert" else train(job, Path(folder))
    job_io.answer(result)
