"""From rows to examples: a conversation's texts (phinetune.data.texts) as token ids and a mask.

The ids are one tokenisation of the whole, so a trained model sees what a served one will.  A text that is longer than
`max_length` is left out, cut or split.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from phinetune.data.encode import Encoded, Encoder
from phinetune.data.example import PARTS, Example
from phinetune.data.findings import NOTHING, Finding
from phinetune.data.formats import Message, Rejected, Row
from phinetune.data.template import CannotRender, ChatTemplate
from phinetune.data.texts import Rendering, Texts
from phinetune.errors import DataError
from phinetune.recipe import DataConfig


@dataclass(frozen=True)
class Rendered:
    """A row's examples, and what is worth knowing about it."""

    examples: list[Example]
    findings: Finding = NOTHING


@dataclass(frozen=True)
class LastAnswer:
    """What a row's last answer replies to, the messages before it and the whole prompt's ids; what should be said."""

    messages: list[Message]
    prompt_ids: list[int]
    expected: str


class Renderer:
    """A chat template and its tokenizer as a function from rows to examples."""

    def __init__(self, template: ChatTemplate, encoder: Encoder, config: DataConfig, eos: str = "") -> None:
        self.template, self.encoder, self.config, self.eos = template, encoder, config, eos
        self.texts = Texts(template, encoder, config)

    @classmethod
    def of(cls, tokenizer: Any, config: DataConfig | None = None, **settings: Any) -> "Renderer":
        """Of a transformers tokenizer, with the data section of a recipe or some settings of it."""
        config = config or DataConfig(train="-", **settings)
        template = ChatTemplate.of(tokenizer, config.chat_template_kwargs, config.today)
        return cls(template, Encoder.of(tokenizer), config, tokenizer.eos_token or "")

    def render(self, row: Row) -> Rendered | Rejected:
        """The examples of one row, or why it can't be used."""
        return self.render_batch([row])[0]

    def render_batch(self, rows: Sequence[Row]) -> list[Rendered | Rejected]:
        """The same for many rows, whose texts are encoded together.

        Raises:
            DataError: for a row that is too long, where the strategy is to raise.
        """
        outcomes: list[tuple[list[Rendering], Finding] | Rejected] = [self._renderings_of(row) for row in rows]
        plain = [r for o in outcomes if not isinstance(o, Rejected) for r in o[0] if not r.as_text]
        encoded = iter(self.encoder.encode_batch([rendering.text for rendering in plain]))
        return [
            outcome if isinstance(outcome, Rejected) else self._examples(row, *outcome, encoded)
            for row, outcome in zip(rows, outcomes, strict=True)
        ]

    def prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """The text that asks the model for the next assistant turn."""
        return self.texts.prompt(messages, tools)

    def prompt_ids(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Its ids, in which what a message spells stays text.

        Raises:
            CannotRender: if the template doesn't write a message, or refuses them.
        """
        return list(self._encode(self.texts.asking(messages, tools)).ids)

    def last_answer(self, row: Row) -> LastAnswer | None:
        """A row's last answer, all that is learnt of it but its control tokens; None where nothing asks for it."""
        last = max((i for i, message in enumerate(row.messages) if message["role"] == "assistant"), default=0)
        if last == 0:
            return None
        asked = row.messages[:last]
        whole = self.renderings([*asked, {**row.messages[last], "train": True}], row.tools)[-1]
        if not whole.turns:
            return None
        begin, end = whole.turns[-1][1]
        expected = self.texts.control.sub("", whole.text[begin:end])
        return LastAnswer(asked, self.prompt_ids(asked, row.tools), expected)

    def turn_ids(self) -> list[int]:
        """The control tokens that end an assistant's words or open the next turn: no answer goes on past one."""
        return sorted({self.encoder.added[token][0] for token in self.texts.control_tokens()})

    def renderings(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[Rendering]:
        """The texts that a conversation becomes, and what is learnt of each.

        Raises:
            CannotRender: with the reason.
        """
        return self.texts.of(messages, tools, self._supervised(Row("", messages))[0])[0]

    def _renderings_of(self, row: Row) -> tuple[list[Rendering], Finding] | Rejected:
        try:
            if row.text is not None:
                rendering = Rendering(row.text + self.eos, [(0, len(row.text + self.eos))], [])
                rendering = replace(rendering, as_text=self.texts.marks.spans(row.text))
                return [rendering], Finding.CONTROL_TEXT if rendering.as_text else NOTHING
            supervise, messages = self._supervised(row)
            renderings, findings = self.texts.of(messages, row.tools, supervise)
            for rendering in renderings:
                rendering.text.encode()
        except CannotRender as error:
            return Rejected(row.where, error.reason, row.raw)
        except UnicodeEncodeError:
            return Rejected(row.where, "holds half a surrogate pair, which no tokenizer can read", row.raw)
        except RecursionError:
            return Rejected(row.where, "is nested too deeply to be a chat", None)
        if self.config.excess_length_strategy == "drop":
            for rendering in renderings:
                if len(rendering.text) > self.config.max_length * self._longest_token:
                    return Rejected(row.where, self._too_long(self.config.max_length + 1, "more than "), row.raw)
        return renderings, findings

    def _supervised(self, row: Row) -> tuple[str, list[Message]]:
        """What is learnt of a row, and its messages; those of a prompt say themselves that they aren't learnt."""
        supervise = self.config.supervise
        if supervise == "completion":
            return "assistant" if row.prompt else "all", row.messages
        if supervise != "all":
            return supervise, row.messages
        prompt = [{name: value for name, value in m.items() if name != "train"} for m in row.messages[: row.prompt]]
        return supervise, [*prompt, *row.messages[row.prompt :]]

    def _encode(self, rendering: Rendering) -> Encoded:
        if not rendering.as_text:
            return self.encoder.encode(rendering.text)
        try:
            return self.encoder.encode_with_text(rendering.text, rendering.as_text)
        except ValueError as error:
            raise CannotRender(f"spells control tokens, and {error}") from None

    def _examples(
        self, row: Row, renderings: list[Rendering], findings: Finding, encoded: Iterator[Encoded]
    ) -> Rendered | Rejected:
        pairs = [(rendering, None if rendering.as_text else next(encoded)) for rendering in renderings]
        examples: list[Example] = []
        try:
            for rendering, ready in pairs:
                ids = ready or self._encode(rendering)
                made, found = self._fit(row, rendering, ids)
                examples += made
                findings |= found | (Finding.UNWRITABLE if self.encoder.loses(rendering.text, ids.ids) else NOTHING)
        except CannotRender as error:
            return Rejected(row.where, error.reason, row.raw)
        examples = [example for example in examples if example.supervised]
        if not examples:
            return Rejected(row.where, "has no supervised token", row.raw)
        return Rendered(examples, findings)

    def _fit(self, row: Row, rendering: Rendering, encoded: Encoded) -> tuple[list[Example], Finding]:
        """The example, or what `excess_length_strategy` makes of one that is too long."""
        strategy, limit = self.config.excess_length_strategy, self.config.max_length
        if row.text is not None:
            return self._fit_text(row, encoded)
        if len(encoded.ids) <= limit:
            return [_example(row, rendering, encoded)], NOTHING
        if strategy == "raise":
            mend = "shorten it, raise data.max_length, or set data.excess_length_strategy"
            raise DataError(row.where, self._too_long(len(encoded.ids)), mend)
        if strategy == "drop":
            raise CannotRender(self._too_long(len(encoded.ids)))
        if strategy == "split":
            parts = self._split(rendering, encoded)
            return [_example(row, part, ids) for part, ids in parts], Finding.SPLIT
        for index, (_, end) in reversed(rendering.turns):  # truncate: whole turns first
            if index < len(rendering.messages) - 1 and encoded.token_at(end) <= limit:
                shorter, ids = self._again(rendering, rendering.messages[: index + 1])
                if len(ids.ids) <= limit:
                    return [_example(row, shorter, ids)], Finding.TRUNCATED
        cut = _example(row, rendering, encoded)
        ids, mask = cut.ids[:limit], cut.mask[:limit]
        if not mask[1:].any():
            raise CannotRender(f"has {len(encoded.ids):,} tokens, and no answer begins in the first {limit:,}")
        return [Example(row.where, ids, mask, _parts(rendering, encoded, limit))], Finding.WITHOUT_END

    def _split(self, rendering: Rendering, encoded: Encoded) -> list[tuple[Rendering, Encoded]]:
        """Several conversations of whole exchanges, each behind the system message."""
        messages = rendering.messages
        system = messages[:1] if messages[0]["role"] == "system" else []
        ends = [i for i in range(len(system) + 1, len(messages)) if messages[i]["role"] == "user"] + [len(messages)]
        exchanges = [messages[a:b] for a, b in zip([len(system), *ends], ends, strict=False)]
        parts: list[tuple[Rendering, Encoded]] = []
        part: list[Message] = []
        for exchange in exchanges:
            longer = self._again(rendering, [*system, *part, *exchange])
            if part and len(longer[1].ids) > self.config.max_length:
                part = []
                longer = self._again(rendering, [*system, *exchange])
                parts.append(longer)
            elif part:
                parts[-1] = longer
            else:
                parts.append(longer)
            if len(longer[1].ids) > self.config.max_length:
                raise CannotRender(f"has an exchange of {len(longer[1].ids):,} tokens: it can't be split further")
            part += exchange
        return [(part, ids) for part, ids in parts if part.learnt]

    def _again(self, rendering: Rendering, messages: list[Message]) -> tuple[Rendering, Encoded]:
        """Some messages of a conversation as one of their own: only what was learnt in it is learnt."""
        kept = {id(rendering.messages[index]) for index, _ in rendering.turns}
        marked = [{**m, "train": id(m) in kept} if m["role"] == "assistant" else m for m in messages]
        shorter = self.texts.of(marked, rendering.tools, rendering.supervise)[0][-1]
        return shorter, self._encode(shorter)

    def _fit_text(self, row: Row, encoded: Encoded) -> tuple[list[Example], Finding]:
        """Plain text: the tokenizer's own beginning, the words, the end of text; all of it learnt."""
        limit, strategy = self.config.max_length, self.config.excess_length_strategy
        ids = np.array([*self._opening_ids, *encoded.ids], np.int32)
        size = len(ids)

        def piece(start: int) -> Example:
            held = ids[start : start + limit]
            opening = len(self._opening_ids) if start == 0 else 0
            return Example(row.where, held, np.ones(len(held), bool), (0, 0, len(held) - opening, 0, opening))

        if size <= limit:
            return [piece(0)], NOTHING
        if strategy == "raise":
            raise DataError(row.where, self._too_long(size), "shorten it, or set data.excess_length_strategy")
        if strategy == "drop":
            raise CannotRender(self._too_long(size))
        if strategy == "truncate":
            return [piece(0)], Finding.WITHOUT_END
        # A piece begins with the last token of the one before: it predicts the first new one.
        return [piece(start) for start in range(0, size - 1, max(limit - 1, 1))], Finding.SPLIT

    def _too_long(self, tokens: int, more: str = "") -> str:
        return f"has {more}{tokens:,} tokens, above data.max_length={self.config.max_length:,}"

    @cached_property
    def _opening_ids(self) -> list[int]:
        """What the tokenizer writes in front of plain text, such as <s>."""
        encoding = self.encoder.tokenizer.encode("a", add_special_tokens=True)
        first = next((i for i, special in enumerate(encoding.special_tokens_mask) if not special), 0)
        return list(encoding.ids[:first])

    @cached_property
    def _longest_token(self) -> int:
        """Characters that one token stands for at most: a text that is longer than so many times has more tokens."""
        return max(map(len, self.encoder.tokenizer.get_vocab()))


def _example(row: Row, rendering: Rendering, encoded: Encoded) -> Example:
    ids = np.asarray(encoded.ids, np.int32)
    mask = np.zeros(len(ids), bool)
    for begin, end in rendering.learnt:
        mask[encoded.token_at(begin) : encoded.token_at(end)] = True
    return Example(row.where, ids, mask, _parts(rendering, encoded, len(ids)))


def _parts(rendering: Rendering, encoded: Encoded, limit: int) -> tuple[int, ...]:
    """Tokens of each of PARTS among the first `limit`."""
    counts = dict.fromkeys(PARTS, 0)
    for index, (begin, end) in [*rendering.words, *rendering.turns]:
        first, last = min(encoded.token_at(begin), limit), min(encoded.token_at(end), limit)
        counts[rendering.messages[index]["role"]] += last - first
    counts["template"] = limit - sum(counts.values())
    return tuple(counts.values())
