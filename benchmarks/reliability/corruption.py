"""Row 4: each file of a checkpoint missing, empty, cut, or with a bit flipped."""

import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
from subject import Subject


def corrupt(given: Subject, seed: int, truncations: int, flips: int) -> dict[str, Any]:
    """The newest of two checkpoints is damaged: it must be passed over, with a warning, and the older one taken; the
    run that resumes from there must end in the same bytes (once a file; finding the damage is the same each time)."""
    checkpoint, rng = forked.module("phinetune.train.checkpoint"), random.Random(seed)
    older, newest = checkpoint.list_checkpoints(given.folder / "whole")[1::-1]
    damaged, missed, resumed, resumed_wrong = 0, 0, 0, 0
    logging.getLogger("phinetune").propagate = False
    for name in sorted(path.name for path in newest.iterdir()):
        for number, data in enumerate(damages((newest / name).read_bytes(), rng, truncations, flips)):
            run = given.folder / "damaged"
            for path in (older, newest):
                shutil.copytree(path, run / path.name)
            file = run / newest.name / name
            file.unlink()
            if data is not None:
                file.write_bytes(data)
            damaged += 1
            said = Warnings()
            with said:
                taken = checkpoint.newest_whole_checkpoint(run)
            if taken != run / older.name or not any(str(run / newest.name) in words for words in said.said):
                missed += 1
                print(f"corruption: {name}, damage {number}, isn't found", flush=True)
            elif number % 25 == 1:
                resumed += 1
                code = given.start(run, given.folder / "damaged.txt", resume=True).wait()
                resumed_wrong += code != 0 or _final(given, run) != _final(given, given.folder / "whole")
            shutil.rmtree(run)
    return {
        "corruptions": damaged,
        "corruptions_missed": missed,
        "corruptions_resumed": resumed,
        "corruptions_resumed_wrong": resumed_wrong,
    }


def damages(data: bytes, rng: random.Random, truncations: int, flips: int) -> Iterator[bytes | None]:
    """What becomes of a file; None where it is missing.  It is cut within: neither to nothing nor not at all."""
    yield None
    yield b""
    assert len(data) > truncations
    for i in range(1, truncations + 1):
        yield data[: i * len(data) // (truncations + 1)]
    for _ in range(flips):
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        yield data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def _final(given: Subject, run: Path) -> dict[str, str]:
    """Without metrics.jsonl, which a folder of two checkpoints hasn't from the beginning."""
    return {name: digest for name, digest in given.digests(run).items() if name != "metrics"}


class Warnings(logging.Handler):
    """What is said at warning level in a block."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def __enter__(self) -> "Warnings":
        logging.getLogger("phinetune").addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger("phinetune").removeHandler(self)
