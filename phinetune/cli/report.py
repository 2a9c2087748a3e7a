"""`phinetune report`"""

from collections.abc import Sequence
from pathlib import Path

from phinetune.cli.paths import check_output
from phinetune.errors import InputError

COMPARISON = Path("comparison.html")


def run_report(runs: Sequence[Path], output: Path | None, overwrite: bool) -> None:
    from phinetune.report import write_comparison, write_report

    if len(runs) == 1 and output is None:
        print(f"wrote {write_report(runs[0])}")
        return
    page = output or COMPARISON
    check_output(page)
    if page.exists() and not overwrite:
        raise InputError(str(page), "is there already", "give another --output, or --overwrite")
    write_comparison(runs, page)
    print(f"wrote {page}")
