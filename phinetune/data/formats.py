"""From a record of any known format to a `Row`: recognised by its columns, or as the recipe says.

    messages            {"messages": [{"role": "user", "content": …}, …], "tools": […]}          OpenAI
    sharegpt            {"conversations": [{"from": "human", "value": …}, …], "system": …, "tools": …}
    alpaca              {"instruction": …, "input" or "context": …, "output": …, "system": …, "history": [[…, …], …]}
    prompt_completion   {"prompt": …, "completion": …}, each text or a list of messages
    pairs               {"question": …, "context": …, "answer": …} and the like, or any columns that the recipe names
    text                {"text": …}: learnt from end to end, without a chat template

A record that is none of them, or a damaged one, becomes a `Rejected` with the reason.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SAME_ROLE = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}
PAIRS = (
    *(("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer")),
    *(("input", "output"), ("prompt", "response"), ("problem", "solution"), ("user", "assistant")),
)
PREFERENCE = ("chosen", "rejected")

BESIDE = ("input", "context")  # what a question is about
_OF_ALL = {"system", "system_prompt", "tools"}
# What is read of a row of each format; other columns are left alone.
READ = {
    "messages": {"messages", "functions", *_OF_ALL},
    "sharegpt": {"conversations", "conversation", *_OF_ALL},
    "alpaca": {"instruction", *BESIDE, "output", "response", "history", *_OF_ALL},
    "prompt_completion": {"prompt", "completion", "label", *_OF_ALL},
    "pairs": {*BESIDE, *(column for pair in PAIRS for column in pair), *_OF_ALL},
    "text": {"text"},
}


@dataclass(frozen=True)
class Row:
    """One example to learn from: `messages` as the OpenAI format has them, or plain `text`.

    `where` is `file:line`, `format` how the record was read.  A message has `role` and `content`; it may have
    `tool_calls`, whose arguments are objects, and `train` (whether its tokens are learnt), and whatever else the
    template may know.
    """

    where: str
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    format: str = "messages"
    raw: Any = None
    prompt: int = 0
    """Messages at the beginning that are a prompt, of which nothing is learnt."""


@dataclass(frozen=True)
class Rejected:
    """A row that can't be used, and why."""

    where: str
    reason: str
    raw: Any = None


class _BadRow(ValueError):
    """The reason why a record can't be used."""


def to_row(record: Any, where: str, format: str = "auto", columns: Mapping[str, str] | None = None) -> Row | Rejected:
    """A decoded record as a `Row`, or the reason why it is none.

    Args:
        record: what the file holds at this place.
        where: `file:line`.
        format: one of the formats above; `auto` goes by the columns.
        columns: {"user": column, "assistant": column, "system": column}, or {"messages": column} and so on: our
            name of a column first, the file's second.
    """
    if not isinstance(record, Mapping):
        return Rejected(where, f"is {kind_of(record)}, not an object with `messages`", record)
    columns = columns or {}
    try:
        given = {str(key): value for key, value in record.items() if value is not None}
        if columns:
            given = _renamed(given, columns)
        if format == "auto":
            format = _recognise_named(given, columns) if columns else recognise(given)
        if unread := sorted(columns.keys() - READ[format]):
            raise _BadRow(f"is read as {format}, which knows no column {', '.join(unread)} (data.columns names it)")
        if {"user", "assistant"} <= columns.keys():  # nothing else is asked
            given = {name: value for name, value in given.items() if name not in BESIDE or name in columns}
        messages, tools = READERS[format](given)
        if format == "text":
            return Row(where, text=messages, format=format, raw=record)
        prompt = len(messages) - _completions(given) if format == "prompt_completion" else 0
        return Row(where, messages, tools, format=format, raw=record, prompt=prompt)
    except _BadRow as reason:
        return Rejected(where, str(reason), record)
    except RecursionError:
        return Rejected(where, "is nested too deeply to be a chat", None)


def recognise(record: Mapping[str, Any]) -> str:
    """The format of a record, by its columns."""
    if "messages" in record:
        return "messages"
    if "conversations" in record or "conversation" in record:
        return "sharegpt"
    if set(PREFERENCE) <= set(record):
        raise _BadRow("is a preference pair (chosen, rejected), which is not a chat to imitate")
    if "prompt" in record and "completion" in record:
        return "prompt_completion"
    if "instruction" in record and ("output" in record or "response" in record):
        return "alpaca"
    if any(set(pair) <= set(record) for pair in PAIRS):
        return "pairs"
    if "text" in record:
        return "text"
    keys = ", ".join(list(record)[:8]) or "nothing"
    raise _BadRow(f"has no `messages`, nor the columns of another known format (it has {keys})")


def _recognise_named(record: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The format of a record by the columns that the recipe names, else by all that it has."""
    try:
        return recognise({ours: record[ours] for ours in columns if ours in record})
    except _BadRow:
        return recognise(record)


def _messages(record: Mapping[str, Any]) -> tuple[list[Message], Any]:
    messages = _chat(_required(record, "messages"), "messages")
    return _with_system(record, messages), _tools(record.get("tools", record.get("functions")))


def _sharegpt(record: Mapping[str, Any]) -> tuple[list[Message], Any]:
    key = "conversations" if "conversations" in record else "conversation"
    messages = _chat(_required(record, key), key)
    return _with_system(record, messages), _tools(record.get("tools"))


def _alpaca(record: Mapping[str, Any]) -> tuple[list[Message], Any]:
    key = "output" if "output" in record else "response"
    asked = _asked(record, "instruction")
    history = _decoded(record.get("history", [])) or []
    if not isinstance(history, list):
        raise _BadRow(f"`history` is {kind_of(history)}, not a list of [question, answer]")
    messages: list[Message] = []
    for number, turn in enumerate(history, 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise _BadRow(f"turn {number} of `history` is not [question, answer]")
        messages += _exchange(_text(turn[0], "history"), _text(turn[1], "history"))
    messages += _exchange(asked, _text(_required(record, key), key))
    return _with_system(record, messages), _tools(record.get("tools"))


def _prompt_completion(record: Mapping[str, Any]) -> tuple[list[Message], Any]:
    if record.get("label") is False:
        raise _BadRow("is marked as a bad completion (label is false), which is not one to imitate")
    prompt, completion = _required(record, "prompt"), _required(record, "completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        asked = _chat(prompt, "prompt") if isinstance(prompt, list) else [_message("user", _text(prompt, "prompt"))]
        if isinstance(completion, list):
            said = _chat(completion, "completion")
        else:
            said = [_message("assistant", _text(completion, "completion"))]
        messages = [{**message, "train": False} if message["role"] == "assistant" else message for message in asked]
        return _with_system(record, messages + said), _tools(record.get("tools"))
    messages = _exchange(_text(prompt, "prompt"), _text(completion, "completion"))
    return _with_system(record, messages), _tools(record.get("tools"))


def _completions(record: Mapping[str, Any]) -> int:
    """How many messages a completion has."""
    return len(record["completion"]) if isinstance(record["completion"], list) else 1


def _pairs(record: Mapping[str, Any]) -> tuple[list[Message], Any]:
    user, assistant = next((pair for pair in PAIRS[::-1] if set(pair) <= set(record)), ("user", "assistant"))
    messages = _exchange(_asked(record, user), _text(_required(record, assistant), assistant))
    return _with_system(record, messages), _tools(record.get("tools"))


def _asked(record: Mapping[str, Any], column: str) -> str:
    """The question, and on lines of their own what it is about."""
    beside = [name for name in BESIDE if name in record and name != column]
    for name in beside:
        if not isinstance(record[name], str):
            mend = "data.columns: {user: …, assistant: …} leaves it out"
            raise _BadRow(f"`{name}` is {kind_of(record[name])}, not text ({mend})")
    parts = [_text(_required(record, column), column), *(_text(record[name], name) for name in beside)]
    return "\n".join(part for part in parts if part)


def _plain_text(record: Mapping[str, Any]) -> tuple[Any, Any]:
    text = _text(_required(record, "text"), "text")
    if not text.strip():
        raise _BadRow("`text` is empty")
    return text, None


READERS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "pairs": _pairs,
    "text": _plain_text,
}


def _renamed(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with the columns that the recipe names under our names; columns it doesn't name stay."""
    missing = [theirs for theirs in columns.values() if theirs not in record]
    optional = {columns.get(ours) for ours in ("system", "tools", "input", "context", "history")}
    if missing and not set(missing) <= optional:
        raise _BadRow(f"has no column {missing[0]} (it has {', '.join(list(record)[:8]) or 'nothing'})")
    named = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
    return {**{key: value for key, value in record.items() if key not in columns.values()}, **named}


def _chat(value: Any, name: str) -> list[Message]:
    """A list of messages, in the names of OpenAI or of ShareGPT."""
    value = _decoded(value)
    if not isinstance(value, list) or not value:
        raise _BadRow(f"`{name}` is empty or not a list")
    messages: list[Message] = []
    calls = 0
    for number, given in enumerate(value, 1):
        try:
            message = _one_message(given, calls)
        except _BadRow as reason:
            raise _BadRow(f"message {number} {reason}") from None
        calls += len(message.get("tool_calls") or ())
        messages.append(message)
    return messages


def _one_message(given: Any, calls: int) -> Message:
    """One message under OpenAI's names: role, content, tool_calls, train."""
    if not isinstance(given, Mapping):
        raise _BadRow(f"is {kind_of(given)}, not an object with `role` and `content`")
    message = {
        str(key): value if isinstance(value, str) else _plain(value)
        for key, value in given.items()
        if value is not None or key == "content"
    }
    role = message.pop("role", message.pop("from", None))
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    name = SAME_ROLE.get(role, role) if isinstance(role, str) else role
    if name not in (*ROLES, "function_call"):
        raise _BadRow(f"has the role {role!r}; known are {', '.join(ROLES)}")
    message = {"role": name, "content": message.pop("content", None), **message}
    if name == "function_call":
        message |= {"role": "assistant", "tool_calls": message["content"], "content": ""}
    if "function_call" in message:
        message["tool_calls"] = [message.pop("function_call")]
    given_calls = message.pop("tool_calls", None)
    if given_calls or name == "function_call":
        made = _tool_calls(given_calls, calls)
        message |= {"tool_calls": made} if made else {}  # templates take an empty list for calls
    message["content"] = _content(message)
    flags = [_flag(key, message.pop(key)) for key in ("train", "weight") if key in message]
    if flags:
        message["train"] = all(flags)
    return message


def _content(message: Message) -> Any:
    """The words of a message; None stays None where tool calls stand in their place."""
    role, content = message["role"], message["content"]
    if content is None and message.get("tool_calls") and role == "assistant":
        return None
    if isinstance(content, list):
        parts = []
        for part in content:
            if isinstance(part, str):
                parts.append(part)
            elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
                parts.append(part["text"])
            else:
                what = part.get("type") if isinstance(part, Mapping) else kind_of(part)
                raise _BadRow(f"({role}) has a content part that is no text ({what})")
        content = "".join(parts)
    if not isinstance(content, str):
        raise _BadRow(f"({role}) has {kind_of(content)} as content, not text")
    _check_text(content, f"({role})")
    return content


def _tool_calls(value: Any, calls_before: int) -> list[dict[str, Any]]:
    """Tool calls as templates read them: {"id", "type", "function": {"name", "arguments": object}}."""
    value = _decoded(value)
    given = [value] if isinstance(value, Mapping) else value
    if not isinstance(given, list):
        raise _BadRow(f"has {kind_of(given)} as tool calls, not a list")
    calls = []
    for number, call in enumerate(_plain(given), calls_before):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _BadRow("has a tool call without a function name")
        arguments = function.get("arguments", function.get("parameters", {}))
        arguments = _decoded(arguments) if arguments != "" else {}
        if not isinstance(arguments, Mapping):
            raise _BadRow(f"calls {function['name']} with arguments that are no JSON object")
        if isinstance(call, Mapping) and isinstance(call.get("id"), str):
            identity = call["id"]
        else:
            identity = f"call{number:05d}"
        calls.append(
            {"id": identity, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
        )
        _check_text(json.dumps(calls[-1], ensure_ascii=False), "(assistant)")
    return calls


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """Tool schemas as templates read them: {"type": "function", "function": {…}}; None where there are none."""
    if value is None or value == "":
        return None
    value = _plain(_decoded(value))
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise _BadRow("`tools` is not a list of objects")
    tools = [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in value]
    for tool in tools:
        if not isinstance(tool["function"], Mapping) or not isinstance(tool["function"].get("name"), str):
            raise _BadRow("`tools` holds a tool without a name")
        _check_text(json.dumps(tool, ensure_ascii=False), "`tools`")
    return tools or None


def _with_system(record: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    system = _text(record.get("system", record.get("system_prompt", "")), "system")
    if not system or messages[0] == _message("system", system):
        return messages
    return [_message("system", system), *messages]


def _exchange(user: str, assistant: str) -> list[Message]:
    return [_message("user", user), _message("assistant", assistant)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _required(record: Mapping[str, Any], column: str) -> Any:
    if column not in record:
        raise _BadRow(f"has no `{column}` (it has {', '.join(list(record)[:8]) or 'nothing'})")
    return record[column]


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise _BadRow(f"`{column}` is {kind_of(value)}, not text")
    _check_text(value, f"`{column}`")
    return value


def _check_text(text: str, whose: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"{whose} holds half a surrogate pair, which no tokenizer can read") from None


def _flag(name: str, value: Any) -> bool:
    if value not in (0, 1):
        raise _BadRow(f"has {name}={value!r}; it is 0 or 1, true or false")
    return bool(value)


def _decoded(value: Any) -> Any:
    """JSON that a file holds as text, such as tools in a Parquet column; text that is no JSON stays text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _plain(value: Any) -> Any:
    """What JSON can hold as it is; the dates and decimals of tables as text."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else str(value)


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
