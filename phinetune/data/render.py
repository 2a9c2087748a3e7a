"""From a conversation to token ids and a mask: which tokens are learnt.

The text is what the tokenizer's own chat template writes, the ids one tokenisation of the whole, so a
trained model sees what a served one will.  A turn begins where the template's generation prompt for the
messages before it ends, and is learnt through the first control token behind its words; the last turn also
through what the template writes behind any conversation (Phi-3: <|endoftext|>).

    messages[:1] + generation   <|user|>Hi<|end|><|assistant|>
    the whole                   <|user|>Hi<|end|><|assistant|>Hello!<|end|><|user|>Bye<|end|><|assistant|>…<|endoftext|>
    span of the first answer                              [Hello!<|end|>]
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from phinetune.data.sources import Rejected, Row
from phinetune.errors import DataError

Span = tuple[int, int]

# A conversation in words that no template writes of its own.
PROBE = [{"role": "user", "content": "8472"}, {"role": "assistant", "content": "5309"}]


@dataclass(frozen=True)
class Example:
    """One row as the model sees it: `ids` and, for each, whether it is learnt."""

    where: str
    ids: list[int]
    mask: list[bool]

    @property
    def supervised(self) -> int:
        """Tokens that count in the loss: the first token of a row is predicted from nothing."""
        return sum(self.mask[1:])


class CannotRender(DataError):
    """A conversation that the chat template can't write, or whose turns can't be found in what it writes."""

    def __init__(self, reason: str) -> None:
        super().__init__("chat", reason, "change these messages, or the template by tokenizer_kwargs.chat_template")
        self.reason = reason


class Renderer:
    """A tokenizer's chat template as a function from messages to (text, spans) and (ids, mask)."""

    def __init__(self, tokenizer: Any, supervise: str = "assistant") -> None:
        self.tokenizer, self.supervise = tokenizer, supervise
        controls = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        controls |= set(tokenizer.all_special_tokens)
        pattern = "|".join(re.escape(token) for token in sorted(controls, key=len, reverse=True) if token.strip())
        self._control = re.compile(pattern) if pattern else re.compile(r"(?!)")

    def example(self, row: Row, max_length: int) -> Example | Rejected:
        """(ids, mask) of one row, or why it can't be used."""
        try:
            text, spans = self.spans(row.messages)
        except CannotRender as error:
            return Rejected(row.where, error.reason, row.raw)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if len(ids) > max_length:
            return Rejected(row.where, f"has {len(ids):,} tokens, above data.max_length={max_length:,}", row.raw)
        mask = [True] * len(ids) if self.supervise == "all" else _mask(offsets, spans)
        example = Example(row.where, ids, mask)
        if example.supervised == 0:
            return Rejected(row.where, "has no supervised token", row.raw)
        return example

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """The text that asks the model for the next assistant turn."""
        return self._render(messages, add_generation_prompt=True)

    def turn_ids(self) -> list[int]:
        """The control tokens that end an assistant's words or open the next turn: no answer goes on past one."""
        try:
            text, spans = self.spans(PROBE)
            opening = self.prompt(PROBE[:1]).rpartition(PROBE[0]["content"])[2]
        except CannotRender:
            return []
        found = [token for start, end in spans for token in self._control.findall(text, start, end)]
        found += self._control.findall(opening)
        return sorted({self.tokenizer.convert_tokens_to_ids(token) for token in found})

    def spans(self, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """The whole text, and the character spans of it that are learnt.

        Raises:
            CannotRender: with the reason.
        """
        self._refuse_control_text(messages)
        text = self._render(messages)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self.supervise == "last":
            turns = turns[-1:]
        spans = [self._turn_span(messages, index, text) for index in turns]
        for message in messages:
            if message["content"].strip() not in text:
                raise CannotRender(f"the chat template does not write the {message['role']} message")
        if turns[-1] == len(messages) - 1 and self._tail and text.endswith(self._tail):
            spans.append((len(text) - len(self._tail), len(text)))
        return text, spans

    def _turn_span(self, messages: list[dict[str, Any]], index: int, text: str) -> Span:
        """From behind the generation prompt to behind the first control token that follows the words."""
        content = messages[index]["content"].strip()
        if index == 0:  # nothing asked for it, so there is no generation prompt: its own words begin it
            start = text.index(content)
        else:
            prompt = self._render(messages[:index], add_generation_prompt=True)
            if not text.startswith(prompt):
                raise CannotRender(f"the chat template rewrites what stands before message {index + 1}")
            start = len(prompt)
        found = text.find(content, start)
        if found < 0:
            raise CannotRender(f"the chat template rewrites message {index + 1}")
        end = found + len(content)
        following = messages[index + 1]["content"].strip() if index + 1 < len(messages) else ""
        limit = text.find(following, end) if following else len(text)
        control = self._control.search(text, end, limit if limit >= 0 else len(text))
        return start, control.end() if control else end

    @cached_property
    def _tail(self) -> str:
        """What the template writes behind any conversation, such as <|endoftext|>; nothing for most.

        It is where the rendering of a question alone leaves that of the question answered; a point inside a
        control token is moved back to its beginning, since two control tokens may begin alike.
        """
        try:
            shorter, longer = self._render(PROBE[:1]), self._render(PROBE)
        except CannotRender:
            return ""
        leave = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(shorter))
        for match in self._control.finditer(shorter):
            if match.start() < leave < match.end():
                leave = match.start()
        tail = shorter[leave:]
        return tail if longer.endswith(tail) else ""

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        if not messages:
            return ""
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        try:
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            raise CannotRender(f"the chat template refuses it ({error})") from error

    def _refuse_control_text(self, messages: list[dict[str, Any]]) -> None:
        for index, message in enumerate(messages):
            found = self._control.search(message["content"])
            if found:
                raise CannotRender(
                    f"message {index + 1} ({message['role']}) spells the control token {found.group()}, "
                    "which the tokenizer would take for a real one"
                )


def _mask(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """True for tokens that begin inside a span and hold at least one character.

    Their end says nothing: Phi-3's control tokens take the white space behind them into their offsets.
    """
    return [left < right and any(start <= left < end for start, end in spans) for left, right in offsets]
