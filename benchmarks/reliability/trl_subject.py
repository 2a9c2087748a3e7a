"""The same fine-tune by TRL's SFTTrainer with PEFT, saved and resumed as transformers' documentation says it."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked
import torch
import transformers.models.phi3.modeling_phi3  # noqa: F401 (loaded before the forks)
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from subject import SAVED_EVERY, STEPS, Subject, write_chats
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

HELD_OUT = 4
LOSSES = ("loss", "eval_loss")
LOGGED = "logged.txt"


class TrlSubject(Subject):
    """The model, the chats, steps, intervals and rank are ours; the adapter is on Phi-3's fused projection."""

    def write(self) -> None:
        write_chats(self.folder)

    def start(
        self, out: Path, said: Path, resume: bool = False, before: Callable[[], None] = lambda: None
    ) -> forked.Run:
        return forked.start(partial(train, self.model, self.folder / "chats.jsonl", out, resume), said, before)

    def save(self) -> tuple[Any, str]:
        return SFTTrainer, "_save_checkpoint"

    def digests(self, run: Path) -> dict[str, str]:
        """sha256 of the final adapter and of the optimiser's tensors; and the losses by step."""
        last = run / f"checkpoint-{STEPS}"
        adapter = hashlib.sha256((run / "adapter_model.safetensors").read_bytes()).hexdigest()
        log = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        losses = [(line["step"], name, line[name]) for line in log for name in LOSSES if name in line]
        return {"adapter": adapter, "optimizer": tensors_digest(last / "optimizer.pt"), "losses": str(losses)}

    def logged(self, run: Path) -> int:
        path = run / LOGGED
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        steps = text[: text.rfind("\n") + 1].split()
        return int(steps[-1]) if steps else 0

    def resumable(self, run: Path) -> int:
        """The step of the checkpoint that a resumption takes, whole or not; 0 where there is none."""
        last = last_checkpoint(run)
        return int(last.rpartition("-")[2]) if last else 0


class Logged(TrainerCallback):
    """Writes the steps that are logged."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with (Path(args.output_dir) / LOGGED).open("a", encoding="utf-8") as file:
            file.write(f"{state.global_step}\n")


def train(model: str, chats: Path, out: Path, resume: bool) -> None:
    disable_progress_bars()
    rows = [json.loads(line) for line in chats.read_text(encoding="utf-8").splitlines()]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list(rows[:-HELD_OUT]),
        eval_dataset=Dataset.from_list(rows[-HELD_OUT:]),
        peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules=["qkv_proj"], task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=str(out),
            learning_rate=1e-3,
            max_steps=STEPS,
            per_device_train_batch_size=6,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=SAVED_EVERY,
            save_strategy="steps",
            save_steps=SAVED_EVERY,
            save_total_limit=2,
            seed=6,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        ),
        callbacks=[Logged()],
    )
    trainer.train(resume_from_checkpoint=resume and last_checkpoint(out) is not None)
    trainer.save_model()


def last_checkpoint(run: Path) -> str | None:
    return get_last_checkpoint(str(run)) if run.is_dir() else None


def tensors_digest(file: Path) -> str:
    """Of all that an optimizer.pt of a run of ours holds: a pickle's bytes may differ where its tensors don't."""
    digest = hashlib.sha256()

    def add(held: Any) -> None:
        if isinstance(held, torch.Tensor):
            digest.update(f"{held.dtype} {tuple(held.shape)} ".encode() + held.numpy().tobytes())
        elif isinstance(held, dict):
            for name in sorted(held, key=str):
                digest.update(f"{name}: ".encode())
                add(held[name])
        elif isinstance(held, list | tuple):
            for part in held:
                add(part)
        else:
            digest.update(f"{held!r} ".encode())

    add(torch.load(file, weights_only=True))
    return digest.hexdigest()
