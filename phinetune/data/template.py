"""A chat template as a function from messages to text, as `apply_chat_template` calls it.

The template's variables are the tokenizer's special tokens and `data.chat_template_kwargs`.  A template that writes
the date is told one day for the whole run, so that a run resumed tomorrow sees the same tokens.
"""

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phinetune.data.formats import Message
from phinetune.errors import DataError, ModelError
from phinetune.untrusted import bounded

# A rendering takes some 0.2 ms and no more memory than its text, some times over.
RENDERING_SECONDS, SECONDS_A_CHARACTER = 0.3, 1e-7
RENDERING_BYTES = 1 << 28
LONGEST_ADDED, LONGEST_RATIO = 1 << 20, 16  # characters that a template may add, and make of each of a message's


class CannotRender(DataError):
    """A conversation that the chat template can't write, or whose turns can't be found in what it writes."""

    def __init__(self, reason: str) -> None:
        super().__init__("chat", reason, "change these messages, or the template by tokenizer_kwargs.chat_template")
        self.reason = reason


@dataclass(frozen=True)
class ChatTemplate:
    """`source` in Jinja; `source_with_tools` where the tokenizer has another one for conversations with tools."""

    source: str
    source_with_tools: str
    variables: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Any, kwargs: Mapping[str, Any] | None = None, today: str | None = None) -> "ChatTemplate":
        """The template of a tokenizer; `today` is a date such as 2026-01-31, the day it is by default."""
        plain, with_tools = (_with_fixed_date(source, today) for source in template_sources(tokenizer))
        given = {**tokenizer.special_tokens_map, **(kwargs or {})}
        # A template can't use what it doesn't name, and each variable costs time in every rendering.
        return cls(plain, with_tools, {name: given[name] for name in given if name in plain + with_tools})

    def render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation, or the prompt for its next assistant turn.

        Raises:
            CannotRender: with what the template says against it.
            ModelError: if it takes more time or memory than the writing of a text.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages:
            return ""
        characters = sum(len(str(value)) for message in messages for value in message.values())
        try:
            with bounded(RENDERING_SECONDS + characters * SECONDS_A_CHARACTER, RENDERING_BYTES + 4 * characters):
                texts, _ = render_jinja_template(
                    [messages],
                    tools,
                    chat_template=self.source_with_tools if tools else self.source,
                    add_generation_prompt=add_generation_prompt,
                    **self.variables,
                )
        except (TimeoutError, MemoryError) as error:
            raise _out_of_bounds(
                "takes too long" if isinstance(error, TimeoutError) else "takes too much memory"
            ) from None
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            raise CannotRender(f"the chat template refuses it ({' '.join(str(error).split())})") from error
        text = str(texts[0])
        if len(text) > LONGEST_ADDED + LONGEST_RATIO * (characters + len(str(tools or ""))):
            raise _out_of_bounds(f"makes {len(text):,} characters of {characters:,}")
        return text


def _out_of_bounds(what: str) -> ModelError:
    return ModelError("the chat template", what, "set tokenizer_kwargs.chat_template, or choose another model")


def writes_date(tokenizer: Any) -> bool:
    """Whether the template asks what day it is."""
    return any("strftime_now" in source for source in template_sources(tokenizer))


def template_sources(tokenizer: Any) -> tuple[str, str]:
    """The template for conversations without tools, and for those with."""
    return tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])


def _with_fixed_date(source: str, today: str | None) -> str:
    """The template with `strftime_now` answering for one day."""
    formats = set(re.findall(r"""strftime_now\(\s*["'](.*?)["']""", source))
    if not formats or today is None:
        return source
    day = datetime.date.fromisoformat(today)
    answers = "".join(f"{{% if format == {f!r} %}}{day.strftime(f)}{{% endif %}}" for f in sorted(formats))
    return f"{{% macro strftime_now(format) %}}{answers}{{% endmacro %}}{{{{ '' }}}}{source}"
