"""From a conversation to texts: what the tokenizer's own chat template writes, and which characters are learnt.

A turn begins where the generation prompt for the messages before it ends, and is learnt through the control token that
closes it; the last turn also through what the template writes behind any conversation (Phi-3: <|endoftext|>).

    messages[:1] + generation   <|user|>Hi<|end|><|assistant|>
    the whole                   <|user|>Hi<|end|><|assistant|>Hello!<|end|><|user|>Bye<|end|><|assistant|>…<|endoftext|>
    span of the first answer                              [Hello!<|end|>]

Some templates write an earlier turn otherwise than a last one (they strip reasoning, or move the system message).
Such a turn isn't learnt from the whole, which no model will ever have to answer like that, but as an example of its
own: the conversation up to it.
"""

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from phinetune.data.control_text import Letters, Marks, Span, show, show_all
from phinetune.data.encode import Encoder, control_pattern
from phinetune.data.findings import NOTHING, Finding
from phinetune.data.formats import Message
from phinetune.data.template import CannotRender, ChatTemplate
from phinetune.recipe import DataConfig

# A conversation in words that no template writes of its own.
PROBE = [{"role": "user", "content": "8472"}, {"role": "assistant", "content": "5309"}]
PROBE_SYSTEM = {"role": "system", "content": "3961"}
PROBE_TOOL = {"type": "function", "function": {"name": "p6157", "description": "", "parameters": {"type": "object"}}}
REASONING = ("reasoning_content", "thinking", "reasoning")  # names that transformers reads it under


@dataclass(frozen=True)
class Rendering:
    """A conversation as text, with the characters that are learnt.

    `turns` are the turns that are learnt from it (index of the message, span); `words` where the words of other
    messages stand (index, span); `as_text` the control tokens that a message only spells.
    """

    text: str
    learnt: list[Span]
    messages: list[Message]
    turns: list[tuple[int, Span]] = field(default_factory=list)
    words: list[tuple[int, Span]] = field(default_factory=list)
    as_text: list[Span] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    supervise: str = "assistant"


class Texts:
    """A chat template as a function from conversations to texts."""

    def __init__(self, template: ChatTemplate, encoder: Encoder, config: DataConfig) -> None:
        self.template, self.config = template, config
        self.marks = Marks(encoder, template)
        self.control = control_pattern(self.marks.special)

    def prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """The text that asks the model for the next assistant turn."""
        return self.template.render(messages, tools, add_generation_prompt=True)

    def asking(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> Rendering:
        """The same, in which what a message spells stays text.

        Raises:
            CannotRender: if the template doesn't write a message, or refuses them.
        """
        messages, tools, letters = self.marks.hide(self._settled(messages)[0], tools)
        text = self.prompt(messages, tools)
        self._check_tools(tools, text)
        self._words(messages, text, [])
        return _shown(Rendering(text, [], messages), letters)

    def control_tokens(self) -> list[str]:
        """Those that end an assistant's words or open the next turn: no answer goes on past one."""
        try:
            rendering = self.of(PROBE, None, "assistant")[0][0]
            opening = self.prompt(PROBE[:1]).rpartition(PROBE[0]["content"])[2]
        except CannotRender:
            return []
        # Behind the words: some templates open an answer with control tokens, too.
        learnt = [rendering.text[start:end].rpartition(PROBE[1]["content"])[2] for start, end in rendering.learnt]
        return [token for text in (*learnt, opening) for token in self.control.findall(text)]

    def of(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, supervise: str
    ) -> tuple[list[Rendering], Finding]:
        """The texts that a conversation becomes, with what is learnt of each; the whole is the last.

        Raises:
            CannotRender: with the reason.
        """
        settled, findings = self._settled(messages)
        hidden, tools, letters = self.marks.hide(settled, tools)
        renderings, found = self._texts(hidden, tools, supervise)
        findings |= found | (Finding.CONTROL_TEXT if letters else NOTHING)
        return [_shown(rendering, letters) for rendering in renderings], findings

    def _settled(self, messages: list[Message]) -> tuple[list[Message], Finding]:
        """The messages with a system message that the template doesn't write where the recipe wants it."""
        policy = self.config.unwritten_system
        if policy == "drop" or messages[0]["role"] != "system" or self._writes_system:
            return messages, NOTHING
        finding = Finding.SYSTEM_MOVED if policy == "prepend" else Finding.SYSTEM_IGNORED
        return _without_system(messages, policy == "prepend"), finding

    def _texts(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, supervise: str
    ) -> tuple[list[Rendering], Finding]:
        """The whole with the turns that can be learnt from it, behind examples of their own for those that can't."""
        text = self.template.render(messages, tools)
        self._check_tools(tools, text)
        assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [i for i in assistant if messages[i].get("train", i == assistant[-1] or supervise != "last")]
        findings = NOTHING
        if assistant and assistant[-1] < len(messages) - 1:
            findings |= Finding.UNANSWERED
        if messages[0]["role"] == "system" and not messages[0]["content"].strip():
            findings |= Finding.EMPTY_SYSTEM

        own: list[Rendering] = []
        lost = set()  # turns that are not learnt from the whole
        turns: list[tuple[int, Span]] = []
        for i in wanted:
            is_last = i == len(messages) - 1
            up_to = text if is_last else self.template.render(messages[: i + 1], tools)
            span = self._turn(messages, i, up_to, tools)
            if not self.control.search(up_to, *span):
                findings |= Finding.ENDLESS
            if text.startswith(up_to[: span[1]]):
                turns.append((i, span))
                continue
            lost.add(i)
            if self.config.rewritten_turns == "drop":
                raise CannotRender(f"the chat template writes message {i + 1} otherwise where others follow it")
            if self.config.rewritten_turns == "last":
                findings |= Finding.NOT_LEARNT
                continue
            findings |= Finding.REWRITTEN
            learnt = _joined([span, *self._tail_span(up_to)])
            words = self._words(messages[: i + 1], up_to, [(i, span)], tools)
            own.append(Rendering(up_to, learnt, messages[: i + 1], [(i, span)], words, [], tools, supervise))
        words = self._words(messages, text, turns, tools)
        marked = self._marked(messages, words, text, tools)
        if own and not turns and not marked and supervise != "all":
            return own, findings
        if supervise == "all":
            learnt = _without([(0, len(text))], [s for i, s in words if messages[i].get("train") is False or i in lost])
        else:
            learnt = [span for _, span in turns] + marked
            if turns and turns[-1][0] == len(messages) - 1:
                learnt += self._tail_span(text)
        return [*own, Rendering(text, _joined(learnt), messages, turns, words, [], tools, supervise)], findings

    def _turn(self, messages: list[Message], index: int, text: str, tools: list[dict[str, Any]] | None) -> Span:
        """Where the last turn of `text` is: from behind its prompt to behind the control token that closes it."""
        message = messages[index]
        content = (message["content"] or "").strip()
        if index == 0:  # nothing asked for it, so there is no generation prompt: its own words begin it
            start = self._end_of_answer(text, message["content"] or "", 0) - len(content)
        else:
            prompt = self.template.render(messages[:index], tools, add_generation_prompt=True)
            if not text.startswith(prompt):
                raise CannotRender(
                    f"the chat template's prompt for message {index + 1} is no beginning of what it writes with it"
                )
            start = len(prompt)
        reasoning = str(next((message[key] for key in REASONING if message.get(key)), "")).strip()
        said = text.find(reasoning, start)
        if said < 0:
            raise CannotRender(f"the chat template does not write the reasoning of message {index + 1}")
        said += len(reasoning)
        end = self._end_of_answer(text, message["content"], said) if content and not message.get("tool_calls") else -1
        if end >= 0:
            control = self.control.search(text, end)
            return start, control.end() if control else end
        end = self._end_of_turns(text)
        written = _squeezed(text[start:end])
        for what, said in (
            ("message", content),
            *(("tool call in message", call["function"]["name"]) for call in message.get("tool_calls") or ()),
        ):
            if _squeezed(said) not in written:
                raise CannotRender(f"the chat template does not write the {what} {index + 1} as it is")
        closing = [match.end() for match in self.control.finditer(text, start, end)]
        return start, closing[-1] if closing else start + len(text[start:end].rstrip())

    def _end_of_answer(self, text: str, content: str, start: int) -> int:
        """Behind an answer's words; what the template writes between prompt and words may hold the same ones, as in
        <|channel|>final<|message|>final."""
        for words in (self._opening + content, self._opening + content.strip(), content.strip()):
            if (begin := text.find(words, start)) >= 0:
                return begin + len(words)
        return -1

    def _end_of_turns(self, text: str) -> int:
        """Where the turns end: before what is written behind any conversation, or a header always written there."""
        closing = self._tail or self._header
        return len(text) - len(closing) if closing and text.endswith(closing) else len(text)

    def _tail_span(self, text: str) -> list[Span]:
        return [(len(text) - len(self._tail), len(text))] if self._tail and text.endswith(self._tail) else []

    def _words(
        self,
        messages: list[Message],
        text: str,
        turns: list[tuple[int, Span]],
        tools: list[dict[str, Any]] | None = None,
    ) -> list[tuple[int, Span]]:
        """Where the words of each message stand that isn't one of `turns`.

        Raises:
            CannotRender: for a message of somebody else's than the assistant's that isn't written.
        """
        spans = dict(turns)
        words: list[tuple[int, Span]] = []
        at = 0
        for index, message in enumerate(messages):
            if index in spans:
                at = spans[index][1]
                continue
            content = (message["content"] or "").strip()
            if not content:
                continue
            if message["role"] == "assistant" and index and content in self._own_words:
                prompt = self.template.render(messages[:index], tools, add_generation_prompt=True)
                at = len(prompt) if text.startswith(prompt) else at
                opening = self._opening if text.startswith(self._opening + content, at) else ""
                at += len(opening)
            claimed = [*spans.values(), *(span for _, span in words)]
            place = self._find_free(text, content, at, claimed)
            if place is None:  # as some templates write a tool's answer
                place = self._find_free(text, json.dumps(content, ensure_ascii=False)[1:-1], at, claimed)
            if place is None:
                if message["role"] == "assistant":
                    continue
                raise CannotRender(f"the chat template does not write the {message['role']} message as it is")
            words.append((index, place))
            if message["role"] != "system":
                at = max(at, place[1])
        return words

    def _find_free(self, text: str, words: str, start: int, claimed: list[Span]) -> Span | None:
        """The first place from `start` on, else from the beginning, that is no part of another message's.

        Nor does a message lie in a control token, or make one together with what stands beside it.
        """
        for begin in (start, 0):  # 0: perhaps the template moves it
            begin = text.find(words, begin)
            while begin >= 0:
                end = begin + len(words)
                free = not any(a < end and begin < b for a, b in claimed)
                if free and not self.marks.hold(text, begin) and not self.marks.hold(text, end):
                    return begin, end
                begin = text.find(words, begin + 1)
        return None

    def _marked(
        self, messages: list[Message], words: list[tuple[int, Span]], text: str, tools: list[dict[str, Any]] | None
    ) -> list[Span]:
        """The messages of others that are marked to be learnt, through the control token behind them."""
        spans = []
        for index, (begin, end) in words:
            if messages[index]["role"] == "assistant" or not messages[index].get("train"):
                continue
            up_to = self.template.render(messages[: index + 1], tools)
            limit = self._end_of_turns(up_to)
            if text.startswith(up_to[:limit]):  # the last place in it: its header may hold the same words
                said = text[begin:end]
                begin = up_to.rindex(said, 0, limit)
                end = begin + len(said)
            control = self.control.search(text, end)
            spans.append((begin, control.end() if control else end))
        return spans

    def _check_tools(self, tools: list[dict[str, Any]] | None, text: str) -> None:
        names = [tool["function"]["name"] for tool in tools or ()]
        if names and not (self._writes_tools and all(name in text for name in names)):
            raise CannotRender("the chat template does not write the tools")

    @cached_property
    def _writes_system(self) -> bool:
        asked = [PROBE_SYSTEM, PROBE[0]]
        try:
            texts = [self.prompt(asked), self.template.render([*asked, PROBE[1]])]
        except CannotRender:
            return False
        return all(PROBE_SYSTEM["content"] in text for text in texts)

    @cached_property
    def _writes_tools(self) -> bool:
        try:
            return PROBE_TOOL["function"]["name"] in self.template.render(PROBE[:1], [PROBE_TOOL])  # type: ignore[index]
        except CannotRender:
            return False

    @cached_property
    def _tail(self) -> str:
        """What the template writes behind any conversation, such as <|endoftext|>; nothing for most.

        It is where the rendering of a question alone leaves that of the question answered; a point inside a
        control token is moved back to its beginning, since two control tokens may begin alike.
        """
        try:
            shorter, longer = self.template.render(PROBE[:1]), self.template.render(PROBE)
        except CannotRender:
            return ""
        leave = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(shorter))
        for match in self.control.finditer(shorter):
            if match.start() < leave < match.end():
                leave = match.start()
        tail = shorter[leave:]
        return tail if longer.endswith(tail) else ""

    @cached_property
    def _own_words(self) -> str:
        """What the template writes of its own around a question and its answer."""
        try:
            text = self.template.render(PROBE)
        except CannotRender:
            return ""
        return text.replace(PROBE[0]["content"], "\0").replace(PROBE[1]["content"], "\0")

    @cached_property
    def _opening(self) -> str:
        """What the template writes between the generation prompt and an answer's words; nothing for most."""
        try:
            prompt, text = self.prompt(PROBE[:1]), self.template.render(PROBE)
        except CannotRender:
            return ""
        return text[len(prompt) :].partition(PROBE[1]["content"])[0] if text.startswith(prompt) else ""

    @cached_property
    def _header(self) -> str:
        """The opening of the next answer, where the template writes it behind every conversation; else nothing."""
        try:
            asked, prompt = self.template.render(PROBE[:1]), self.prompt(PROBE[:1])
        except CannotRender:
            return ""
        behind = prompt.rpartition(PROBE[0]["content"])[2]
        closing = self.control.search(behind)
        return behind[closing.end() :] if closing and asked == prompt else ""


def _shown(rendering: Rendering, letters: Letters) -> Rendering:
    """The rendering with the control tokens that its messages spell back in place, and every span moved along."""
    if not letters:
        return rendering
    text, places, moved = show(rendering.text, letters)
    return replace(
        rendering,
        text=text,
        learnt=[moved(span) for span in rendering.learnt],
        turns=[(index, moved(span)) for index, span in rendering.turns],
        words=[(index, moved(span)) for index, span in rendering.words],
        as_text=places,
        messages=show_all(rendering.messages, letters),
        tools=show_all(rendering.tools, letters),
    )


def _without(spans: list[Span], taken: list[Span]) -> list[Span]:
    """Spans without some parts of them."""
    for a, b in taken:
        spans = [part for begin, end in spans for part in ((begin, min(end, a)), (max(begin, b), end))]
    return [(begin, end) for begin, end in spans if begin < end]


def _joined(spans: list[Span]) -> list[Span]:
    """Spans in order, those that touch as one."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _without_system(messages: list[Message], prepend: bool) -> list[Message]:
    """The conversation without its system message, whose words may go in front of the first user message."""
    system, *rest = messages
    if prepend and system["content"].strip():
        index = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
        if index is None:
            raise CannotRender("has no user message to put the system message in front of")
        rest[index] = {**rest[index], "content": f"{system['content']}\n\n{rest[index]['content']}"}
    return rest


def _squeezed(text: str) -> str:
    return "".join(text.split())
