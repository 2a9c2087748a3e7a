"""Damaged data files by the thousand: how many are read otherwise than they should be, and why.

    python benchmarks/mutants.py [--count 10000] [--seed 4]

The files come from tests/data/mutants.py, the judgement from tests/data/test_mutants.py: no crash, no hang, a place
and a reason for every row left out, counts that reconcile, every good row used.  Results: benchmarks/results/data.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import record

ROOT = Path(__file__).parents[1]
RESULTS = record.RESULTS / "data.json"
sys.path[:0] = [str(ROOT / "tests" / "data")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=4)
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"

    from mutants import mutants
    from test_mutants import explained

    from phinetune.model.load import load_tokenizer
    from phinetune.recipe import ModelKwargs

    tokenizer = load_tokenizer("smollm2", ModelKwargs())
    faults, slowest = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for mutant in mutants(asked.seed, asked.count):
            begin = time.perf_counter()
            try:
                fault = explained(mutant, Path(folder), tokenizer)
            except Exception as error:  # a crash is what is looked for
                fault = f"crashed: {type(error).__name__}: {error}"
            slowest = max(slowest, time.perf_counter() - begin)
            if fault:
                faults.append(f"{mutant.name}{mutant.suffix}: {fault[:300]}")
    print(*faults, sep="\n")
    result = {"mutants": asked.count, "mutants_unexplained": len(faults), "mutants_seed": asked.seed}
    result |= {"mutants_slowest_s": round(slowest, 1), "mutants_machine": record.machine()}
    record.merge(RESULTS, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
