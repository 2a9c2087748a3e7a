"""What a recipe's policies make of a row before it is rendered: keep it, leave it out, or end the run."""

import hashlib
import json
from collections.abc import Sequence

from phinetune.data.findings import NOTHING, Finding
from phinetune.data.formats import Message, Rejected, Row
from phinetune.data.texts import REASONING
from phinetune.errors import DataError
from phinetune.recipe import DataConfig


def check(row: Row, config: DataConfig) -> tuple[Row, Finding] | Rejected:
    """The row, with what is worth knowing about it; or why it is left out.

    Raises:
        DataError: for a row that a policy ends the run for.
    """
    findings = NOTHING
    if row.text is not None:
        return row, findings
    if not any(message["role"] == "assistant" or message.get("train") for message in row.messages):
        return Rejected(row.where, "has no assistant message, so there is nothing to learn", row.raw)
    empty = [
        f"message {number} ({message['role']}) is empty"
        for number, message in enumerate(row.messages, 1)
        if message["role"] in ("user", "assistant")
        and not (message["content"] or "").strip()
        and not message.get("tool_calls")
    ]
    for fault, policy, finding in (
        (empty[0] if empty else "", config.empty_turns, Finding.EMPTY_TURN),
        (order_fault(row.messages), config.role_order, Finding.ROLE_ORDER),
    ):
        if fault and policy == "raise":
            name = "empty_turns" if finding is Finding.EMPTY_TURN else "role_order"
            raise DataError(row.where, fault, f"correct it, or set data.{name}")
        if fault and policy == "drop":
            return Rejected(row.where, fault, row.raw)
        if fault:
            findings |= finding
    return row, findings


def order_fault(messages: Sequence[Message]) -> str:
    """What is wrong with the order of the roles; nothing where a system message, if any, comes first, user and
    assistant take turns, and tool messages follow a call."""
    before = ""
    called = False
    for number, message in enumerate(messages, 1):
        role = message["role"]
        expected = {
            "system": before == "",
            "user": before in ("", "system", "assistant"),
            "assistant": before in ("user", "tool"),
            "tool": before == "tool" or called,
        }[role]
        if not expected:
            behind = f"the {before}'s" if before else "nothing"
            return f"message {number} is the {role}'s behind {behind}"
        called = bool(message.get("tool_calls"))
        before = role
    return ""


def digest(row: Row) -> int:
    """64 bits of what a row says, ids and flags aside: two rows with the same are duplicates."""
    said = [row.text or "", json.dumps(row.tools, sort_keys=True) if row.tools else ""]
    for message in row.messages:
        said += (message["role"], message["content"] or "", *(str(message[key]) for key in REASONING if key in message))
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        if calls:
            said.append(json.dumps(calls, sort_keys=True))
    line = "\x1f".join(said).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")
