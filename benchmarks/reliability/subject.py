"""What the trials run: a small fine-tune with dropout, several flat batches a step, evaluations and checkpoints."""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import forked

STEPS, SAVED_EVERY = 12, 3
COMPARED = (
    "adapter_model.safetensors",
    *(f"checkpoint-{STEPS}/{name}.safetensors" for name in ("parameters", "optimizer")),
)


@dataclass
class Subject:
    """A fine-tune by the command line, how its uninterrupted run ends, and how long that takes."""

    folder: Path
    model: str
    whole: dict[str, str] = field(init=False)
    seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.write()
        for name in ("first", "whole"):  # the first fills caches
            begin = time.monotonic()
            run = self.start(self.folder / name, self.folder / f"{name}.txt")
            assert run.wait() == 0, run.text()
            self.seconds = time.monotonic() - begin
        self.whole = self.digests(self.folder / "whole")
        assert self.whole == self.digests(self.folder / "first"), "two runs of the same recipe end in the same bytes"

    def write(self) -> None:
        write_recipe(self.folder, self.model)

    def start(
        self, out: Path, said: Path, resume: bool = False, before: Callable[[], None] = lambda: None
    ) -> forked.Run:
        arguments = ["train", str(self.folder / "recipe.yaml"), f"output_dir={out}", *["--resume"] * resume]
        return forked.start(partial(phinetune, arguments), said, before)

    def save(self) -> tuple[Any, str]:
        """Where the function that writes a checkpoint is held, and its name."""
        return forked.module("phinetune.train.loop"), "save_checkpoint"

    def digests(self, run: Path) -> dict[str, str]:
        """sha256 of the final adapter, of what trained and of the optimiser; and of metrics.jsonl without the speed."""
        found = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in COMPARED}
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        kept = [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]
        return {**found, "metrics": hashlib.sha256(json.dumps(kept).encode()).hexdigest()}

    def logged(self, run: Path) -> int:
        """The last step that the run has logged."""
        path = run / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        steps = [json.loads(line)["step"] for line in text[: text.rfind("\n") + 1].splitlines()]
        return max(steps, default=0)

    def resumable(self, run: Path) -> int:
        """The step of the newest checkpoint that is whole, 0 where there is none."""
        checkpoint = forked.module("phinetune.train.checkpoint")
        steps = [
            int(p.name.rpartition("-")[2]) for p in checkpoint.list_checkpoints(run) if not checkpoint.find_fault(p)
        ]
        return max(steps, default=0)


def phinetune(arguments: list[str]) -> None:
    """`phinetune ARGUMENTS`."""
    from phinetune.cli import main

    sys.argv = ["phinetune", *arguments]
    main()


def write_chats(folder: Path) -> Path:
    """40 of them."""
    rows = [
        {
            "messages": [
                {"role": "system", "content": "You add numbers."},
                {"role": "user", "content": f"What is {i} plus {i * 3 % 17}?"},
                {"role": "assistant", "content": f"{i} plus {i * 3 % 17} is {i + i * 3 % 17}." + " Indeed." * (i % 5)},
            ]
        }
        for i in range(40)
    ]
    data = folder / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return data


def write_recipe(folder: Path, model: str) -> None:
    """4 of the chats held out; 4 a step in several flat batches."""
    (folder / "recipe.yaml").write_text(
        f"""
model: {model}
data: {{train: {write_chats(folder)}, eval: 0.1, max_batch_tokens: 96}}
training_config:
  learning_rate: 1.0e-3
  max_steps: {STEPS}
  per_device_train_batch_size: 4
  logging_steps: 1
  eval_strategy: steps
  eval_steps: {SAVED_EVERY}
  save_strategy: steps
  save_steps: {SAVED_EVERY}
  disable_tqdm: true
  use_cpu: true
peft_config: {{r: 4, lora_dropout: 0.1, target_modules: [q_proj, v_proj]}}
""",
        encoding="utf-8",
    )


def leftovers(run: Path) -> list[str]:
    """Temporary files and folders."""
    return [str(path) for path in run.rglob(".tmp-*")]
