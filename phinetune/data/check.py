"""What a data section holds, in one pass that keeps numbers alone: for people to read before they train."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from phinetune.data.example import PARTS
from phinetune.data.findings import Finding
from phinetune.data.ledger import Ledger, histogram
from phinetune.data.prepare import Part, task_of
from phinetune.data.sources import DataFile, describe, open_sources
from phinetune.data.store import Piece
from phinetune.data.tokenise import tokenise
from phinetune.errors import DataError
from phinetune.recipe import DataConfig

PLACES = 3  # shown of each finding and each reason
TOKENISED_BYTES = 100 * 10**6


@dataclass
class Checked:
    """One source: its ledger, what its rows are rejected for, the lengths, and how fast it was read."""

    ledger: Ledger
    reasons: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    lengths: Any = None
    part: Any = None
    bytes: int = 0
    seconds: float = 0.0
    one_in: int = 1  # rows that were tokenised; what tokens show is known of them alone
    drawn: int = 0
    lost: int = 0
    refused: list[DataError] = field(default_factory=list)  # for what a policy, or a share held out, is an error

    @property
    def share_lost(self) -> float:
        """The share of the rows that a run can't use, as far as is known."""
        before = (self.ledger.rejected - self.lost) / self.ledger.rows
        return before + (1 - before) * (self.lost / self.drawn if self.drawn else 0)

    def summary(self) -> dict[str, Any]:
        quantiles = np.percentile(self.lengths, [50, 90, 99]).round() if len(self.lengths) else [0, 0, 0]
        return {
            **self.ledger.summary(),
            "reasons": {reason: {"rows": count, "first": places} for reason, (count, places) in self.reasons.items()},
            "length": dict(zip(("p50", "p90", "p99"), map(int, quantiles), strict=True)),
            "tokenised": self.drawn,
            "share_lost": self.share_lost,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 2),
            "mb_per_second": round(self.bytes / 1e6 / max(self.seconds, 1e-9), 1),
        }


@dataclass
class _Numbers:
    """What `Part` asks of a store: a few numbers of each row that can be used."""

    files: list[DataFile]
    file: Any
    number: Any
    hash: Any
    rejected: int
    formats: dict[str, int]

    def where(self, row: int) -> str:
        file: DataFile = self.files[self.file[row]]
        return file.place(int(self.number[row]))


def check_data(
    config: DataConfig,
    tokenizer: Any,
    seed: int,
    every_row: bool = False,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Checked]:
    """{"train": …} and, where rows are held out by name, {"eval": …}.

    Every row is read and checked.  Of data above `TOKENISED_BYTES`, tokens are counted of a share of the rows, drawn
    by their content, unless `every_row`.

    Args:
        seed: of the share that is held out.

    Raises:
        DataError: if files can't be read, or hold no rows.
    """
    train, share = _check_source(config.train, config, tokenizer, every_row, on_progress), 0.0
    checked = {"train": train}
    if not isinstance(config.eval, float | int | None):
        checked["eval"] = _check_source(config.eval, config, tokenizer, every_row, on_progress)
    elif len(train.part.rows):
        share = config.eval or 0
    with _refusals(train):
        held = checked["eval"].part if "eval" in checked else train.part.hold_out(share, seed)
        leaks = np.isin(train.part.store.hash, held.store.hash[held.rows])
        train.part.leave_out(leaks, Finding.HELD_OUT, config.held_out_in_train)
    for source in checked.values():
        _count(source)
    return checked


@contextmanager
def _refusals(checked: Checked) -> Iterator[None]:
    """What ends a run is kept, to be said behind all else."""
    try:
        yield
    except DataError as error:
        checked.refused.append(error)


def _count(checked: Checked) -> None:
    """What became of the rows by the policies, as a run counts it."""
    ledger, part = checked.ledger, checked.part
    ledger.used, ledger.held_out = len(part.rows), part.held_out
    ledger.dropped = {finding.words: len(rows) for finding, rows in part.dropped.items()}
    for finding, rows in part.kept.items():
        ledger.findings[finding] = (len(rows), [part.store.where(row) for row in rows[:PLACES]])


def _check_source(
    source: Any, config: DataConfig, tokenizer: Any, every_row: bool, on_progress: Callable[[int], None]
) -> Checked:
    lengths, hashes = [np.zeros(0, np.int32)], [np.zeros(0, np.uint64)]
    numbers, from_file = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    reasons: Counter[str] = Counter()
    places: dict[str, list[str]] = {}
    found: Counter[Finding] = Counter()
    found_at: dict[Finding, list[str]] = {}
    formats: Counter[str] = Counter()
    parts = np.zeros(len(PARTS), np.int64)

    with open_sources(source) as files:
        ledger = Ledger(describe(files))
        checked = Checked(ledger, bytes=sum(file.path.stat().st_size for file in files))

        def take(piece: Piece) -> None:
            file = files[piece.file]
            lengths.append(piece.lengths)
            hashes.append(piece.hash)
            numbers.append(piece.number)
            from_file.append(np.full(len(piece.number), piece.file, np.int32))
            np.add(parts, piece.parts.sum(0, dtype=np.int64), out=parts)
            formats.update(piece.formats)
            checked.drawn += piece.drawn
            checked.lost += piece.lost
            ledger.supervised += int(piece.supervised.sum())
            for number, reason, _ in piece.rejected:
                kind = kind_of_reason(reason)
                reasons[kind] += 1
                if len(places.setdefault(kind, [])) < PLACES:
                    places[kind].append(f"{file.place(number)} {reason}")
            for finding in Finding:
                which = (piece.findings & np.uint32(finding)).nonzero()[0]
                found[finding] += len(which)
                for row in which[: PLACES - len(found_at.setdefault(finding, []))]:
                    found_at[finding].append(file.place(int(piece.number[row])))

        checked.one_in = 1 if every_row else -(-checked.bytes // TOKENISED_BYTES)
        task = replace(task_of(files, tokenizer, config), keep_tokens=False, one_in=checked.one_in)
        begin = time.perf_counter()
        tokenise(task, take, on_progress)
        checked.seconds = time.perf_counter() - begin

    checked.lengths = np.concatenate(lengths)
    file, number, hash = (np.concatenate(of_pieces) for of_pieces in (from_file, numbers, hashes))
    store: Any = _Numbers(files, file, number, hash, reasons.total(), dict(formats))
    checked.part = Part(ledger.source, files, store)
    checked.reasons = {kind: (count, places[kind]) for kind, count in reasons.most_common()}
    ledger.rejected = store.rejected
    ledger.examples, ledger.tokens = len(checked.lengths), int(checked.lengths.sum())
    ledger.longest, ledger.histogram = int(checked.lengths.max(initial=0)), histogram(checked.lengths)
    ledger.parts, ledger.formats = dict(zip(PARTS, parts.tolist(), strict=True)), store.formats
    ledger.findings = {finding: (count, found_at[finding]) for finding, count in found.items() if count}
    if not len(store.number) and not ledger.rejected:
        raise DataError(ledger.source, "holds no rows", "put one chat a line in it")
    with _refusals(checked):
        checked.part.leave_out(checked.part.is_duplicate(), Finding.DUPLICATE, config.duplicates)
    return checked


def kind_of_reason(reason: str) -> str:
    """A reason without what differs from row to row, so that like ones are counted together."""
    reason = re.sub(r"\(it has .*\)", "", reason)
    reason = re.sub(r"\([^()]*\)$", "", reason) if "JSON" not in reason else re.sub(r" at column \d+", "", reason)
    return re.sub(r"\d[\d,]*", "N", reason).strip()
