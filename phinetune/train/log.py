"""Where a run says what it does: the screen, train.log, metrics.jsonl."""

import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from phinetune.machine.disk import naming_full_disk, replacing
from phinetune.recipe import Recipe
from phinetune.train.signals import Signals
from phinetune.train.trackers import Trackers

METRICS = "metrics.jsonl"


class Screen:
    """Standard error, whose reader may be gone, as `tee` is behind Ctrl-C: then a run goes on with train.log alone."""

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


console = Console(file=cast(IO[str], Screen()), highlight=False, force_jupyter=False)


@contextmanager
def early_log() -> Iterator[None]:
    """What is logged before a run's log is open goes to the screen at once, and into `train.log` as soon as it is."""
    logger, early = logging.getLogger("phinetune"), _Early()
    before, logger.propagate = logger.propagate, False
    logger.addHandler(early)
    try:
        yield
    finally:
        logger.removeHandler(early)
        logger.propagate = before


@contextmanager
def run_log(folder: Path, level: str) -> Iterator[None]:
    """Everything logged under `phinetune` goes to the screen and to `train.log`, for a `with` block.

    It doesn't go on to the root logger, whose handlers, a notebook's say, would show it once more; whoever wants it
    adds a handler to `phinetune`.
    """
    logger = logging.getLogger("phinetune")
    screen = _Screen()
    file = _File(folder / "train.log", encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = logger.level, logger.propagate
    logger.propagate = False
    logger.setLevel("INFO" if level == "passive" else level.upper())
    for early in [handler for handler in logger.handlers if isinstance(handler, _Early)]:
        logger.removeHandler(early)
        for record in early.records:
            file.handle(record)
    for handler in (screen, file):
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in (screen, file):
            logger.removeHandler(handler)
        file.close()
        level_before, logger.propagate = before
        logger.setLevel(level_before)


class _File(logging.FileHandler):
    """A full disk ends the run, in place of a traceback a line."""

    def handleError(self, record: logging.LogRecord) -> None:
        with naming_full_disk(Path(self.baseFilename), len(record.getMessage())):
            raise


class _Screen(logging.Handler):
    """Plain lines, printed above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        console.print(record.getMessage(), style=style, markup=False, soft_wrap=True)


class MetricsWriter:
    """A JSON object a line in metrics.jsonl, and the same numbers to the trackers of `report_to`.

    Args:
        begun: when the run began.
        first_step: behind which it goes on.
        is_evaluated: whether the evaluation behind that step, where there is one, is done with.
        signals: that wait until trackers have sent what they hold.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, begun: str, first_step: int, is_evaluated: bool, signals: Signals
    ) -> None:
        self._path = folder / METRICS
        if first_step > 0 and self._path.exists():
            self._forget_after(first_step, is_evaluated)
        self._file = self._path.open("ab" if first_step > 0 else "wb", buffering=0)  # a line is written or isn't
        self._trackers, self._signals = Trackers(recipe, folder, begun, first_step), signals

    def write(self, metrics: Mapping[str, Any]) -> None:
        line = (json.dumps(dict(metrics)) + "\n").encode()
        with naming_full_disk(self._path, len(line)):
            while line:
                line = line[self._file.write(line) or 0 :]
        self._trackers.write({name: value for name, value in metrics.items() if name != "step"}, metrics["step"])

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        with self._signals.deferred():
            self._trackers.close()

    def _forget_after(self, step: int, is_evaluated: bool) -> None:
        """A resumed run writes the steps after its checkpoint again, and what it has still to evaluate."""

        def stays(line: str) -> bool:
            written = json.loads(line) if line.endswith("\n") else {"step": math.inf}
            again = "eval_loss" in written and not is_evaluated
            return bool(written["step"] < step or (written["step"] == step and not again))

        kept = [line for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True) if stays(line)]
        with replacing(self._path, sum(map(len, kept))) as work:
            work.write_text("".join(kept), encoding="utf-8")


class _Early(_Screen):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        super().emit(record)


class ProgressBar:
    """A bar with loss, tokens a second and the time left; nothing where the output is no terminal."""

    def __init__(self, what: str, total: int, shown: bool = True, done: int = 0) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self._progress = Progress(
            *columns, TextColumn("{task.fields[note]}"), console=console, disable=not shown or not sys.stderr.isatty()
        )
        self._task: TaskID = self._progress.add_task(what, total=total, completed=done, note="")

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def advance(self, steps: int = 1, note: str = "", what: str | None = None) -> None:
        self._progress.update(self._task, advance=steps, description=what, note=note)
