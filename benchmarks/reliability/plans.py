"""What `phinetune plan` says beside what the run then takes: peak memory and seconds a step, on five recipes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS = 4


def plans(folder: Path, phi3: bool = True) -> dict[str, Any]:
    """`phi3`: also the model of 3.8 billion parameters, with random weights (8 GB on disk, 16 GB of memory)."""
    table = []
    for name, recipe in recipes(folder, phi3):
        said = json.loads(phinetune("plan", str(recipe), "--json"))
        phinetune("train", str(recipe))
        run = recipe.with_suffix("")
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        before = [0, *(line["tokens"] for line in lines[:-1])]
        seconds = [(b["tokens"] - a) / b["tokens_per_second"] for a, b in zip(before, lines, strict=True)]
        mean = sum(seconds) / len(seconds)
        row = {
            "recipe": name,
            "peak_gb": [said["peak_gb"], summary["peak_gb"]],
            "seconds_a_step": [said["seconds_a_step"], round(mean, 3)],
            "peak_error": round(said["peak_gb"] / summary["peak_gb"] - 1, 3),
            "time_error": round(said["seconds_a_step"] / mean - 1, 3),
            "recomputed_layers": said["recomputed_layers"],
        }
        print(json.dumps(row), flush=True)
        table.append(row)
    return {
        "plan": table,
        "plan_worst_error": max(abs(row["peak_error"]) for row in table),
        "plan_worst_time_error": max(abs(row["time_error"]) for row in table),
    }


def recipes(folder: Path, phi3: bool) -> Iterator[tuple[str, Path]]:
    short, long = write_rows(folder / "short.jsonl", 12, 24), write_rows(folder / "long.jsonl", 96, 24)
    for data, tokens, rows in ((short, 512, 4), (long, 4096, 1)):
        for checkpointing in (False, True):
            name = f"SmolLM2-135M, bf16, rows of {tokens:,} tokens" + (", gradient checkpointing" * checkpointing)
            yield (
                name,
                write_recipe(folder, f"smollm2-{tokens}-{checkpointing}", "smollm2", data, tokens, checkpointing, rows),
            )
    if phi3:
        model = folder / "phi3-mini"
        subprocess.run([sys.executable, __file__, str(model)], check=True)
        data = write_rows(folder / "middle.jsonl", 46, 6)
        yield (
            "Phi-3-mini, random weights, bf16, a row of 2,048 tokens",
            write_recipe(folder, "phi3-mini-2048", str(model), data, 2048, False, 1),
        )


def write_rows(path: Path, turns: int, count: int) -> Path:
    """Long chats: orders of the shipped example one after the other."""
    from importlib import resources

    shipped = resources.files("phinetune.data.shipped") / "orders.train.jsonl"
    chats = [json.loads(line)["messages"] for line in shipped.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for row in range(count):
            some = [chats[(row * turns + turn) % len(chats)] for turn in range(turns)]
            messages = [message for chat in some for message in chat if message["role"] != "system"]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def write_recipe(folder: Path, name: str, model: str, data: Path, tokens: int, checkpointing: bool, rows: int) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(
        f"""
model: {model}
model_kwargs: {{dtype: bfloat16}}
data: {{train: {data}, max_length: {tokens}, excess_length_strategy: truncate, max_batch_tokens: {tokens}}}
training_config:
  output_dir: {folder / name}
  max_steps: {STEPS}
  per_device_train_batch_size: {rows}
  logging_steps: 1
  disable_tqdm: true
  use_cpu: true
  gradient_checkpointing: {str(checkpointing).lower()}
peft_config: {{r: 16, target_modules: all-linear}}
""",
        encoding="utf-8",
    )
    return path


def phinetune(*arguments: str) -> str:
    ran = subprocess.run([sys.executable, "-m", "phinetune", *arguments], capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise RuntimeError(f"phinetune {' '.join(arguments)}: {ran.stderr[-2000:]}")
    return ran.stdout


def make_phi3(folder: Path) -> None:
    """Phi-3-mini-4k at full size, with random weights and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Phi3Config

    from phinetune.model import load_tokenizer
    from phinetune.recipe import ModelKwargs

    torch.manual_seed(0)
    tokenizer = load_tokenizer("smollm2", ModelKwargs())
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = AutoModelForCausalLM.from_config(Phi3Config(vocab_size=len(tokenizer), **ids), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make_phi3(Path(sys.argv[1]))
