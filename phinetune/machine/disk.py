"""Writing so that nothing is ever half there, and saying how much is short when a disk is full."""

import errno
import functools
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phinetune.errors import RunError

FULL = (errno.ENOSPC, errno.EDQUOT)
log = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path, size: int = 0) -> Iterator[Path]:
    """A path to write to, whose file takes `path`'s place when the block ends: at every moment, behind a kill or a
    power cut too, `path` is the old file or the new one, whole.

    Raises:
        RunError: where the disk is full (`size` is about what will be written); nothing is left of the attempt.
    """
    work = path.with_name(f".tmp-{path.name}")
    try:
        with naming_full_disk(path, size):
            yield work
            flush(work)
            work.replace(path)
            flush(path.parent)
    except BaseException:
        work.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not at all; half of a surrogate pair, as JSON may hold, is spelt out."""
    with replacing(path, len(text)) as work:
        work.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def naming_full_disk(path: Path, size: int = 0) -> Iterator[None]:
    """Turns a full disk into a RunError that says where, and how much is short of `size` bytes."""
    try:
        yield
    except Exception as error:  # tokenizers and safetensors have their own kinds, with the system's number as text
        if getattr(error, "errno", None) not in FULL and not any(f"(os error {n})" in str(error) for n in FULL):
            raise
        raise _full(path, size) from None


def check_room(path: Path, size: int) -> None:
    """Raises RunError unless `size` bytes are free where `path` (a file or folder, there or not) lies."""
    if free_bytes(path) < size:
        raise _full(path, size)


def free_bytes(path: Path) -> int:
    """What a user may still write on the volume of `path`."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def flush(path: Path) -> None:
    """fsync of a file or folder: what was written, or renamed in it, survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
        _say_unflushed()
    finally:
        os.close(descriptor)


@functools.cache
def _say_unflushed() -> None:
    log.warning("this file system can't flush folders: what is renamed in them may be lost when the power goes")


def _full(path: Path, size: int) -> RunError:
    free = free_bytes(path)
    what = f"no space: {size:,} bytes are to be written and {free:,} are free"
    if free < size:
        what += f", {size - free:,} too few"
    elif size:
        what += ": a quota is used up, or the number of files that the disk takes"
    else:  # nobody knew how many
        what = f"no space: {free:,} bytes are free"
    return RunError(str(path), what, "make room there, and go on with --resume; what was whole is whole")
