"""What became of every row, written down so that the counts reconcile with the input."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phinetune.data.render import Example
from phinetune.data.sources import Rejected
from phinetune.errors import DataError

SHOWN = 20


@dataclass
class Ledger:
    """Counts of one source: rows = used + rejected, tokens of the used ones."""

    source: str
    used: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    rejected: list[Rejected] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return self.used + len(self.rejected)

    def enter(self, outcome: Example | Rejected) -> None:
        if isinstance(outcome, Rejected):
            self.rejected.append(outcome)
        else:
            self.used += 1
            self.tokens += len(outcome.ids)
            self.supervised += outcome.supervised
            self.longest = max(self.longest, len(outcome.ids))

    def check(self, max_rejected: float) -> None:
        """Raises DataError when nothing is left, or more than `max_rejected` of the rows were lost."""
        if self.rows == 0:
            raise DataError(self.source, "holds no rows", "put one chat a line in it")
        if self.used and len(self.rejected) <= max_rejected * self.rows:
            return
        listed = "".join(f"\n  {r.where}: {r.reason}" for r in self.rejected[:SHOWN])
        more = f"\n  … and {len(self.rejected) - SHOWN:,} more" if len(self.rejected) > SHOWN else ""
        beyond = f"more than data.max_rejected={max_rejected:g}" if self.used else "and none is left"
        what = f"{len(self.rejected):,} of {self.rows:,} rows can't be used, {beyond}{listed}{more}\n "
        raise DataError(self.source, what, "correct these rows, or raise data.max_rejected")

    def summary(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("source", "rows", "used", "tokens", "supervised", "longest")}
        return {**counts, "rejected": len(self.rejected)}


def write_ledgers(folder: Path, ledgers: dict[str, Ledger], fingerprint: str) -> None:
    """`ledger.json` with the counts and the digest of the rows, `rejected.jsonl` with every row left out."""
    counts = {**{name: ledger.summary() for name, ledger in ledgers.items()}, "fingerprint": fingerprint}
    (folder / "ledger.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    with (folder / "rejected.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as file:
        for ledger in ledgers.values():
            for rejected in ledger.rejected:
                line = {"where": rejected.where, "reason": rejected.reason, "row": rejected.raw}
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
