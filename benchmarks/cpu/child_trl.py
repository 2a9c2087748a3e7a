"""A run of `trl.SFTTrainer` with PEFT, in TRL's own environment: rows' real tokens a second, warm-up apart.

The rows come as token ids, so that nothing but training is timed.  All tokens are supervised.  `accelerate` gives the
model to phinetune first, and `loss: phinetune` takes its loss.
"""

import contextlib
import sys
import tempfile
import time
from typing import Any

import job_io
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class OwnLossTrainer(SFTTrainer):
    """transformers' loss (whole logits) in place of TRL's head, which has no fast form off a GPU."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)


def trainer_class(loss: str) -> type[SFTTrainer]:
    if loss == "transformers":
        return OwnLossTrainer
    if loss == "phinetune":
        from phinetune.trl import ModelLoss

        return type("LeanTrainer", (ModelLoss, SFTTrainer), {})
    return SFTTrainer


class Clock(TrainerCallback):
    """Seconds of each step.  The warm-up is whole steps on the first rows, with their updates, as ours is."""

    def __init__(self, warmup_steps: int) -> None:
        self.trainer: Any = None
        self.warmup_steps, self.warmup = warmup_steps, 0.0
        self.ends: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        for _ in range(self.warmup_steps):
            self.step(args)
        self.ends.append(time.perf_counter())
        self.warmup = self.ends[0] - begin

    def step(self, args: Any) -> None:
        """What the trainer's loop makes of a step's batches."""
        trainer, size, count = self.trainer, args.per_device_train_batch_size, args.gradient_accumulation_steps
        rows = [trainer.train_dataset[row] for row in range(min(size * count, len(trainer.train_dataset)))]
        each = (trainer.data_collator(rows[start : start + size]) for start in range(0, len(rows), size))
        batches, items = trainer.get_batch_samples(each, count, args.device)
        trainer.current_gradient_accumulation_steps = len(batches)
        for batch in batches:
            trainer.training_step(trainer.model_wrapped, batch, num_items_in_batch=items)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def train(job: dict[str, Any], folder: str) -> dict[str, Any]:
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
    model: Any = job["model"]
    settings = {"output_dir": folder, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    settings |= {"logging_steps": 1, "num_train_epochs": 1, "learning_rate": job["learning_rate"], "seed": job["seed"]}
    if not job["default"]:
        dtype = getattr(torch, job["dtype"])
        model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=job["attention"])
        if job.get("accelerate"):
            import phinetune

            phinetune.accelerate(model)
        settings |= {
            "bf16": job["autocast"],
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 1 if job["layout"] == "packed" else job["batch_rows"],
            "gradient_accumulation_steps": job["accumulation"],
            "train_sampling_strategy": "sequential",  # the rows come in the order in which they are to be taken
            "lr_scheduler_type": "constant",
            "packing": job["layout"] == "packed",
            "padding_free": job["layout"] == "padding_free",
            "max_length": job["pack_tokens"] if job["layout"] == "packed" else None,
        }
    clock = Clock(job["warmup_steps"])
    trainer = trainer_class(job["loss"])(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_dict({"input_ids": job["rows"]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=job["r"],
            lora_alpha=job["lora_alpha"],
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[clock],
    )
    clock.trainer = trainer
    outcome = trainer.train()
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "seconds": clock.ends[-1] - clock.ends[0],
        "warmup_seconds": clock.warmup,
        "steps": len(clock.ends) - 1,
        "rows": len(job["rows"]),
        "tokens": sum(map(len, job["rows"])),
        "loss": outcome.training_loss,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "trainable": parameters,
        "threads": torch.get_num_threads(),
        "versions": job_io.versions("torch", "transformers", "peft", "trl", "accelerate"),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):  # trainers print; the last line of stdout is the result
            result = train(job_io.read(), folder)
        job_io.answer(result)
