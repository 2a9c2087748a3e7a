"""Phi-3-mini at full size with random weights on a GPU: our training step against TRL + PEFT's, in turns.

    python benchmarks/gpu.py [--rounds 3] [--rows 32] [--length 512]

Both sides train LoRA of rank 16 on all linear layers in bfloat16 on the same rows of random tokens, without gradient
checkpointing where it fits. TRL and PEFT are taken from this environment (`pip install trl peft datasets`). Writes
benchmarks/results/gpu.json: tokens a second of each, their ratio, memory, and the versions.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "gpu.json"
R, ALPHA, LEARNING_RATE, BATCH_ROWS = 16, 32, 2e-4, 4


def make_model(attention: str) -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(attn_implementation=attention, dtype=torch.bfloat16)
    with torch.device("cuda"):
        model = Phi3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.config.use_cache = False
    return model.requires_grad_(False)


def rows_of(count: int, length: int) -> list[list[int]]:
    drawn = torch.randint(3, 32000, (count, length), generator=torch.Generator().manual_seed(1))
    return [row[: length - (i * 37) % (length // 2)].tolist() for i, row in enumerate(drawn)]  # of unequal lengths


def ours(rows: list[list[int]]) -> dict[str, Any]:
    from phinetune.data import Example
    from phinetune.model import adapt_model, attention, fast
    from phinetune.recipe import PeftConfig, TrainingConfig
    from phinetune.train.loop import training_step
    from phinetune.train.optimiser import make_optimizer

    attention.register()
    model = make_model(attention.NAME)
    fast.install(model)
    peft = PeftConfig(r=R, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
    adapt_model(model, peft, 0)
    model.train()
    optimizer = make_optimizer(model, TrainingConfig(optim="adamw_torch_fused"), peft)
    seconds = []
    for start in range(0, len(rows), BATCH_ROWS):
        examples = [
            Example(f"row {i}", ids, [True] * len(ids)) for i, ids in enumerate(rows[start : start + BATCH_ROWS])
        ]
        begin = time.perf_counter()
        training_step(
            model,
            optimizer,
            examples,
            learning_rate=LEARNING_RATE,
            max_grad_norm=1.0,
            max_batch_tokens=4096,
            seed=(0, start),
        )
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": sum(seconds[2:]), "tokens": sum(map(len, rows[2 * BATCH_ROWS :]))}


def trl(rows: list[list[int]]) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            torch.cuda.synchronize()
            ends.append(time.perf_counter())

    from tokenizers import Tokenizer, models

    words = {"<unk>": 0, "<pad>": 1, "</s>": 2}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, bf16=True, report_to="none", save_strategy="no", num_train_epochs=1, disable_tqdm=True,
            gradient_checkpointing=False, per_device_train_batch_size=BATCH_ROWS, learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", max_length=None, train_sampling_strategy="sequential",
        )  # fmt: skip
        lora = LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=make_model("sdpa"), args=settings, train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer, peft_config=lora, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return {"seconds": ends[-1] - ends[1], "tokens": sum(map(len, rows[2 * BATCH_ROWS :]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--child", choices=["ours", "trl"])
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs CUDA; on a CPU it is `make bench`")
    if asked.child:
        result = {"ours": ours, "trl": trl}[asked.child](rows_of(asked.rows, asked.length))
        print(json.dumps({**result, "gb": torch.cuda.max_memory_allocated() / 1e9}))
        return
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for _ in range(asked.rounds):
        for name, of in runs.items():
            command = [
                sys.executable,
                __file__,
                "--child",
                name,
                "--rows",
                str(asked.rows),
                "--length",
                str(asked.length),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            of.append(json.loads(done.stdout.splitlines()[-1]))
            print(name, of[-1], flush=True)
    rate = {name: [run["tokens"] / run["seconds"] for run in of] for name, of in runs.items()}
    ratios = [a / b for a, b in zip(rate["ours"], rate["trl"], strict=True)]
    found = {
        "device": torch.cuda.get_device_name(),
        "vs_trl": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "tokens_per_second": {name: round(statistics.median(of), 1) for name, of in rate.items()},
        "gb": {name: round(max(run["gb"] for run in of), 2) for name, of in runs.items()},
        "versions": {name: version(name) for name in ("phinetune", "torch", "transformers", "trl", "peft")},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
