"""From the data section of a recipe to examples: read, render, hold out, account for every row."""

import datetime
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from phinetune.data.encode import tokenizer_json
from phinetune.data.example import PARTS
from phinetune.data.findings import Finding
from phinetune.data.formats import Rejected
from phinetune.data.ledger import SHOWN, Ledger, histogram
from phinetune.data.sources import DataFile, describe, open_sources
from phinetune.data.store import Examples, Rows, Store
from phinetune.data.template import ChatTemplate, writes_date
from phinetune.data.tokenise import tokenised
from phinetune.data.worker import Task
from phinetune.errors import DataError
from phinetune.recipe import DataConfig


@dataclass(frozen=True)
class Prepared:
    """Examples to train on and to hold out, the rows they come from, both ledgers, and every row left out.

    `weights` are how often an epoch holds each training example; None where each stands once.
    """

    train: Examples
    train_rows: Rows
    eval: Examples
    eval_rows: Rows
    ledgers: dict[str, Ledger]
    parts: tuple["Part", ...]
    weights: Any = None

    @property
    def fingerprint(self) -> str:
        """sha256 of what is trained on, token by token: a resumed run must see the same."""
        return _digest(self.train, self.weights)

    @property
    def held_out_fingerprint(self) -> str:
        """sha256 of what is held out: evaluations of other rows aren't compared."""
        return _digest(self.eval)

    def rejected(self) -> Iterator[Rejected]:
        """Every row left out, with the reason."""
        return itertools.chain.from_iterable(part.left_out() for part in self.parts)


def _digest(examples: Examples, weights: Any = None) -> str:
    digest = hashlib.sha256(examples.store.digest.encode())
    digest.update(np.asarray(examples.indices, np.int64).tobytes())
    if weights is not None:
        digest.update(weights.tobytes())
    return digest.hexdigest()


def prepare(
    config: DataConfig,
    tokenizer: Any,
    seed: int,
    train_rows: Iterable[Any] | None = None,
    eval_rows: Iterable[Any] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Prepared:
    """Reads and tokenises what the recipe asks for; rows given from Python take the place of its files.

    Raises:
        DataError: if files can't be read, or a larger share of rows than `max_rejected` can't be used.
    """
    train = _read(config.train, train_rows, tokenizer, config, on_progress)
    if eval_rows is not None or not isinstance(config.eval, float | int | None):
        held = _read(config.eval, eval_rows, tokenizer, config, on_progress)
    else:
        held = train.hold_out(config.eval or 0, seed)
    train.leave_out(np.isin(train.store.hash, held.store.hash[held.rows]), Finding.HELD_OUT, config.held_out_in_train)
    ledgers = {"train": train.ledger(), **({"eval": held.ledger()} if len(held.rows) or held.rejected else {})}
    for ledger in ledgers.values():
        ledger.check(config.max_rejected)
    weights = np.array([file.weight for file in train.files])[train.examples.files]
    return Prepared(
        train.examples,
        Rows(train.store, train.rows),
        held.examples,
        Rows(held.store, held.rows),
        ledgers,
        (train, held),
        weights if (weights != 1).any() else None,
    )


def task_of(files: list[DataFile], tokenizer: Any, config: DataConfig) -> Task:
    """What the workers must know to tokenise some files."""
    files = [
        replace(
            file,
            format=config.format if file.format == "auto" else file.format,
            columns=config.columns if file.columns is None else file.columns,
        )
        for file in files
    ]
    if config.today is None and writes_date(tokenizer):
        config = config.model_copy(update={"today": datetime.date.today().isoformat()})
    template = ChatTemplate.of(tokenizer, config.chat_template_kwargs, config.today)
    return Task(files, template, tokenizer_json(tokenizer), tokenizer.eos_token or "", config)


def _read(
    source: Any, rows: Iterable[Any] | None, tokenizer: Any, config: DataConfig, on_progress: Callable[[int], None]
) -> "Part":
    with open_sources(source, rows) as files:
        task = task_of(files, tokenizer, config)
        part = Part(describe(files), list(task.files), tokenised(task, on_progress))
    part.leave_out(part.is_duplicate(), Finding.DUPLICATE, config.duplicates)
    part.ledger().check(config.max_rejected)
    return part


class Part:
    """The rows of a source that are used, and what became of the others."""

    def __init__(self, source: str, files: list[DataFile], store: Store, rows: Any = None) -> None:
        self.source, self.files, self.store = source, files, store
        self.rows = np.arange(len(store.number)) if rows is None else rows
        self.rejected = store.rejected if rows is None else 0  # those of a held-out share are in the other part
        self.formats = store.formats if rows is None else {}
        self.held_out = 0
        self.dropped: dict[Finding, Any] = {}
        self.kept: dict[Finding, Any] = {}

    @property
    def examples(self) -> Examples:
        mine = np.zeros(len(self.store.number), bool)
        mine[self.rows] = True
        return Examples(self.store, mine[self.store.row_of_example].nonzero()[0])

    def is_duplicate(self) -> Any:
        """For each row of the store, whether it stands in it before."""
        first = np.unique(self.store.hash, return_index=True)[1]
        duplicate = np.ones(len(self.store.hash), bool)
        duplicate[first] = False
        return duplicate

    def leave_out(self, which: Any, finding: Finding, policy: str) -> None:
        """Applies a policy to some rows of the store (a bool for each)."""
        found = self.rows[which[self.rows]]
        if not len(found):
            return
        if policy == "raise":
            places = ", ".join(self.store.where(row) for row in found[:5])
            name = "duplicates" if finding is Finding.DUPLICATE else "held_out_in_train"
            what = f"{len(found):,} rows {finding.words} ({places}{' …' if len(found) > 5 else ''})"
            raise DataError(self.source, what, f"remove them, or set data.{name}")
        if policy == "drop":
            self.dropped[finding] = found
            self.rows = self.rows[~which[self.rows]]
        else:
            self.kept[finding] = found

    def hold_out(self, share: float, seed: int) -> "Part":
        """Takes `share` of the rows out, at least one where it isn't 0; the same ones for the same seed."""
        total = len(self.rows)
        count = max(1, round(share * total)) if share else 0
        if count and count >= total:
            what = f"has {total} usable rows, too few to hold out {share:g} of them"
            raise DataError(self.source, what, "set data.eval: 0")
        held = np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(total)[:count])
        part = Part(self.source, self.files, self.store, self.rows[held])
        self.rows = np.delete(self.rows, held)
        self.held_out = count
        return part

    def left_out(self) -> Iterator[Rejected]:
        """Every row that isn't used, and why."""
        if self.rejected:
            yield from self.store.rejections()
        for finding, rows in self.dropped.items():
            for row in rows:
                held = self.store.row(int(row))
                yield Rejected(held.where, finding.words.replace("stand", "stands").replace("are", "is"), held.raw)

    def ledger(self) -> Ledger:
        examples = self.examples
        lengths = examples.lengths
        parts = self.store.parts[examples.indices].sum(0, dtype=np.int64)
        return Ledger(
            self.source,
            used=len(self.rows),
            held_out=self.held_out,
            dropped={finding.words: len(rows) for finding, rows in self.dropped.items()},
            rejected=self.rejected,
            examples=len(examples),
            tokens=int(lengths.sum()),
            supervised=int(examples.supervised.sum()),
            longest=int(lengths.max(initial=0)),
            histogram=histogram(lengths),
            parts=dict(zip(PARTS, parts.tolist(), strict=True)),
            formats=self.formats,
            findings=self._findings(),
            first_rejected=list(itertools.islice(self.store.rejections(), SHOWN)) if self.rejected else [],
        )

    def _findings(self) -> dict[Finding, tuple[int, list[str]]]:
        flags = self.store.findings[self.rows]
        found = {finding: self.rows[(flags & np.uint32(finding)) > 0] for finding in Finding} | self.kept
        return {
            finding: (len(rows), [self.store.where(row) for row in rows[:5]])
            for finding, rows in found.items()
            if len(rows)
        }
