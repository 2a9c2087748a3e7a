"""Control tokens that a message only spells: they must reach the model as words.

A message that says <|end|> must not end a turn.  The template is given a letter of private use in each such place,
which it passes on as it would any other; behind the template the letter becomes the words again, at a place that is
known, and is encoded as words (`Encoder.encode_with_text`).

    Say <|end|>!  ->  Say \ue000!  ->  <|user|>Say \ue000!<|end|>  ->  <|user|>Say <|end|>!<|end|>, words at 12 to 19
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from phinetune.data.encode import Encoder, control_pattern
from phinetune.data.formats import Message
from phinetune.data.template import ChatTemplate

Span = tuple[int, int]
Letters = Mapping[str, str]  # letter -> the control token that it stands for


class Marks:
    """The control tokens of a tokenizer and its template; `special` are those that only a template may write."""

    def __init__(self, encoder: Encoder, template: ChatTemplate) -> None:
        added = encoder.added
        marks = {token for token, (_, t) in added.items() if token.strip() and (t.special or set(token) & set("<[{|"))}
        # What an assistant may say and mean: reasoning and tool marks that the template knows, such as <think>.
        sources = template.source + template.source_with_tools
        spoken = {token for token in marks if not added[token][1].special and token in sources}
        self.special = {token for token in marks if added[token][1].special}
        self._begins = sorted({mark[0] for mark in marks})
        self._longest = max(map(len, marks), default=0)
        self._all, self._unspoken = control_pattern(marks), control_pattern(marks - spoken)

    def spans(self, text: str) -> list[Span]:
        """Where a text spells them."""
        return [match.span() for match in self._all.finditer(text)]

    def hold(self, text: str, char: int) -> bool:
        """Whether a character of a text stands inside one."""
        near = self._all.finditer(text, max(char - self._longest, 0), char + self._longest)
        return any(match.start() < char < match.end() for match in near)

    def hide(
        self, messages: list[Message], tools: list[dict[str, Any]] | None
    ) -> tuple[list[Message], list[dict[str, Any]] | None, Letters]:
        """The conversation with a letter in place of each control token that it spells."""
        found: set[str] = set()
        for message in messages:
            pattern = self._of(message)
            for text in _strings(message):
                if any(begin in text for begin in self._begins):
                    found.update(pattern.findall(text))
        for text in _strings(tools):
            found.update(self._all.findall(text))
        if not found:
            return messages, tools, {}
        taken = {char for text in _strings([messages, tools]) for char in text}
        free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in taken)
        letters = dict(zip(sorted(found), free, strict=False))

        def hidden(value: Any, pattern: re.Pattern[str]) -> Any:
            return _mapped(value, lambda text: pattern.sub(lambda match: letters[match.group()], text))

        said = [{**hidden(message, self._of(message)), "role": message["role"]} for message in messages]
        return said, hidden(tools, self._all), {letter: token for token, letter in letters.items()}

    def _of(self, message: Message) -> re.Pattern[str]:
        return self._unspoken if message["role"] == "assistant" else self._all


def show(text: str, letters: Letters) -> tuple[str, list[Span], Callable[[Span], Span]]:
    """The text with words in place of letters, where they stand, and where a span of the text given is now."""
    pieces, starts, places = [], [], []
    at = grown = 0
    for match in _pattern(letters).finditer(text):
        token = letters[match.group()]
        pieces += [text[at : match.start()], token]
        starts.append(match.end())
        begin = match.start() + grown
        places.append((begin, begin + len(token)))
        grown += len(token) - 1
        at = match.end()
    sizes = [end - begin - 1 for begin, end in places]

    def moved(span: Span) -> Span:
        begin, end = (char + sum(s for start, s in zip(starts, sizes, strict=True) if start <= char) for char in span)
        return begin, end

    return "".join([*pieces, text[at:]]), places, moved


def show_all(value: Any, letters: Letters) -> Any:
    """A structure with words in place of letters in all its texts."""
    pattern = _pattern(letters)
    return _mapped(value, lambda said: pattern.sub(lambda match: letters[match.group()], said))


def _pattern(letters: Letters) -> re.Pattern[str]:
    return re.compile("[" + "".join(letters) + "]")


def _strings(value: Any) -> Iterator[str]:
    """Every text in a structure, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The structure with every text changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return value
