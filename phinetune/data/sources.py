"""From what a recipe names to the files that hold the rows.

A source is a file, a folder, a pattern (`data/*.jsonl`), a shipped set (`phinetune:orders/train`), standard input
(`-`), a Hub data set (`owner/name`, or `owner/name:split`), or rows that are objects in Python.  The last three are
brought into a file first, so that behind this door there are only files.
"""

import bz2
import gzip
import itertools
import json
import lzma
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import IO, Any

from phinetune.errors import DataError
from phinetune.hub import hub_answers
from phinetune.recipe import DataSource

SHIPPED = "phinetune:"
STDIN = "-"
KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
LOOKED_AT, MOST_COMPRESSED = 16 << 20, 200  # bytes decompressed at first, and times their size
MEND = f"give JSON Lines, JSON, CSV, TSV, Parquet or Arrow files, perhaps with {', '.join(COMPRESSIONS)} or .zst"


@dataclass(frozen=True)
class DataFile:
    """A file of rows: `name` is what its rows are called by, `name:line`."""

    path: Path
    name: str
    kind: str
    compression: str = ""
    format: str = "auto"
    columns: dict[str, str] | None = None
    weight: float = 1.0
    unreadable: dict[int, str] = field(default_factory=dict)  # rows from Python that are no JSON, and why

    def open(self) -> IO[bytes]:
        """Its bytes, decompressed.

        Raises:
            DataError: if it grows as no text does.
        """
        if not self.compression:
            return self.path.open("rb")
        with self.path.open("rb") as raw, self._decompressed(raw) as beginning:
            grown = len(beginning.read(LOOKED_AT))
            consumed = max(1, raw.tell())
        if grown == LOOKED_AT and grown > MOST_COMPRESSED * consumed:
            what = f"grows to {grown / consumed:,.0f} times its size, as no text does"
            raise DataError(self.name, what, "decompress it yourself if it is what it should be")
        return self._decompressed(self.path)  # type: ignore[no-any-return]

    def _decompressed(self, file: Any) -> Any:
        """What is in a compressed file, given by its path or open."""
        if self.compression != ".zst":
            return COMPRESSIONS[self.compression](file, "rb")
        import pyarrow

        return pyarrow.CompressedInputStream(file, "zstd")

    def place(self, number: int) -> str:
        """What a row is called by: the line of a text file, the number of a row elsewhere, from 1."""
        return f"{self.name}:{number}"


@contextmanager
def open_sources(given: Any, rows: Iterable[Any] | None = None) -> Iterator[list[DataFile]]:
    """The files behind `data.train` or `data.eval`; rows given from Python take their place.

    Raises:
        DataError: for what isn't there, isn't readable or isn't of a known kind.
    """
    with ExitStack() as stack:
        if rows is not None:
            yield [stack.enter_context(_rows_as_file(rows))]
            return
        files: list[DataFile] = []
        for item in given if isinstance(given, list) else [given]:
            source = item if isinstance(item, DataSource) else DataSource(path=item)
            path = _path(source.path)
            if source.path == STDIN and sys.stdin is None:
                raise DataError("stdin", "is closed", "pipe one chat a line into it")
            if source.path == STDIN:
                found = [stack.enter_context(_stream_as_file(sys.stdin.buffer, "stdin", source))]
            elif path.exists() and not path.is_file() and not path.is_dir():  # a pipe: it can be read but once
                stream = stack.enter_context(path.open("rb"))
                found = [stack.enter_context(_stream_as_file(stream, source.path, source))]
            else:
                found = list(_find(source))
            files += found
        yield files


def _find(source: DataSource) -> Iterator[DataFile]:
    said = source.path
    if said.startswith(SHIPPED):
        yield _file(_shipped(said), said, source)
        return
    path = _path(said)
    if path.is_dir():
        found = sorted(p for p in _files_in(path) if _kind_of(p)[0])
        if not found:
            raise DataError(said, "the folder holds no data files", MEND)
        for file in found:
            yield _file(file, str(file), source)
    elif path.exists():
        yield _file(path, said, source)
    elif any(sign in said for sign in "*?[") and not (":" in said and is_hub_id(said)):
        root = Path(path.anchor) if path.is_absolute() else Path()
        pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
        try:
            found = sorted(p for p in root.glob(pattern) if p.is_file())
        except ValueError as error:
            raise DataError(said, f"is no pattern ({error})", "correct it") from None
        if not found:
            raise DataError(said, "no file matches", "correct the pattern")
        for file in found:
            yield _file(file, str(file), source)
    elif is_hub_id(said):
        yield from _from_hub(source)
    else:
        raise DataError(said, "no such file", "give a file, a folder, a pattern, a Hub id (owner/name) or -")


def is_hub_id(said: str) -> bool:
    """`owner/name` or `owner/name:split`, and no file name."""
    name = said.partition(":")[0]
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not _kind_of(Path(name))[0]


def _path(said: str) -> Path:
    """
    Raises:
        DataError: for what can't be looked at.
    """
    try:
        path = Path(said).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, no permission, a name too long
        reason = getattr(error, "strerror", None) or error
        raise DataError(said[:200], f"can't be looked at ({reason})", "correct the path") from None
    return path


def _files_in(folder: Path) -> Iterator[Path]:
    """All that is in a folder and those below it, behind links too; names that begin with . or _ aside."""

    def refuse(error: OSError) -> None:
        raise DataError(str(error.filename), f"can't be read ({error.strerror})", MEND) from None

    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        if (real := os.path.realpath(where)) in seen:  # a link to where it was
            folders.clear()
            continue
        seen.add(real)
        paths = [Path(where, name) for name in names if not name.startswith((".", "_"))]
        yield from (path for path in paths if path.is_file() or not path.exists())  # a link to nowhere is told


def _kind_of(path: Path) -> tuple[str, str]:
    """(kind, compression) by a file's name; an empty kind where the name doesn't say."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in (*COMPRESSIONS, ".zst") else ""
    return KINDS.get(suffixes[-1] if suffixes else "", ""), compression


def _file(path: Path, said: str, source: DataSource) -> DataFile:
    kind, compression = _kind_of(path)
    try:
        with path.open("rb") as file:
            begin = file.read(4096)
    except OSError as error:
        raise DataError(said, f"can't be read ({error.strerror})", MEND) from None
    if not begin:
        raise DataError(said, "is empty", "put one chat a line in it")
    if not kind:
        kind = _kind_by_content(begin)
    if not kind:
        raise DataError(said, f"is of no known kind ({path.suffix or 'no suffix'})", MEND)
    return DataFile(path, said, kind, compression, source.format, source.columns, source.weight)


def _kind_by_content(begin: bytes) -> str:
    """For names that don't say: a JSON object a line, a JSON array, Parquet, Arrow; nothing for the rest."""
    if begin.startswith(b"PAR1"):
        return "parquet"
    if begin.startswith(b"ARROW1"):
        return "arrow"
    return {b"{": "lines", b"[": "json"}.get(begin.removeprefix(b"\xef\xbb\xbf").lstrip()[:1], "")


def _shipped(name: str) -> Path:
    set_name, _, split = name.removeprefix(SHIPPED).partition("/")
    path = Path(str(resources.files("phinetune.data.shipped") / f"{set_name}.{split}.jsonl"))
    if not path.is_file():
        shipped = sorted(p.name.removesuffix(".jsonl").replace(".", "/") for p in path.parent.glob("*.jsonl"))
        raise DataError(name, "no such shipped data set", f"there are {', '.join(SHIPPED + s for s in shipped)}")
    return path


def _from_hub(source: DataSource) -> Iterator[DataFile]:
    """The Arrow files that `datasets` keeps of a Hub data set's split."""
    name, _, split = source.path.partition(":")
    split = split or source.split or "train"
    if "[" in split or "+" in split:
        what = "asks for a part or a sum of splits"
        raise DataError(f"{name}:{split}", what, "name whole splits, and a weight such as 0.1")
    try:
        from datasets import DownloadConfig, load_dataset
    except ImportError:
        what = "no such file; as a Hub data set it needs the package datasets"
        raise DataError(source.path, what, "pip install 'phinetune[hub]'") from None
    try:
        at_hand = DownloadConfig(local_files_only=not hub_answers())
        found = load_dataset(name, source.name, split=split, revision=source.revision, download_config=at_hand)
    except Exception as error:  # a data set's own files decide what may go wrong
        reason = " ".join(str(error).split())[:300]
        what = f"no such file, and it can't be had from the Hugging Face Hub ({type(error).__name__}: {reason})"
        raise DataError(source.path, what, "check the name, split and revision, or give a local file") from None
    said = f"{name}:{split}"
    for number, file in enumerate(found.cache_files):
        part = f"#{number}" if len(found.cache_files) > 1 else ""
        yield DataFile(Path(file["filename"]), said + part, "arrow", "", source.format, source.columns, source.weight)


@contextmanager
def _stream_as_file(stream: Any, name: str, source: DataSource) -> Iterator[DataFile]:
    """Standard input or a pipe, kept in a temporary file: it is read twice, and only once to be had."""
    with tempfile.TemporaryDirectory(prefix="phinetune-") as folder:
        path = Path(folder) / "stream"
        with path.open("wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
        with path.open("rb") as file:
            kind = _kind_by_content(file.read(4096))
        if path.stat().st_size == 0:
            raise DataError(name, "is empty", "pipe one chat a line into it")
        yield DataFile(path, name, kind or "lines", "", source.format, source.columns, source.weight)


@contextmanager
def _rows_as_file(rows: Iterable[Any]) -> Iterator[DataFile]:
    """Rows from Python as JSON Lines; what JSON can't hold is named row by row, never turned into text."""
    with tempfile.TemporaryDirectory(prefix="phinetune-") as folder:
        if is_table(rows):
            yield DataFile(_written(rows, Path(folder)), "row", "arrow")
            return
        path = Path(folder) / "rows.jsonl"
        unreadable: dict[int, str] = {}
        with path.open("w", encoding="utf-8", errors="surrogatepass") as file:
            for number, row in enumerate(rows, 1):
                try:
                    file.write(json.dumps(_without_nan(row), ensure_ascii=True) + "\n")
                except (TypeError, ValueError, RecursionError) as error:
                    unreadable[number] = f"holds what JSON can't ({error})"
                    file.write("null\n")
        if path.stat().st_size == 0:
            raise DataError("rows from Python", "there are none", "give at least one chat")
        yield DataFile(path, "row", "lines", unreadable=unreadable)


def _without_nan(row: Any) -> Any:
    """A row without what pandas writes where it has nothing."""
    if not isinstance(row, Mapping):
        return row
    return {name: value for name, value in row.items() if not (isinstance(value, float) and math.isnan(value))}


def is_table(rows: Any) -> bool:
    """Whether rows come as a table: a `datasets.Dataset` that reads its rows as they are, or a frame of pandas' or
    polars'. Its types tell its nulls and JSON from a row's own."""
    if hasattr(rows, "with_format") and hasattr(rows, "num_rows"):
        return bool(rows.format["type"] != "custom")
    return hasattr(rows, "columns") and (hasattr(rows, "to_arrow") or hasattr(rows, "iterrows"))


def _written(rows: Any, folder: Path) -> Path:
    """A table's rows as an Arrow file."""
    import pyarrow as pa

    path = folder / "rows.arrow"
    if not len(rows):
        raise DataError("rows from Python", "there are none", "give at least one chat")
    try:
        if hasattr(rows, "with_format"):
            tables = rows.with_format("arrow", columns=rows.format["columns"]).iter(1000)
        else:
            tables = iter([rows.to_arrow() if hasattr(rows, "to_arrow") else pa.Table.from_pandas(rows)])
        first = next(tables)
        with pa.ipc.new_stream(path, first.schema) as file:
            for table in itertools.chain([first], tables):
                file.write_table(table.cast(first.schema))
    except pa.ArrowException as error:
        what = f"can't be read as a table ({' '.join(str(error).split())[:200]})"
        raise DataError("rows from Python", what, "give a list of rows") from None
    return path


def describe(files: Sequence[DataFile]) -> str:
    """The names of the files, shortened where there are many."""
    names = [file.name for file in files]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
