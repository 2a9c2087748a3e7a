"""Tokenised rows on disk: written in one pass of bounded memory, read by mapping.

ids.bin, mask.bin        the tokens of all examples, end to end (int32, bool)
rows.jsonl               the conversation of every row that is used, a line each
rejected.jsonl           every row that is not: its number, the reason, the record
examples.npz, rows.npz   a number or a few for each example and each row
manifest.json            written last: what is here, and a digest of it
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from phinetune.data.example import PARTS, Example
from phinetune.data.formats import Rejected, Row
from phinetune.machine.disk import write_text

MANIFEST = "manifest.json"


@dataclass
class Piece:
    """What a worker made of one chunk: arrays, so that it travels fast."""

    file: int
    number: Any  # (rows,) int64: of each used row
    hash: Any  # (rows,) uint64: of its conversation
    findings: Any  # (rows,) uint32
    examples: Any  # (rows,) int32: how many it became
    lengths: Any  # (examples,) int32
    supervised: Any  # (examples,) int32
    parts: Any  # (examples, 5) int32: tokens of each of PARTS
    ids: Any  # (tokens,) int32
    mask: Any  # (tokens,) bool
    rows: list[bytes]
    rejected: list[tuple[int, str, Any]]
    formats: Counter[str] = field(default_factory=Counter)
    drawn: int = 0  # rows that were tokenised,
    lost: int = 0  # and how many of them can't be used for what that showed


EXAMPLE_ARRAYS = ("lengths", "supervised", "parts")
ROW_ARRAYS = ("number", "hash", "findings", "examples")


class StoreWriter:
    """Appends pieces to a folder, in a `with` block; what isn't finished is no store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays: dict[str, list[Any]] = {name: [] for name in (*EXAMPLE_ARRAYS, *ROW_ARRAYS, "from_file", "bytes")}
        self.formats: Counter[str] = Counter()
        self.digests = [hashlib.sha256() for _ in range(3)]  # one each, since pieces may be cut elsewhere
        self.rejected = 0
        self.ids = (folder / "ids.bin").open("wb")
        self.mask = (folder / "mask.bin").open("wb")
        self.rows = (folder / "rows.jsonl").open("wb")
        self.rejections = (folder / "rejected.jsonl").open("w", encoding="utf-8")

    def append(self, piece: Piece) -> None:
        for name in (*EXAMPLE_ARRAYS, *ROW_ARRAYS):
            self.arrays[name].append(getattr(piece, name))
        self.arrays["from_file"].append(np.full(len(piece.number), piece.file, np.int32))
        self.arrays["bytes"].append(np.array([len(row) + 1 for row in piece.rows], np.int64))
        for file, array in ((self.ids, piece.ids), (self.mask, piece.mask)):
            file.write(array.tobytes())
        for digest, array in zip(self.digests, (piece.lengths, piece.ids, piece.mask), strict=True):
            digest.update(array.tobytes())
        self.rows.writelines(row + b"\n" for row in piece.rows)
        for number, reason, raw in piece.rejected:
            line = json.dumps([piece.file, number, reason, raw], default=str)
            self.rejections.write(line + "\n")
        self.rejected += len(piece.rejected)
        self.formats += piece.formats

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        for file in (self.ids, self.mask, self.rows, self.rejections):
            file.close()

    def finish(self, names: Sequence[str]) -> None:
        """Writes the rest, the manifest last; `names` are those of the files the rows come from."""
        self.__exit__()
        empty = {"parts": np.zeros((0, len(PARTS)), np.int32), "hash": np.zeros(0, np.uint64)}
        joined: dict[str, Any] = {
            name: np.concatenate(held) if held else empty.get(name, np.zeros(0, np.int64))
            for name, held in self.arrays.items()
        }
        np.savez(self.folder / "examples.npz", **{name: joined[name] for name in EXAMPLE_ARRAYS})
        np.savez(self.folder / "rows.npz", **{n: a for n, a in joined.items() if n not in EXAMPLE_ARRAYS})
        manifest = {
            "names": list(names),
            "rejected": self.rejected,
            "formats": dict(self.formats),
            "digest": hashlib.sha256(b"".join(d.digest() for d in self.digests)).hexdigest(),
            "bytes": {path.name: path.stat().st_size for path in self.folder.iterdir()},
        }
        for path in self.folder.iterdir():  # behind a power cut a manifest must not stand before what it names
            with path.open("rb") as file:
                os.fsync(file.fileno())
        write_text(self.folder / MANIFEST, json.dumps(manifest))


class Store:
    """A folder that a StoreWriter has finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        with (  # files of our own, since numpy leaves one that is damaged open
            (folder / "examples.npz").open("rb") as of_examples,
            (folder / "rows.npz").open("rb") as of_rows,
            np.load(of_examples) as examples,
            np.load(of_rows) as rows,
        ):
            self.lengths, self.supervised, self.parts = (examples[name] for name in EXAMPLE_ARRAYS)
            self.number, self.hash, self.findings, self.examples = (rows[name] for name in ROW_ARRAYS)
            self.file, self._bytes = rows["from_file"], rows["bytes"]
        self.digest: str = self.manifest["digest"]
        self.rejected: int = self.manifest["rejected"]
        self.formats: dict[str, int] = self.manifest["formats"]

    def is_whole(self) -> bool:
        """Whether its files are as long as they must be."""
        try:
            return all((self.folder / name).stat().st_size == size for name, size in self.manifest["bytes"].items())
        except FileNotFoundError:
            return False

    @cached_property
    def row_of_example(self) -> Any:
        return np.repeat(np.arange(len(self.number)), self.examples)

    @cached_property
    def _ids(self) -> Any:
        return self._mapped("ids.bin", np.int32)

    @cached_property
    def _mask(self) -> Any:
        return self._mapped("mask.bin", np.bool_)

    @cached_property
    def _begins(self) -> Any:
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    @cached_property
    def _row_begins(self) -> Any:
        return np.concatenate([[0], np.cumsum(self._bytes)])

    def where(self, row: int) -> str:
        return f"{self.manifest['names'][self.file[row]]}:{self.number[row]}"

    def example(self, index: int) -> Example:
        begin, end = self._begins[index], self._begins[index + 1]
        parts = tuple(self.parts[index].tolist())
        return Example(self.where(self.row_of_example[index]), self._ids[begin:end], self._mask[begin:end], parts)

    def row(self, index: int) -> Row:
        """The conversation of a row."""
        with (self.folder / "rows.jsonl").open("rb") as file:
            file.seek(self._row_begins[index])
            return row_from_json(file.read(int(self._bytes[index])), self.where(index))

    def rejections(self) -> Iterator[Rejected]:
        with (self.folder / "rejected.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                file, number, reason, raw = json.loads(line)
                yield Rejected(f"{self.manifest['names'][file]}:{number}", reason, raw)

    def _mapped(self, name: str, dtype: Any) -> Any:
        path = self.folder / name
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


class _Some:
    """Some things of a store by their numbers in it, read when they are asked for."""

    def __init__(self, store: Store, indices: Any) -> None:
        self.store, self.indices = store, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(self.store, self.indices[index])
        return self._read(int(self.indices[index]))

    def _read(self, index: int) -> Any:
        raise NotImplementedError


class Examples(_Some, Sequence[Example]):
    """Some examples of a store; `lengths` and `supervised` of all of them are at hand."""

    def _read(self, index: int) -> Example:
        return self.store.example(index)

    @property
    def lengths(self) -> Any:
        return self.store.lengths[self.indices]

    @property
    def supervised(self) -> Any:
        return self.store.supervised[self.indices]

    @property
    def files(self) -> Any:
        """The number of the file that each comes from."""
        return self.store.file[self.store.row_of_example[self.indices]]


class Rows(_Some, Sequence[Row]):
    """Some conversations of a store."""

    def _read(self, index: int) -> Row:
        return self.store.row(index)


def row_to_json(row: Row) -> bytes:
    held: dict[str, Any] = {"messages": row.messages} if row.text is None else {"text": row.text}
    if row.tools:
        held["tools"] = row.tools
    return json.dumps(held, ensure_ascii=False).encode(errors="surrogatepass")


def row_from_json(line: bytes, where: str) -> Row:
    held = json.loads(line.decode(errors="surrogatepass"))
    return Row(where, held.get("messages", []), held.get("tools"), held.get("text"), "stored", held)
