"""From files to rows: where each row stands, and the rows that are no chat.

A later reader of other formats returns the same `Row`s.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from phinetune.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
SHIPPED = "phinetune:"


@dataclass(frozen=True)
class Row:
    """One chat: `where` is `file:line`, `messages` as the OpenAI format has them."""

    where: str
    messages: list[dict[str, Any]]
    raw: Any = None


@dataclass(frozen=True)
class Rejected:
    """A row that can't be used, and why."""

    where: str
    reason: str
    raw: Any = None


def read_rows(source: str | Sequence[Any]) -> Iterator[Row | Rejected]:
    """The rows of a JSON Lines file, of several, of a shipped set (`phinetune:orders/train`) or of a list.

    Raises:
        DataError: for a file that isn't there, can't be read, or isn't text.
    """
    if isinstance(source, str):
        yield from _read_json_lines(_shipped(source) if source.startswith(SHIPPED) else Path(source), source)
    elif all(isinstance(item, str) for item in source):
        for path in source:
            yield from read_rows(path)
    else:
        for index, item in enumerate(source):
            yield check_row(item, f"row {index}")


def check_row(value: Any, where: str) -> Row | Rejected:
    """A decoded line as a `Row`, or the reason why it is none."""
    if not isinstance(value, Mapping):
        return Rejected(where, f"is {_kind(value)}, not an object with `messages`", value)
    messages = value.get("messages")
    if messages is None:
        keys = ", ".join(list(map(str, value))[:8]) or "nothing"
        return Rejected(where, f"has no `messages` (it has {keys})", value)
    if not isinstance(messages, list) or not messages:
        return Rejected(where, "`messages` is empty or not a list", value)
    for index, message in enumerate(messages):
        reason = _check_message(message)
        if reason:
            return Rejected(where, f"message {index + 1} {reason}", value)
    if not any(message["role"] == "assistant" for message in messages):
        return Rejected(where, "has no assistant message, so there is nothing to learn", value)
    return Row(where, [dict(message) for message in messages], value)


def _check_message(message: Any) -> str:
    if not isinstance(message, Mapping):
        return f"is {_kind(message)}, not an object with `role` and `content`"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return f"has the role {role!r}; known are {', '.join(ROLES)}"
    if not isinstance(content, str):
        return f"({role}) has {_kind(content)} as content, not text"
    if role == "assistant" and not content.strip():
        return "(assistant) is empty"
    if any("\ud800" <= char <= "\udfff" for char in content):
        return f"({role}) holds half a surrogate pair, which no tokenizer can read"
    return ""


def _read_json_lines(path: Path, said: str) -> Iterator[Row | Rejected]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(said, "no such file", "give the path of a JSON Lines file of chats") from None
    except OSError as error:
        raise DataError(said, f"can't be read ({error.strerror})", "give a JSON Lines file of chats") from None
    with file:
        number = 0
        for number, line in enumerate(file, 1):
            where = f"{said}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                yield check_row(json.loads(text), where)
            except UnicodeDecodeError as error:
                yield Rejected(where, f"is not UTF-8 ({error.reason} at byte {error.start})", line.decode("latin-1"))
            except json.JSONDecodeError as error:
                yield Rejected(where, f"is not valid JSON ({error.msg} at column {error.colno})", text)
            except RecursionError:
                yield Rejected(where, "is nested too deeply to be a chat", text[:1000])
        if number == 0:
            raise DataError(said, "is empty", "put one chat a line in it")


def _shipped(name: str) -> Path:
    set_name, _, split = name.removeprefix(SHIPPED).partition("/")
    path = Path(str(resources.files("phinetune.data.shipped") / f"{set_name}.{split}.jsonl"))
    if not path.is_file():
        shipped = sorted(p.name.removesuffix(".jsonl").replace(".", "/") for p in path.parent.glob("*.jsonl"))
        raise DataError(name, "no such shipped data set", f"there are {', '.join(SHIPPED + s for s in shipped)}")
    return path


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
