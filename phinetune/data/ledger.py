"""What became of every row, written down so that the counts reconcile with the input.

rows = used + rejected + dropped (by a policy) + held out (moved to the other ledger)
tokens = system + user + assistant + tool + template
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from phinetune.data.example import PARTS
from phinetune.data.findings import Finding
from phinetune.data.formats import Rejected
from phinetune.errors import DataError

SHOWN = 20
BINS = 12


@dataclass
class Ledger:
    """Counts of one source; `findings` with the places of the first rows that have them."""

    source: str
    used: int = 0
    held_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    rejected: int = 0
    examples: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    histogram: list[tuple[int, int, int]] = field(default_factory=list)  # of lengths in tokens: (from, to, examples)
    parts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    formats: dict[str, int] = field(default_factory=dict)
    findings: dict[Finding, tuple[int, list[str]]] = field(default_factory=dict)
    first_rejected: list[Rejected] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return self.used + self.rejected + self.held_out + sum(self.dropped.values())

    def check(self, max_rejected: float) -> None:
        """Raises DataError when nothing is left, or more than `max_rejected` of the rows can't be used."""
        if self.rows == 0:
            raise DataError(self.source, "holds no rows", "put one chat a line in it")
        if self.used and self.rejected <= max_rejected * self.rows:
            return
        listed = "".join(f"\n  {r.where}: {r.reason}" for r in self.first_rejected)
        more = self.rejected - len(self.first_rejected)
        listed += f"\n  … and {more:,} more" if more else ""
        listed += "".join(f"\n  {count:,} rows {words}: left out" for words, count in self.dropped.items())
        beyond = f"more than data.max_rejected={max_rejected:g}" if self.used else "and none is left"
        what = f"{self.rejected:,} of {self.rows:,} rows can't be used, {beyond}{listed}\n "
        raise DataError(self.source, what, "correct these rows, or raise data.max_rejected")

    def summary(self) -> dict[str, Any]:
        names = ("source", "rows", "used", "rejected", "held_out", "examples", "tokens", "supervised", "longest")
        return {
            **{name: getattr(self, name) for name in names},
            "dropped": self.dropped,
            "padded": 0,  # flat batches have no padding
            "tokens_by_part": self.parts,
            "formats": self.formats,
            "histogram": [{"from": a, "to": b, "examples": count} for a, b, count in self.histogram],
            "findings": {
                (finding.name or "").lower(): {"rows": count, "what": finding.words, "first": places}
                for finding, (count, places) in self.findings.items()
            },
        }


def histogram(lengths: Any) -> list[tuple[int, int, int]]:
    """(from, to, examples) of lengths in tokens; widths are the same but for the last."""
    if not len(lengths):
        return []
    top = int(np.percentile(lengths, 99.5))
    width = max(1, -(-(top + 1) // BINS))
    counts = np.bincount(np.minimum(lengths // width, BINS - 1), minlength=BINS)
    bins = [(i * width, (i + 1) * width - 1, int(count)) for i, count in enumerate(counts)]
    while bins and not bins[-1][2]:
        bins.pop()
    begin, _, count = bins[-1]
    return [*bins[:-1], (begin, int(lengths.max()), count)]


def write_ledgers(
    folder: Path, ledgers: Mapping[str, Ledger], rejected: Iterable[Rejected], fingerprints: Mapping[str, str]
) -> None:
    """`ledger.json` with the counts and the digest of the rows, `rejected.jsonl` with every row left out."""
    counts = {**{name: ledger.summary() for name, ledger in ledgers.items()}, **fingerprints}
    (folder / "ledger.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    with (folder / "rejected.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as file:
        for row in rejected:
            line = {"where": row.where, "reason": row.reason, "row": row.raw}
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
