"""From a file to records, in chunks that a worker can take on: bounded memory, whatever the file's size.

A record is a decoded value with its number (the line of a text file, the number of a row elsewhere), or the reason
why there is none at this place.
"""

import codecs
import csv
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from phinetune.data.formats import Rejected, Row, to_row
from phinetune.data.sources import DataFile, open_sources
from phinetune.data.tables import table_records
from phinetune.errors import DataError

CHUNK_BYTES = 1 << 20
CHUNK_RECORDS = 500
LONGEST_LINE = 1 << 26  # bytes: no chat is longer, and a file without line ends must not fill the memory

KEPT_OF_A_BROKEN_ROW = 100_000  # characters
BROKEN_BYTES = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading and decompressing them raises

# An object with one of these is a row, not a holder of rows.
ROW_COLUMNS = {"messages", "conversations", "conversation", "prompt", "instruction", "question", "text"}

Record = tuple[int, Any]  # (number, value or Rejected)


@dataclass(frozen=True)
class Chunk:
    """A part of file number `file`: lines from number `first`, or records."""

    file: int
    first: int = 1
    lines: bytes | None = None
    records: list[Record] | None = None


def chunks(file: DataFile, number: int) -> Iterator[Chunk]:
    """The file in parts of about a megabyte or some hundred records.

    Raises:
        DataError: if the file as a whole can't be read, with the place where it breaks.
    """
    if file.kind == "lines":
        yield from _line_chunks(file, number)
        return
    part: list[Record] = []
    size = 0
    for record in RECORD_READERS[file.kind](file):
        part.append(record)
        size += _characters(record[1])
        if len(part) == CHUNK_RECORDS or size > CHUNK_BYTES:
            yield Chunk(number, records=part)
            part, size = [], 0
    if part:
        yield Chunk(number, records=part)


def _characters(value: Any) -> int:
    """About what a record takes."""
    size, left = 0, [value.raw if isinstance(value, Rejected) else value]
    while left:
        held = left.pop()
        size += len(held) if isinstance(held, str | bytes) else 8
        left += held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ()
    return size


def records(chunk: Chunk, file: DataFile) -> Iterator[Record]:
    """The records of a chunk."""
    if chunk.lines is None:
        yield from chunk.records or ()
        return
    for number, line in enumerate(chunk.lines.split(b"\n"), chunk.first):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            where = file.place(number)
            reason = file.unreadable.get(number)
            yield number, Rejected(where, reason) if reason else decode_line(line, where)


def rows(chunk: Chunk, file: DataFile) -> Iterator[tuple[int, Row | Rejected]]:
    """The rows of a chunk, in the format that the file is said to have."""
    for number, value in records(chunk, file):
        if isinstance(value, Rejected):
            yield number, value
        else:
            yield number, to_row(value, file.place(number), file.format, file.columns)


def read_rows(source: Any) -> Iterator[Row | Rejected]:
    """The rows of a source, one after the other, as they are read.

    Raises:
        DataError: for a file that isn't there, can't be read, or isn't of a known kind.
    """
    with open_sources(source) as files:
        for file in files:
            for chunk in chunks(file, 0):
                yield from (row for _, row in rows(chunk, file))


def decode_line(line: bytes, where: str) -> Any:
    """The JSON value of a line, or a Rejected."""
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 ({error.reason} at byte {error.start})"
        if b"\0" in line[:64]:
            what += ", perhaps UTF-16"
        return Rejected(where, what, line[:KEPT_OF_A_BROKEN_ROW].decode("latin-1"))
    try:
        return _decoder.checked(_decoder.decode(text), where)
    except json.JSONDecodeError as error:
        reason = f"is not valid JSON ({error.msg} at column {error.colno})"
    except RecursionError:
        reason = "is nested too deeply to be a chat"
    except ValueError as error:  # a number of too many digits
        reason = f"is not valid JSON ({error})"
    _decoder.faults.clear()
    return Rejected(where, reason, text[:KEPT_OF_A_BROKEN_ROW])


class _Faulty(dict[str, Any]):
    """What stands where JSON has a fault."""

    fault: str


def _fault_in(value: Any) -> str | None:
    """A fault that `_Decoder` has noted in a part of what it decoded."""
    left = [value]
    while left:
        held = left.pop()
        if isinstance(held, _Faulty):
            return held.fault
        left += held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()
    return None


class _Decoder(json.JSONDecoder):
    """JSON that notes what Python would settle in silence: keys that stand twice, NaN and Infinity."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object, parse_constant=self._constant)
        self.faults: list[str] = []

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            made = _Faulty(made)
            made.fault = f"has the key {twice!r} twice, and which one counts is not said"
            self.faults.append(made.fault)
        return made

    def _constant(self, name: str) -> Any:
        made = _Faulty()
        made.fault = f"is not valid JSON ({name})"
        self.faults.append(made.fault)
        return made

    def checked(self, value: Any, where: str) -> Any:
        """The value, or a Rejected for the faults noted since the last one."""
        faults, self.faults = self.faults, []
        return Rejected(where, faults[0], value) if faults else value


_decoder = _Decoder()


def _line_chunks(file: DataFile, number: int) -> Iterator[Chunk]:
    first, kept = 1, b""
    with _readable(file), file.open() as stream:
        while block := stream.read(CHUNK_BYTES):
            end = block.rfind(b"\n")
            if end < 0:
                kept += block
                if len(kept) > LONGEST_LINE:
                    what = f"has a line of more than {LONGEST_LINE >> 20} MB"
                    raise DataError(file.place(first + kept.count(b"\n")), what, "give one chat a line")
                continue
            lines, kept = kept + block[:end], block[end + 1 :]
            yield Chunk(number, first, lines)
            first += lines.count(b"\n") + 1
    if kept:
        yield Chunk(number, first, kept)


def _json_records(file: DataFile) -> Iterator[Record]:
    """The elements of an array, one at a time; of an object that holds one list of objects, those of the list.

    A file named .json that holds an object a line is read as lines.
    """
    with _readable(file), file.open() as stream:
        text = _Text(stream, file)
        opening = text.peek()
        if opening == "{":
            yield from _json_object(text, file)
        elif opening != "[":
            raise DataError(file.place(text.line), "is neither a JSON array nor an object a line", "correct the file")
        else:
            text.take(1)
            yield from _array(text, file)


def _array(text: "_Text", file: DataFile) -> Iterator[Record]:
    first = True
    while True:
        sign = text.peek()
        if sign == "]" and first:
            break
        line = text.line
        yield line, text.value(file.place(line))
        first = False
        sign = text.peek()
        if sign == "]":
            break
        if sign != ",":
            what = "ends in the middle of the array" if not sign else f"has {sign!r} where a comma should be"
            raise DataError(file.place(text.line), what, "correct the file; rows before this place can be read")
        text.take(1)
    text.take(1)
    if text.peek():
        raise DataError(file.place(text.line), "goes on behind the end of the array", "correct the file")


def _json_object(text: "_Text", file: DataFile) -> Iterator[Record]:
    """An object a line, or one object: a row by itself, or holding its rows in a list such as `data`."""
    line, value = text.line, text.value(file.place(text.line))
    whole, lists = value.raw if isinstance(value, Rejected) else value, []
    if isinstance(whole, dict) and not ROW_COLUMNS & set(whole):
        lists = [held for held in whole.values() if isinstance(held, list) and held and isinstance(held[0], dict)]
    is_faulty = isinstance(value, Rejected)  # in one of its rows, or around them
    is_holder = len(lists) == 1 and not isinstance(whole, _Faulty) and not text.peek()
    if is_holder and not (is_faulty and _fault_in({n: held for n, held in whole.items() if held is not lists[0]})):
        for number, row in enumerate(lists[0], 1):
            fault = _fault_in(row) if is_faulty else None
            yield number, Rejected(file.place(number), fault, row) if fault else row
        return
    yield line, value
    while text.peek():
        line = text.line
        yield line, text.value(file.place(line))


class _Text:
    """A file's text of which only the part at hand is in memory, with the line it has come to."""

    def __init__(self, stream: Any, file: DataFile) -> None:
        self.stream = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        self.file, self.buffer, self.at, self.line = file, "", 0, 1

    def more(self) -> bool:
        """Reads as much again as is held; False at the end of the file."""
        held = len(self.buffer) - self.at
        try:
            block = self.stream.read(max(CHUNK_BYTES, held))
        except UnicodeDecodeError as error:
            what = f"is not UTF-8 ({error.reason})"
            raise DataError(self.file.place(self.line), what, "save it as UTF-8") from None
        if held + len(block) > LONGEST_LINE:
            what = f"has a value of more than {LONGEST_LINE >> 20} MB"
            raise DataError(self.file.place(self.line), what, "give an array of chats")
        self.buffer, self.at = self.buffer[self.at :] + block, 0
        return bool(block)

    def peek(self) -> str:
        """The next character that isn't white space; nothing at the end."""
        while True:
            while self.at < len(self.buffer):
                if not self.buffer[self.at].isspace():
                    return self.buffer[self.at]
                self.line += self.buffer[self.at] == "\n"
                self.at += 1
            if not self.more():
                return ""

    def take(self, count: int) -> None:
        self.line += self.buffer.count("\n", self.at, self.at + count)
        self.at += count

    def value(self, where: str) -> Any:
        """The JSON value that begins here.

        Raises:
            DataError: for a broken one, since where the next would begin is not known.
        """
        while True:
            try:
                value, end = _decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self.buffer) - 16
                if cut_off and self.more():
                    continue
                reason = f"is not valid JSON ({error.msg})"
            except RecursionError:
                reason = "is nested too deeply to be a chat"
            except ValueError as error:
                reason = f"is not valid JSON ({error})"
            else:
                if end == len(self.buffer) and self.more():  # a number may go on in the next block
                    continue
                self.take(end - self.at)
                return _decoder.checked(value, where)
            _decoder.faults.clear()
            raise DataError(where, reason, "correct the file: where its next row begins is not known")


def _csv_records(file: DataFile, delimiter: str = ",") -> Iterator[Record]:
    csv.field_size_limit(LONGEST_LINE)
    with _readable(file), file.open() as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        reader = csv.reader(_bounded_lines(text, file), delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
            if not header or not any(header):
                raise DataError(file.place(1), "has no header", "name the columns in the first line")
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise DataError(
                    file.place(1), f"names the column {twice!r} twice", "give each column a name of its own"
                )
            line = reader.line_num + 1
            for fields in reader:
                if len(fields) == len(header):
                    yield line, dict(zip(header, fields, strict=True))
                elif fields:
                    what = f"has {len(fields)} fields where the header has {len(header)}"
                    yield line, Rejected(file.place(line), what, fields)
                line = reader.line_num + 1
        except csv.Error as error:
            what = f"is no valid CSV ({error})"
            raise DataError(file.place(reader.line_num), what, "correct the file") from None
        except UnicodeDecodeError as error:
            what = f"is not UTF-8 ({error.reason} behind this line)"
            raise DataError(file.place(reader.line_num), what, "save it as UTF-8") from None


def _bounded_lines(text: Any, file: DataFile) -> Iterator[str]:
    number = 0
    while line := text.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            what = f"has a line of more than {LONGEST_LINE >> 20} MB"
            raise DataError(file.place(number), what, "give one chat a line")
        yield line


def _parquet_records(file: DataFile) -> Iterator[Record]:
    from pyarrow import parquet

    with _table(file) as source:
        yield from table_records(parquet.ParquetFile(source).iter_batches(CHUNK_RECORDS), file)


def _arrow_records(file: DataFile) -> Iterator[Record]:
    from pyarrow import ArrowInvalid, ipc

    with _table(file) as source:
        try:
            reader = ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except ArrowInvalid:  # a stream, as `datasets` writes them
            source.seek(0)
            batches = iter(ipc.open_stream(source))
        yield from table_records(batches, file)


@contextmanager
def _table(file: DataFile) -> Iterator[Any]:
    """A table's bytes, from which one can read at any place."""
    from pyarrow import ArrowException

    try:
        with file.open() as stream:
            yield stream if not file.compression else io.BytesIO(stream.read())
    except DataError:
        raise
    except (ArrowException, ValueError, LookupError, ArithmeticError, *BROKEN_BYTES) as error:
        raise _unreadable(file, error) from None


RECORD_READERS: dict[str, Callable[[DataFile], Iterator[Record]]] = {
    "json": _json_records,
    "csv": _csv_records,
    "tsv": lambda file: _csv_records(file, "\t"),
    "parquet": _parquet_records,
    "arrow": _arrow_records,
}


@contextmanager
def _readable(file: DataFile) -> Iterator[None]:
    """Turns what goes wrong with a file's bytes into a DataError."""
    try:
        yield
    except BROKEN_BYTES as error:
        raise _unreadable(file, error) from None


def _unreadable(file: DataFile, error: BaseException) -> DataError:
    reason = " ".join(str(error).split())[:200]
    return DataError(file.name, f"is damaged, or not {file.kind}{file.compression} ({reason})", "correct the file")
