"""The rows that all contenders train on, as token ids of our renderer, every token supervised."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "alpaca_en_demo.json"  # absent on most machines
SHIPPED = "phinetune:orders/train"

Ids = list[int]


@dataclass(frozen=True)
class Rows:
    """Rows of the data's whole spread of lengths.

    `batches` are groups of rows of nearly one length, what a sampler that groups by length makes of the whole data:
    the least padding that a padding trainer can have.  `shuffled` are the same rows in no order.
    """

    batches: list[list[Ids]]
    shuffled: list[Ids]
    source: str

    @property
    def grouped(self) -> list[Ids]:
        return [row for batch in self.batches for row in batch]

    def some(self, count: int) -> list[Ids]:
        """Fewer rows of the same spread, for what is too slow for all of them."""
        by_length = sorted(self.shuffled, key=len)
        places = [(2 * i + 1) * len(by_length) // (2 * count) for i in range(count)]
        chosen = [by_length[place] for place in places]
        random.Random(0).shuffle(chosen)
        return chosen


def all_rows(max_length: int = 1024) -> tuple[list[Ids], str]:
    """Every row of the data, and the data's name."""
    from phinetune.data import prepare
    from phinetune.model import load_tokenizer
    from phinetune.recipe import DataConfig, ModelKwargs

    source = str(REAL) if REAL.is_file() else SHIPPED
    settings: dict[str, Any] = {"supervise": "all", "max_length": max_length, "num_proc": 1}
    examples = prepare(DataConfig(train=source, **settings), load_tokenizer("smollm2", ModelKwargs()), 0).train
    return [[int(i) for i in example.ids] for example in examples], Path(source).name


def draw_rows(count: int, batch_rows: int, seed: int = 0) -> Rows:
    """`count` rows in batches of `batch_rows`, spread evenly over the data sorted by length."""
    rows, source = all_rows()
    rng = random.Random(seed)
    rng.shuffle(rows)
    by_length = sorted(rows, key=len)
    number = min(count, len(rows)) // batch_rows
    starts = [(2 * i + 1) * (len(rows) - batch_rows) // (2 * number) for i in range(number)]
    batches = [by_length[start : start + batch_rows] for start in starts]
    rng.shuffle(batches)
    shuffled = [row for batch in batches for row in batch]
    rng.shuffle(shuffled)
    return Rows(batches, shuffled, source)
