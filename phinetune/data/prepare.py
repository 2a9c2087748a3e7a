"""From the data section of a recipe to examples: read, render, hold out, account for every row."""

import hashlib
import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from phinetune.data.ledger import Ledger
from phinetune.data.render import Example, Renderer
from phinetune.data.sources import Rejected, Row, read_rows
from phinetune.errors import DataError
from phinetune.recipe import DataConfig


@dataclass(frozen=True)
class Prepared:
    """Examples to train on and to hold out, the rows they come from, and both ledgers."""

    train: list[Example]
    train_rows: list[Row]
    eval: list[Example]
    eval_rows: list[Row]
    ledgers: dict[str, Ledger]

    @property
    def fingerprint(self) -> str:
        """sha256 of what is trained on, token by token: a resumed run must see the same."""
        digest = hashlib.sha256()
        for example in self.train:
            digest.update(array("q", [len(example.ids), *example.ids, *example.mask]).tobytes())
        return digest.hexdigest()


def prepare(
    config: DataConfig,
    tokenizer: Any,
    seed: int,
    train_rows: list[Any] | None = None,
    eval_rows: list[Any] | None = None,
) -> Prepared:
    """Reads and tokenises what the recipe asks for; rows given from Python take the place of its files.

    Raises:
        DataError: if files can't be read, or a larger share of rows than `max_rejected` can't be used.
    """
    renderer = Renderer(tokenizer, config.supervise)
    train_said, train_read = _read(config.train if train_rows is None else train_rows)
    eval_said: str = train_said
    eval_read: list[Row | Rejected] = []
    if eval_rows is not None or isinstance(config.eval, str | list):
        eval_said, eval_read = _read(config.eval if eval_rows is None else eval_rows)
    elif config.eval:
        train_read, eval_read = _hold_out(train_read, config.eval, seed, train_said)

    ledgers = {"train": Ledger(train_said)}
    if eval_read:
        ledgers["eval"] = Ledger(eval_said)
    train_rows, train = _render(train_read, renderer, config.max_length, ledgers["train"])
    held_rows, held_out = _render(eval_read, renderer, config.max_length, ledgers.get("eval", Ledger("")))
    for ledger in ledgers.values():
        ledger.check(config.max_rejected)
    return Prepared(train, train_rows, held_out, held_rows, ledgers)


def _read(source: Any) -> tuple[str, list[Row | Rejected]]:
    """How to name a source, and what it holds."""
    if isinstance(source, str):
        return source, list(read_rows(source))
    if source and all(isinstance(item, str) for item in source):
        return ", ".join(source), list(read_rows(source))
    return f"{len(source)} rows", list(read_rows(source))


def _render(
    read: Iterable[Row | Rejected], renderer: Renderer, max_length: int, ledger: Ledger
) -> tuple[list[Row], list[Example]]:
    """The rows that can be used and their examples; every row's fate is entered in the ledger."""
    rows: list[Row] = []
    examples: list[Example] = []
    for row in read:
        outcome = row if isinstance(row, Rejected) else renderer.example(row, max_length)
        ledger.enter(outcome)
        if isinstance(row, Row) and isinstance(outcome, Example):
            rows.append(row)
            examples.append(outcome)
    return rows, examples


def _hold_out(
    read: list[Row | Rejected], share: float, seed: int, said: str
) -> tuple[list[Row | Rejected], list[Row | Rejected]]:
    """Takes `share` of the good rows out of training, at least one; the same ones for the same seed."""
    good = [index for index, row in enumerate(read) if isinstance(row, Row)]
    count = max(1, round(share * len(good)))
    if count >= len(good):
        raise DataError(said, f"has {len(good)} usable rows, too few to hold out {share:g} of them", "set data.eval: 0")
    held = set(random.Random(seed).sample(good, count))
    return [row for i, row in enumerate(read) if i not in held], [read[i] for i in sorted(held)]
