"""What strangers wrote (models, adapters, checkpoints, chat templates) is data: it is never run, it stays inside its
folder, and reading it ends in time.

Pickles run code when they are loaded, and scanners of pickles are bypassed at will (arXiv 2508.19774), so they are
refused unread.  safetensors, JSON and GGUF hold numbers and text only.  Chat templates are programs, of Jinja's
sandbox; patterns can take forever; both get an end (`bounded`).
"""

import gc
import json
import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGEST_JSON = 64 << 20  # bytes; the tokenizer.json of the largest vocabularies has some 35 MB
READ = {".json", ".jsonl", ".jinja", ".safetensors", ".gguf", ".model", ".txt", ".yaml"}  # suffixes that are opened
TEMPLATES = "additional_chat_templates"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npy", ".npz", ".joblib"}


class Untrusted(ValueError):
    """A file that isn't read: what is wrong with it."""


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: if there is none.
        Untrusted: if it isn't a file, isn't JSON, or is too large or nested too deeply to be a configuration.
    """
    check_file(path, path.parent)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise Untrusted(f"{path.name} is nested too deeply") from None
    except ValueError as error:
        raise Untrusted(f"{path.name} is not valid JSON ({error})") from None


def check_folder(folder: Path) -> None:
    """Looks at every file that a library could open, without opening it.

    Raises:
        Untrusted: for the first that leads out of the folder, isn't a plain file, or is too large for what it is.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in READ or path.name == TEMPLATES:
            check_file(path, folder)
    for path in sorted((folder / TEMPLATES).glob("*")):
        check_file(path, folder)


def check_file(path: Path, folder: Path) -> None:
    """
    Raises:
        FileNotFoundError: if there is none.
        Untrusted: if it is a link out of `folder`, no plain file, or too large for what it is.
    """
    try:
        real = path.resolve()
    except (RuntimeError, OSError):
        raise Untrusted(f"{path.name} is a link to itself") from None
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise Untrusted(f"{path.name} is a link out of the folder, to {real}")
    found = path.stat()
    if stat.S_ISDIR(found.st_mode) and path.suffix not in READ:
        return
    if not stat.S_ISREG(found.st_mode):
        raise Untrusted(f"{path.name} is not a plain file")
    if path.suffix in (".json", ".jinja", ".yaml") and found.st_size > LARGEST_JSON:
        raise Untrusted(f"{path.name} has {found.st_size:,} bytes, more than any configuration")


def _roots(folder: Path) -> list[Path]:
    """Where the files of a folder may lie: in it, and for one in the Hub's cache in its model's blobs."""
    real = folder.resolve()
    is_snapshot = real.parent.name == "snapshots" and real.parents[1].name.startswith("models--")
    return [real, real.parents[1] / "blobs"] if is_snapshot else [real]


def plain_name(name: object) -> bool:
    """Whether a name that stands in a file is that of a file beside it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")


@contextmanager
def bounded(seconds: float, memory: int) -> Iterator[None]:
    """Ends a block that takes more than `seconds` of computing, or `memory` bytes more than there are.

    The time is the processor's, so a busy machine changes nothing, and without the garbage collection of all that the
    process has, which can take as long.  In the main thread only, since signals come there, and where the system has
    such limits.

    Raises:
        TimeoutError, MemoryError: from within the block.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    with _address_space(memory):
        collects = gc.isenabled()
        gc.disable()
        before = signal.signal(signal.SIGPROF, _time_is_up)
        signal.setitimer(signal.ITIMER_PROF, seconds, 0.1)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, signal.SIG_DFL if before is None else before)
            if collects:
                gc.enable()


def _time_is_up(number: int, frame: object) -> None:
    raise TimeoutError("takes too long")


@contextmanager
def _address_space(more: int) -> Iterator[None]:
    """No more than `more` bytes can be added to what this process has."""
    try:
        used = int(Path("/proc/self/statm").read_bytes().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux, or one without /proc: what is used isn't known
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bounds = [bound for bound in (used + more, soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
