"""From a conversation to token ids and a mask: which tokens are learnt.

The text is what the tokenizer's own chat template writes, the ids one tokenisation of the whole, so a
trained model sees what a served one will.  Where each turn lies is found by rendering the conversation
as it grows.  A rendering of the first i messages is a beginning of the whole but for the template's own
ending (Phi-3 ends every rendering in <|endoftext|>), so that tail is taken off first:

    messages[:1]                <|user|>Hi<|end|>                                             <|endoftext|>
    messages[:1] + generation   <|user|>Hi<|end|><|assistant|>
    messages[:2]                <|user|>Hi<|end|><|assistant|>Hello!<|end|>                   <|endoftext|>
    the whole                   <|user|>Hi<|end|><|assistant|>Hello!<|end|><|user|>Bye<|end|>…<|endoftext|>
    span of the turn                                          [Hello!<|end|>]

A turn is learnt through its end-of-turn token, and the last one through the template's end of text.
"""

import re
from dataclasses import dataclass
from typing import Any

from phinetune.data.sources import Rejected, Row

Span = tuple[int, int]


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


class CannotRender(ValueError):
    """A conversation that the chat template can't write, or whose turns can't be found in what it writes."""


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
            return Rejected(row.where, str(error), row.raw)
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
        said = "8472"  # words that no template writes of its own
        chat = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        try:
            text, spans = self.spans(chat)
            opening = self.prompt(chat[:1]).rpartition(said)[2]
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
        tail = self._tail(messages, turns[0], text)
        spans = [self._turn_span(messages, index, text, tail) for index in turns]
        for message in messages:
            if message["content"].strip() not in text:
                raise CannotRender(f"the chat template does not write the {message['role']} message")
        return text, spans

    def _turn_span(self, messages: list[dict[str, Any]], index: int, text: str, tail: str) -> Span:
        prompt = self._render(messages[:index], add_generation_prompt=True)
        if not text.startswith(prompt):
            raise CannotRender(f"the chat template rewrites what stands before message {index + 1}")
        start = len(prompt)
        if index == len(messages) - 1:
            return start, self._end_of_turn(text, start, len(text))
        so_far = self._render(messages[: index + 1]).removesuffix(tail)
        if not text.startswith(so_far):
            raise CannotRender(f"the chat template rewrites message {index + 1} when others follow")
        return start, self._end_of_turn(text, start, len(so_far))

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """Behind the last control token of a turn; white space after it is never generated."""
        last = 0
        for match in self._control.finditer(text, start, end):
            last = match.end()
        return last or end

    def _tail(self, messages: list[dict[str, Any]], turn: int, text: str) -> str:
        """What the template writes behind any conversation, such as <|endoftext|>.

        It is where the rendering of an unfinished conversation leaves the whole; a point inside a control
        token is moved back to its beginning, since two control tokens may begin alike.
        """
        if turn == 0:
            return ""
        shorter = self._render(messages[:turn])
        leave = next((i for i, (a, b) in enumerate(zip(shorter, text, strict=False)) if a != b), len(shorter))
        for match in self._control.finditer(shorter):
            if match.start() < leave < match.end():
                leave = match.start()
        tail = shorter[leave:]
        return tail if text.endswith(tail) else ""

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
