"""What a data section holds, in one pass that keeps numbers alone: for people to read before they train."""

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from phinetune.data.findings import Finding
from phinetune.data.ledger import Ledger, histogram
from phinetune.data.prepare import task_of
from phinetune.data.render import PARTS
from phinetune.data.sources import describe, open_sources
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
    hashes: Any = None
    bytes: int = 0
    seconds: float = 0.0
    one_in: int = 1  # rows that were tokenised; what tokens show is known of them alone
    drawn: int = 0
    lost: int = 0
    refused: list[str] = field(default_factory=list)  # what a policy makes an error of

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


def check_data(
    config: DataConfig,
    tokenizer: Any,
    every_row: bool = False,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Checked]:
    """{"train": …} and, where rows are held out by name, {"eval": …}.

    Every row is read and checked.  Of data above `TOKENISED_BYTES`, tokens are counted of a share of the rows, drawn
    by their content, unless `every_row`.

    Raises:
        DataError: if files can't be read, or hold no rows.
    """
    checked: dict[str, Checked] = {"train": _check_source(config.train, config, tokenizer, every_row, on_progress)}
    if not isinstance(config.eval, float | int | None):
        checked["eval"] = _check_source(config.eval, config, tokenizer, every_row, on_progress)
        leaks = int(np.isin(checked["train"].hashes, checked["eval"].hashes).sum())
        _apply(checked["train"], Finding.HELD_OUT, leaks, config.held_out_in_train)
    return checked


def _apply(checked: Checked, finding: Finding, count: int, policy: str) -> None:
    """What a run would do with some rows: count them, leave them out, or refuse them."""
    ledger = checked.ledger
    if count and policy == "raise":
        checked.refused.append(f"{count:,} rows {finding.words}")
    if count and policy == "drop":
        ledger.dropped[finding.words] = count
        ledger.used -= count
    elif count:
        ledger.findings[finding] = (count, [])


def _check_source(
    source: Any, config: DataConfig, tokenizer: Any, every_row: bool, on_progress: Callable[[int], None]
) -> Checked:
    lengths, hashes = [np.zeros(0, np.int32)], [np.zeros(0, np.uint64)]
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
            np.add(parts, piece.parts.sum(0, dtype=np.int64), out=parts)
            formats.update(piece.formats)
            checked.drawn += piece.drawn
            checked.lost += piece.lost
            ledger.used += len(piece.number)
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

    checked.lengths, checked.hashes = np.concatenate(lengths), np.concatenate(hashes)
    checked.reasons = {kind: (count, places[kind]) for kind, count in reasons.most_common()}
    ledger.rejected = reasons.total()
    ledger.examples, ledger.tokens = len(checked.lengths), int(checked.lengths.sum())
    ledger.longest, ledger.histogram = int(checked.lengths.max(initial=0)), histogram(checked.lengths)
    ledger.parts, ledger.formats = dict(zip(PARTS, parts.tolist(), strict=True)), dict(formats)
    ledger.findings = {finding: (count, found_at[finding]) for finding, count in found.items() if count}
    unique = np.unique(checked.hashes)
    _apply(checked, Finding.DUPLICATE, len(checked.hashes) - len(unique), config.duplicates)
    if config.duplicates == "drop":
        checked.hashes = unique
    if not ledger.rows:
        raise DataError(ledger.source, "holds no rows", "put one chat a line in it")
    return checked


def kind_of_reason(reason: str) -> str:
    """A reason without what differs from row to row, so that like ones are counted together."""
    reason = re.sub(r"\(it has .*\)", "", reason)
    reason = re.sub(r"\([^()]*\)$", "", reason) if "JSON" not in reason else re.sub(r" at column \d+", "", reason)
    return re.sub(r"\d[\d,]*", "N", reason).strip()
