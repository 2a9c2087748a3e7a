"""Preparing chats for training: ours beside `trl.SFTTrainer`'s, in one interleaved run with cold caches.

    python benchmarks/data.py [--rows 100000] [--rounds 3] [--peer-python .venv-trl/bin/python] [--check-gb 5]

Every figure is of a process of its own, timed inside it behind its imports: for TRL the making of an SFTTrainer of a
two-layer model around a data set that is already loaded, for ours all of `prepare`, the file's reading included.  The
rows are drawn from English sentences, with names, numbers and words that occur once strewn in, all rows distinct.
Memory is the peak of anonymous plus shared memory over the process tree.  Results, with the machine:
benchmarks/results/data.json.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).parents[1]
RESULTS = record.RESULTS / "data.json"
RESUME_ROW = 1_000_000
LETTERS = "aeiou", "bcdfghklmnprstvw"


def draw_rows(count: int, seed: int, sentences_an_answer: int = 8) -> Iterator[dict[str, Any]]:
    """Distinct chats of about 200 tokens at eight sentences an answer."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics))
    sentences = [s.strip() for s in re.split(r"(?<=[.:?!])\s+", text) if 20 < len(s) < 160 and "\n\n" not in s]
    rng = random.Random(seed)

    def rare() -> str:
        if rng.random() < 0.4:
            return str(rng.randrange(10**6))
        return "".join(rng.choice(LETTERS[i % 2]) for i in range(rng.randint(4, 9))).capitalize()

    def paragraph(size: int) -> str:
        words = " ".join(rng.choices(sentences, k=size)).split(" ")
        return " ".join(rare() if rng.random() < 0.05 else word for word in words)

    for number in range(count):
        question = f"{rare()} {number}: {paragraph(1)}"
        yield {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": paragraph(rng.randint(2, 2 * sentences_an_answer - 4))},
            ]
        }


def write_rows(path: Path, count: int, seed: int = 0, sentences_an_answer: int = 8) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in draw_rows(count, seed, sentences_an_answer):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# What each process does; its last line of output is a JSON object.


def run_ours(rows: Path, cache: Path) -> dict[str, Any]:
    from phinetune.data import prepare, tokenise
    from phinetune.machine.memory import MemoryPeak
    from phinetune.recipe import DataConfig

    tokenizer = smollm2()
    tokenise.cache_folder = lambda: cache
    with MemoryPeak() as memory:
        begin = time.perf_counter()
        prepared = prepare(DataConfig(train=str(rows), max_length=1024, max_rejected=1.0), tokenizer, seed=0)
        seconds = time.perf_counter() - begin
        ledger = prepared.ledgers["train"]
        return {"seconds": seconds, "gb": memory.gb, "rows": ledger.used, "tokens": ledger.tokens}


def run_resume(rows: Path, cache: Path) -> dict[str, Any]:
    """From the call of `prepare` on data that is in the cache to the rows of a step in the middle."""
    from phinetune.data import Plan, flatten, prepare, tokenise
    from phinetune.recipe import DataConfig, TrainingConfig

    tokenizer = smollm2()
    tokenise.cache_folder = lambda: cache
    config = TrainingConfig(per_device_train_batch_size=4, num_train_epochs=1)
    seconds = {}
    for packing in (False, True):
        begin = time.perf_counter()
        prepared = prepare(DataConfig(train=str(rows), max_length=1024, max_rejected=1.0), tokenizer, seed=0)
        plan = Plan(prepared.train.lengths, 0, config.model_copy(update={"packing": packing}), 1024)
        step = len(plan) * RESUME_ROW // len(prepared.train)
        batch = flatten([prepared.train[row] for row in plan[step]])
        assert batch.ids.numel() > 0
        seconds["packed" if packing else "rows"] = time.perf_counter() - begin
        prepared.fingerprint  # noqa: B018  # a resumed run asks for it too
    return {"seconds": seconds["rows"], "packed_seconds": seconds["packed"], "rows": len(prepared.train)}


def run_trl(rows: Path, cache: Path, processes: int, assistant_only: bool) -> dict[str, Any]:
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = smollm2()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    config = SFTConfig(
        output_dir=str(cache / "out"), max_length=1024, dataset_num_proc=processes, use_cpu=True, bf16=False,
        report_to="none", assistant_only_loss=assistant_only,
    )  # fmt: skip
    data = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(cache))
    begin = time.perf_counter()
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    seconds = time.perf_counter() - begin
    some = trainer.train_dataset[:1000]["input_ids"]
    return {"seconds": seconds, "rows": len(trainer.train_dataset), "tokens_of_1000": sum(map(len, some))}


def smollm2() -> Any:
    """The tokenizer, from the folder that the parent names: TRL's environment has no phinetune."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(os.environ["SMOLLM2"], local_files_only=True)


def ask(python: Path, what: str, rows: Path, cache: Path, *more: str) -> dict[str, Any]:
    command = [str(python), __file__, "--run", what, "--file", str(rows), "--cache", str(cache), *more]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if ran.returncode:
        raise RuntimeError(f"{what}: {ran.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    print(f"{what:18}", {k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}, flush=True)
    return result


def check_large(folder: Path, gb: float) -> dict[str, Any]:
    """`phinetune data check` on a file of so many GB, its rows distinct."""
    from phinetune.machine.memory import MemoryPeak

    part, whole = folder / "part.jsonl", folder / "large.jsonl"
    write_rows(part, 20_000, seed=9, sentences_an_answer=24)
    lines = part.read_bytes().splitlines(keepends=True)
    with whole.open("wb") as file:
        number = 0
        while file.tell() < gb * 1e9:
            for line in lines:  # the first word of a question is drawn anew
                file.write(line.replace(b'"content": "', b'"content": "%d ' % number, 1))
                number += 1
    with MemoryPeak() as memory:
        begin = time.perf_counter()
        command = [sys.executable, "-m", "phinetune", "data", "check", str(whole), "--json"]
        ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        seconds = time.perf_counter() - begin
        peak = memory.gb
    checked = json.loads(ran.stdout)["train"]
    assert checked["rows"] == number == checked["used"] + checked["rejected"]
    return {
        "check_gb": round(checked["bytes"] / 1e9, 2),
        "check_rows": number,
        "check_mb_per_second": round(checked["bytes"] / 1e6 / seconds, 1),
        "check_peak_gb": round(peak, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check-gb", type=float, default=5.0, help="0 leaves the large file out")
    parser.add_argument("--peer-python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--assistant-only", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run == "ours":
        print(json.dumps(run_ours(asked.file, asked.cache)))
    elif asked.run == "resume":
        print(json.dumps(run_resume(asked.file, asked.cache)))
    elif asked.run:
        print(json.dumps(run_trl(asked.file, asked.cache, asked.processes, asked.assistant_only)))
    else:
        measure(asked)


def measure(asked: argparse.Namespace) -> None:
    from phinetune.model.smollm2 import smollm2_folder

    os.environ["SMOLLM2"] = str(smollm2_folder())
    python = Path(sys.executable)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        rows = folder / "rows.jsonl"
        write_rows(rows, asked.rows)
        ours, one, two = [], [], []
        for round_ in range(asked.rounds):  # each with caches of its own, so cold ones
            ours.append(ask(python, "ours", rows, folder / f"ours-{round_}"))
            one.append(ask(asked.peer_python, "trl, 1 process", rows, folder / f"one-{round_}"))
            two.append(ask(asked.peer_python, "trl, 2 processes", rows, folder / f"two-{round_}", "--processes", "2"))
        seconds = {
            name: statistics.median(run["seconds"] for run in runs)
            for name, runs in (("ours", ours), ("trl_1_process", one), ("trl_2_processes", two))
        }
        many = folder / "many.jsonl"
        write_rows(many, RESUME_ROW + 200_000, seed=1, sentences_an_answer=3)
        ask(python, "ours", many, folder / "many")
        resumed = [ask(python, "resume", many, folder / "many") for _ in range(3)]
        result = {
            "vs_trl_prepare": round(min(seconds["trl_1_process"], seconds["trl_2_processes"]) / seconds["ours"], 2),
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "rows": ours[0]["rows"],
            "tokens": ours[0]["tokens"],
            "rounds": asked.rounds,
            "peak_gb": round(max(run["gb"] for run in ours), 3),
            "resume_s": round(statistics.median(run["seconds"] for run in resumed), 3),
            "resume_packed_s": round(statistics.median(run["packed_seconds"] for run in resumed), 3),
        }
        if asked.check_gb:
            result |= check_large(folder, asked.check_gb)
    versions = subprocess.run(
        [str(asked.peer_python), "-c", "from importlib.metadata import version as v; print(v('trl'), v('datasets'))"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    result["versions"] = {"trl": versions[0], "datasets": versions[1]}
    result["versions"] |= record.versions("phinetune", "tokenizers", "transformers")
    result["machine"] = record.machine()
    of_mutants = {key: value for key, value in record.read(RESULTS).items() if key.startswith("mutants")}
    record.write(RESULTS, {**result, **of_mutants})
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
