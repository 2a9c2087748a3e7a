"""From the data section of a recipe to examples: read, render, hold out, account for every row."""

import hashlib
import random
from array import array
from dataclasses import dataclass, field
from typing import Any, Self

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
    train = _Part.read(config.train if train_rows is None else train_rows, renderer, config)
    parts = {"train": train}
    if eval_rows is not None or isinstance(config.eval, str | list):
        parts["eval"] = _Part.read(config.eval if eval_rows is None else eval_rows, renderer, config)
    elif config.eval:
        parts["train"], parts["eval"] = train.hold_out(config.eval, seed)
    held = parts.get("eval", _Part(""))
    ledgers = {name: part.ledger() for name, part in parts.items()}
    return Prepared(parts["train"].examples, parts["train"].rows, held.examples, held.rows, ledgers)


@dataclass
class _Part:
    """The good rows of a source, their examples, and the rows that can't be used."""

    source: str
    rows: list[Row] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    @classmethod
    def read(cls, source: Any, renderer: Renderer, config: DataConfig) -> Self:
        paths = [source] if isinstance(source, str) else [item for item in source if isinstance(item, str)]
        part = cls(", ".join(paths) or f"{len(source)} rows")
        for row in read_rows(source):
            outcome = row if isinstance(row, Rejected) else renderer.example(row, config.max_length)
            if isinstance(outcome, Rejected):
                part.rejected.append(outcome)
            elif isinstance(row, Row):
                part.rows.append(row)
                part.examples.append(outcome)
        part.ledger().check(config.max_rejected)
        return part

    def hold_out(self, share: float, seed: int) -> tuple[Self, Self]:
        """Takes `share` of the good rows out of training, at least one; the same ones for the same seed."""
        total = len(self.rows)
        count = max(1, round(share * total))
        if count >= total:
            what = f"has {total} usable rows, too few to hold out {share:g} of them"
            raise DataError(self.source, what, "set data.eval: 0")
        held = set(random.Random(seed).sample(range(total), count))
        kept = [i for i in range(total) if i not in held]
        return self._pick(kept, self.rejected), self._pick(sorted(held), [])

    def _pick(self, places: list[int], rejected: list[Rejected]) -> Self:
        rows, examples = [self.rows[i] for i in places], [self.examples[i] for i in places]
        return type(self)(self.source, rows, examples, rejected)

    def ledger(self) -> Ledger:
        ledger = Ledger(self.source)
        for example in self.examples:
            ledger.enter(example)
        for rejected in self.rejected:
            ledger.enter(rejected)
        return ledger
