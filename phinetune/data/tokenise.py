"""All files of a source through the workers, in order; and what they make, kept in the cache.

A pass holds a few chunks at a time, whatever the size of the data.  The cache's key is everything that the tokens
depend on: the files' digests, the tokenizer, its template, the settings.
"""

import hashlib
import json
import logging
import queue
import re
import shutil
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phinetune.data.readers import CHUNK_BYTES, Chunk, chunks
from phinetune.data.store import MANIFEST, Piece, Store, StoreWriter
from phinetune.data.worker import Task, Worker, WorkerProcess
from phinetune.errors import DataError
from phinetune.files import cache_folder, mark_used, remove_unused, sha256_of
from phinetune.machine.cores import cores
from phinetune.machine.disk import naming_full_disk

log = logging.getLogger(__name__)

WORTH_PROCESSES = 8 << 20  # bytes of data above which starting processes pays
OWN_NAME = re.compile(r"[0-9a-f]{32}|\.tmp-\w+")
# Settings that no token depends on.
NOT_IN_KEY = {
    *("train", "eval", "max_rejected", "duplicates", "held_out_in_train", "max_batch_tokens", "num_proc"),
    *("format", "columns"),  # each file has its own
}


def tokenise(task: Task, take: Callable[[Piece], None], on_progress: Callable[[int], None] = lambda done: None) -> None:
    """Hands the pieces of all files to `take`, in order; `on_progress` is told how many rows are done.

    Raises:
        DataError: for a file that can't be read, or a row that a policy wants to be an error.
    """
    with _workers(task) as submit:
        pending: deque[Future[Piece]] = deque()
        ahead = 2 * processes(task) + 1

        def finish() -> None:
            piece = pending.popleft().result()
            take(piece)
            on_progress(len(piece.number) + len(piece.rejected))

        for number, file in enumerate(task.files):
            for chunk in chunks(file, number):
                pending.append(submit(chunk))
                if len(pending) >= ahead:
                    finish()
        while pending:
            finish()


def processes(task: Task) -> int:
    """How many processes tokenise: those asked for, or where the data is large one a core, if each has work."""
    if task.config.num_proc:
        return task.config.num_proc
    size = sum(file.path.stat().st_size for file in task.files)
    if size <= WORTH_PROCESSES:
        return 1
    return min(cores(), size // CHUNK_BYTES + 1)


@contextmanager
def _workers(task: Task) -> Iterator[Callable[[Chunk], "Future[Piece]"]]:
    """A function that has a chunk worked on, here or in processes."""
    count = processes(task)
    if count == 1:
        worker = Worker(task)

        def at_once(chunk: Chunk) -> "Future[Piece]":
            future: Future[Piece] = Future()
            future.set_result(worker.piece(chunk))
            return future

        yield at_once
        return
    workers: list[WorkerProcess] = []
    idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()

    def in_process(chunk: Chunk) -> Piece:
        process = idle.get()
        try:
            return process.piece(chunk)
        finally:
            idle.put(process)

    threads = ThreadPoolExecutor(count)
    try:
        for _ in range(count):
            workers.append(WorkerProcess(task))
            idle.put(workers[-1])
        yield lambda chunk: threads.submit(in_process, chunk)
    finally:
        for process in workers:
            process.stop()
        threads.shutdown(cancel_futures=True)
        for process in workers:
            process.close()


def tokenised(task: Task, on_progress: Callable[[int], None] = lambda done: None) -> Store:
    """The tokenised rows of some files: from the cache, or made now and kept there.

    Raises:
        DataError: as `tokenise`, or where the cache can't be written.
        RunError: where the cache's disk is full.
    """
    root = cache_folder() / "data"
    folder = root / cache_key(task)
    if folder.exists():
        mark_used(folder)
        with suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            store = Store(folder)
            if store.is_whole():
                return store
        log.warning(f"tokenised data in {folder} is damaged: it is made again")
        shutil.rmtree(folder, ignore_errors=True)
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_unused(root, OWN_NAME)
        work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=root))
    except OSError as error:
        raise DataError(str(root), f"can't be written ({error.strerror})", "set PHINETUNE_CACHE") from None
    try:
        size = sum(file.path.stat().st_size for file in task.files)
        with naming_full_disk(root, size), StoreWriter(work) as writer:
            tokenise(task, writer.append, on_progress)
            writer.finish([file.name for file in task.files])
        try:
            work.rename(folder)
        except OSError:  # another process was faster
            if not (folder / MANIFEST).is_file():
                raise
    except OSError as error:
        raise DataError(str(root), f"can't be written ({error.strerror or error})", "set PHINETUNE_CACHE") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Store(folder)


def cache_key(task: Task) -> str:
    """A digest of everything that the tokens depend on."""
    settings = {name: value for name, value in task.config.model_dump(mode="json").items() if name not in NOT_IN_KEY}
    files = [[file.name, sha256_of(file.path), file.kind, file.compression, file.format, file.columns, file.unreadable]
             for file in task.files]  # fmt: skip
    template = [task.template.source, task.template.source_with_tools, task.template.variables]
    libraries = [version(name) for name in ("tokenizers", "transformers", "jinja2")]
    parts: Sequence[Any] = [_code(), libraries, task.tokenizer, template, task.eos, settings, files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _code() -> str:
    """A digest of this room's own code: what another version tokenised may not be what this one would."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
