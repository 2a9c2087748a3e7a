"""What happens to a chunk of a file: records -> rows -> examples, as arrays. Runs here or in a process of its own.

The process is not one of multiprocessing's: those start a user's script again, which not every script survives.  It
loads neither torch nor the model, reads chunks from its standard input and answers on its standard output.
"""

import gc
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from phinetune.data.encode import Encoder
from phinetune.data.example import PARTS, Example
from phinetune.data.findings import Finding
from phinetune.data.formats import Rejected, Row
from phinetune.data.policies import check, digest
from phinetune.data.readers import Chunk, rows
from phinetune.data.render import Renderer
from phinetune.data.sources import DataFile
from phinetune.data.store import Piece, row_to_json
from phinetune.data.template import ChatTemplate
from phinetune.errors import DataError
from phinetune.recipe import DataConfig

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Task:
    """All that a worker must know."""

    files: Sequence[DataFile]
    template: ChatTemplate
    tokenizer: str
    eos: str
    config: DataConfig
    keep_tokens: bool = True  # a check needs only their numbers,
    one_in: int = 1  # and of large data only of one row in so many

    def renderer(self) -> Renderer:
        return Renderer(self.template, Encoder.shared(self.tokenizer), self.config, self.eos)


@dataclass
class _Made:
    """A row that can be used, and what became of it."""

    number: int
    row: Row
    line: bytes
    hash: int
    findings: Finding
    examples: list[Example] = field(default_factory=list)


class Worker:
    """Makes pieces of chunks."""

    def __init__(self, task: Task) -> None:
        self.task, self.renderer = task, task.renderer()

    def piece(self, chunk: Chunk) -> Piece:
        """
        Raises:
            DataError: for a row that a policy wants to be an error.
        """
        rejected: list[tuple[int, str, Any]] = []
        made: list[_Made] = []
        for number, row in rows(chunk, self.task.files[chunk.file]):
            checked = row if isinstance(row, Rejected) else check(row, self.task.config)
            if isinstance(checked, Rejected):
                rejected.append((number, checked.reason, checked.raw))
                continue
            line = row_to_json(checked[0])
            made.append(_Made(number, checked[0], line, digest(checked[0]), checked[1]))
        drawn = [m for m in made if m.hash % self.task.one_in == 0]
        lost: set[int] = set()
        for start in range(0, len(drawn), ROWS_AT_ONCE):
            batch = drawn[start : start + ROWS_AT_ONCE]
            for m, outcome in zip(batch, self.renderer.render_batch([m.row for m in batch]), strict=True):
                if isinstance(outcome, Rejected):
                    rejected.append((m.number, outcome.reason, outcome.raw))
                    lost.add(id(m))
                else:
                    m.examples, m.findings = outcome.examples, m.findings | outcome.findings
        kept = [m for m in made if id(m) not in lost]  # not by number: an array may stand in one line
        return self._piece(chunk.file, kept, sorted(rejected, key=lambda r: r[0]), len(drawn), len(lost))

    def _piece(self, file: int, made: list[_Made], rejected: list[Any], drawn: int, lost: int) -> Piece:
        examples = [example for m in made for example in m.examples]
        kept = examples if self.task.keep_tokens else []
        return Piece(
            file,
            number=np.array([m.number for m in made], np.int64),
            hash=np.array([m.hash for m in made], np.uint64),
            findings=np.array([m.findings for m in made], np.uint32),
            examples=np.array([len(m.examples) for m in made], np.int32),
            lengths=np.array([len(example.ids) for example in examples], np.int32),
            supervised=np.array([example.supervised for example in examples], np.int32),
            parts=np.array([example.parts for example in examples], np.int32).reshape(-1, len(PARTS)),
            ids=np.concatenate([np.zeros(0, np.int32), *(example.ids for example in kept)]),
            mask=np.concatenate([np.zeros(0, bool), *(example.mask for example in kept)]),
            rows=[m.line for m in made] if self.task.keep_tokens else [],
            rejected=rejected,
            formats=Counter(m.row.format for m in made),
            drawn=drawn,
            lost=lost,
        )


class WorkerProcess:
    """A worker in a process of its own, asked one chunk at a time."""

    def __init__(self, task: Task) -> None:
        command = [sys.executable, "-c", "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "]
        command[-1] += "from phinetune.data.worker import serve; serve()"
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, json.dumps(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._task: Task | None = task

    def piece(self, chunk: Chunk) -> Piece:
        """
        Raises:
            DataError: what the worker raised, or that it died.
        """
        try:
            if self._task is not None:
                self._send(self._task)
                self._task = None
            self._send(chunk)
            answer = _receive(self.process.stdout)
        except (BrokenPipeError, EOFError):
            code = self.process.wait()
            what = f"the process that tokenises ended with {code}"
            raise DataError("data", what, "perhaps memory ran out: set data.num_proc: 1") from None
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Piece)
        return answer

    def stop(self) -> None:
        """Ends the process, whatever it is doing: who waits for it is told so."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Behind `stop`, once nobody reads or writes any more."""
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                if pipe:
                    pipe.close()
            except BrokenPipeError:
                pass

    def _send(self, thing: Any) -> None:
        assert self.process.stdin
        _write(self.process.stdin, thing)


def serve() -> None:
    """The worker's side: a task, then chunks, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends this process
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between
    asked = sys.stdin.buffer
    try:
        worker = Worker(_receive(asked))
        # Rows hold no cycles to speak of, and looking for some among all that is loaded took a tenth of the time.
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        while True:
            chunk = _receive(asked)
            try:
                answer: Any = worker.piece(chunk)
            except Exception as error:
                answer = error
            _write(answers, answer)
    except (EOFError, BrokenPipeError):
        os._exit(0)


def _write(pipe: IO[bytes], thing: Any) -> None:
    data = pickle.dumps(thing, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(struct.pack("<Q", len(data)))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: IO[bytes] | None) -> Any:
    assert pipe
    head = pipe.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", head)
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)
