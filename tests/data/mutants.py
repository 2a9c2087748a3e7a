"""Chat data files, damaged in the ways of the wild, with the counts that a reader has to come to.

The counts follow from what was written, never from a reader.  A mutant depends on (seed, index) alone.  Where sane
readers may differ on a row, `good` is None for its file; where they may differ on what a record is, `rows` is too.
"""

import bz2
import csv
import dataclasses
import datetime
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
Verdict = bool | None


@dataclass(frozen=True)
class Mutant:
    """A file: its records that aren't blank, and how many of them are valid chats which must be used."""

    name: str
    suffix: str
    content: bytes
    rows: int | None  # None: the file as a whole may be refused
    good: int | None  # None: not known


def mutants(seed: int, count: int) -> Iterator[Mutant]:
    """The first `count` mutants of a seed, one at a time: a few in ten thousand hold a line of 50 MB."""
    for index in range(count):
        mutant = _mutant(random.Random(f"{seed}/{index}"))
        yield dataclasses.replace(mutant, name=f"{index}-{mutant.name}")


def _mutant(rng: random.Random) -> Mutant:
    if rng.random() < 1 / 2500:
        return _huge(rng)
    mutant = rng.choices((_json_lines, _json_array, _separated, _columns, _squeezed), (50, 14, 16, 12, 8))[0](rng)
    if mutant.suffix in SQUEEZABLE and rng.random() < 0.1:
        name = rng.choice(list(SQUEEZERS))
        return dataclasses.replace(mutant, suffix=mutant.suffix + name, content=SQUEEZERS[name](mutant.content))
    return mutant


def _words(text: str) -> list[str]:
    return text.split()


# -- Good rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """How a format spells a chat; without `turns` a row is one question and one answer."""

    user: str  # role of the user, or key of the question
    bot: str  # role of the assistant, or key of the answer
    turns: str = ""
    role: str = ""
    text: str = ""


OPENAI = _Form("user", "assistant", "messages", "role", "content")
SHAREGPT = _Form("human", "gpt", "conversations", "from", "value")
ALPACA = _Form("instruction", "output")
FLAT = (ALPACA, _Form("prompt", "completion"), _Form("question", "answer"))
FORMS = (OPENAI, SHAREGPT, *FLAT)

PLAIN = _words("amber birch canyon delta ember fjord gravel harbour island jetty kelp lagoon meadow naïve café Ärger")
WORDS = [*PLAIN, "it's", '"quoted"', "a,b", "x;y", "back\\slash", "two\nlines", "tab\there", "{x}", "[1]", "日本語"]
WORDS += ["😀", "👩‍👩‍👧", "e\u0301", "שלום", "“curly”", "</b>", "ſ", "/", "100 %", "\u00a0"]


class _Maker:
    """Rows of one format, no text twice."""

    def __init__(self, rng: random.Random, forms: Sequence[_Form] = FORMS, words: Sequence[str] = WORDS):
        self.rng, self.form, self.words = rng, rng.choice(forms), words
        self.texts = 0

    def text(self) -> str:
        self.texts += 1
        return f"{' '.join(self.rng.choices(self.words, k=self.rng.randint(1, 6)))} {self.texts}"

    def row(self) -> Row:
        form = self.form
        if form is ALPACA:
            return {form.user: self.text(), "input": self.rng.choice(["", self.text()]), form.bot: self.text()}
        if not form.turns:
            return {form.user: self.text(), form.bot: self.text()}
        turns = [self.turn(role) for _ in range(self.rng.randint(1, 3)) for role in (form.user, form.bot)]
        if form is OPENAI and self.rng.random() < 0.3:
            turns.insert(0, self.turn("system"))
        row: Row = {form.turns: turns}
        if form is SHAREGPT and self.rng.random() < 0.5:
            row["system"] = self.text()
        return row

    def rows(self, most: int = 6) -> list[Row]:
        return [self.row() for _ in range(self.rng.randint(1, most))]

    def turn(self, role: str) -> Row:
        return {self.form.role: role, self.form.text: self.text()}

    def place(self, row: Row, *roles: str) -> tuple[Any, str]:
        """Where one text of the row lies: of these roles, or of any."""
        form = self.form
        if not form.turns:
            return row, self.rng.choice(roles or (form.user, form.bot))
        turns = [turn for turn in row[form.turns] if not roles or turn[form.role] in roles]
        return self.rng.choice(turns), form.text

    def spell(self, row: Any) -> str:
        """JSON on one line."""
        separators = self.rng.choice([(", ", ": "), (",", ":"), (" ,\t", " :  ")])
        return json.dumps(row, ensure_ascii=self.rng.random() < 0.3, separators=separators)


# -- Rows, damaged -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """A record as it stands in the file."""

    raw: bytes
    good: Verdict
    sound: bool = True  # JSON to every parser, so that an array with it can still be read
    rows: int = 1


Damage = Callable[[_Maker, Row], _Line]
DAMAGES: dict[str, tuple[Sequence[_Form], Damage]] = {}
CHATS = (OPENAI, SHAREGPT)


def _damage(
    name: str, forms: Sequence[_Form] = FORMS, good: Verdict = False, sound: bool = False
) -> Callable[[Callable[[_Maker, Row], str | bytes]], None]:
    """Enters a function that spells a damaged row."""

    def enter(spell: Callable[[_Maker, Row], str | bytes]) -> None:
        def damage(make: _Maker, row: Row) -> _Line:
            raw = spell(make, row)
            raw = raw.encode() if isinstance(raw, str) else raw
            return _Line(raw, good, sound, rows=1 + raw.count(b"\n"))

        DAMAGES[name] = forms, damage

    return enter


MARK = "\ue000"
DROP = object()
DEPTH = 100_000
DEEP = [b"[" * DEPTH, b"[" * DEPTH + b"]" * DEPTH, b'{"a":' * DEPTH + b"1" + b"}" * DEPTH, b'[{"a":' * DEPTH]
BLANKS = ["", " ", "\n\t ", "\r\n", "\u00a0", "\u3000", "\u2028"]
TOKENS = _words("<|im_end|> <|im_start|>assistant <|endoftext|> </s> <s> <|end|> <|user|> [INST] <|eot_id|>")
PARTS = [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}

# What is put into the middle of a text.
INSERTS: dict[str, tuple[list[bytes], Verdict, bool]] = {
    "nul-raw": ([b"\0", b"\0" * 100], False, False),
    "control-raw": ([bytes([code]) for code in range(1, 32) if code != 10], False, False),
    "vertical-white-space-raw": ([b"\v", b"\f", b"\x1c", b"\x1d", b"\x1e", b"\r"], False, False),
    "newline-raw": ([b"\n"], False, False),
    "quote-raw": ([b'"'], False, False),
    "nul-escaped": ([rb"\u0000"], None, True),
    "control-escaped": ([rb"\u0001", rb"\b", rb"\f", rb"\u001b", rb"\u000b", rb"\u001c", rb"\r", b"\x7f"], True, True),
    "line-separator": (["\u2028".encode(), "\u2029".encode(), "\u0085".encode(), rb"\u2028", rb"\u0085"], True, True),
    "latin1-byte": ([b"\xe9 ", b"\xa0 ", b"\xfc "], False, False),
    "overlong": ([b"\xc0\xaf", b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf"], False, False),
    "utf8-cut": ([b"\xe2\x82", b"\xf0\x9f\x98", b"\xc3", b"\x80", b"\xff", b"\xf5\x80\x80\x80"], False, False),
    "surrogate-bytes": ([b"\xed\xa0\xbd\xed\xb8\x80", b"\xed\xa0\x80", b"\xed\xbf\xbf"], False, False),
    "surrogate-escaped": ([rb"\ud800", rb"\udfff", rb"\ude00\ud83d", rb"\ud83dx", rb"\uD800"], False, True),
    "surrogate-pair": ([rb"\ud83d\ude00", rb"\uD83D\uDE00" * 50], True, True),
    "escape-unknown": ([rb"\x41", rb"\u12 ", rb"\uZZZZ", rb"\u{1F600}", rb"\U0001F600", rb"\'", rb"\ "], False, False),
    "escapes": ([rb"\u0048\u0069", rb"\u0041" * 5000, rb"\\u0041", rb"\/", rb"\\" * 1000, rb"\uFEFF"], True, True),
    "control-token": ([token.encode() for token in TOKENS], True, True),
    "bom-in-text": (["\ufeff".encode()], True, True),
    "odd-text": (["\u202e\u200b".encode(), b"a" + "\u0301".encode() * 1000, "\uffff\U0010ffff".encode()], True, True),
    "long-text": ([b"long " * 200_000], True, True),
}  # fmt: skip

# What takes the place of a text, without quotes.
TEXT_VALUES: dict[str, list[bytes]] = {
    "nan-as-text": [b"NaN", b"Infinity", b"-Infinity"],
    "number-as-text": [b"1e400", b"-1e400", b"1" * 5000, b"1" * 100_000, b"0.1e-999"],
    "no-json-as-text": [b"None", b"undefined", b"'hi'", b".5", b"+1", b"0x10", b"01", b"1.", b"", b"`hi`", b"hi", b"-"],
    "nesting-as-text": DEEP,
}

# What a key of no meaning holds.
EXTRAS: dict[str, tuple[list[bytes], Verdict, bool]] = {
    "extra-key": ([b'"x"', b"null", b"[]", b'{"a": [1, {"b": null}]}', b"-0", b"[" * 50 + b"]" * 50], True, True),
    "big-number": ([b"1" * 30, b"-1" + b"0" * 300, b"0." + b"1" * 400], True, True),
    "huge-number": ([b"1" * 5000, b"-" + b"1" * 100_000, b"1e400", b"-1e400", b"1e-400"], None, False),
    "nan": ([b"NaN", b"Infinity", b"-Infinity", b"[NaN]"], None, False),
    "nesting-in-extra-key": (DEEP[1:3], None, False),
    "surrogate-in-extra-key": ([rb'"\ud800"', rb'{"\udc00": 1}'], None, True),
}  # fmt: skip

# What JSON value takes a part's place: of the list of turns, of a turn, a role, a text.
VALUES: dict[str, tuple[str, list[Any], Verdict]] = {
    "turns-empty": ("turns", [[]], False),
    "turns-missing": ("turns", [DROP], False),
    "turns-not-a-list": ("turns", [None, "hi", 5, True, {}, {"role": "user", "content": "hi"}], False),
    "turn-not-an-object": ("turn", [None, "hi", 7, True, [], ["user", "hi"], {}], False),
    "role-missing": ("role", [DROP], False),
    "role-of-wrong-type": ("role", [None, 1, 1.5, True, [], {}, ["user"], {"role": "user"}], False),
    "role-unknown": ("role", ["", " ", "narrator", "usr", "user\0", "🤖", "x" * 10_000], False),
    "role-spelt-oddly": ("role", ["User", " user", "ASSISTANT ", "assistant\n", "Human", "bot", "model"], None),
    "text-missing": ("text", [DROP], False),
    "text-null": ("text", [None], False),
    "text-of-wrong-type": ("text", [5, 1.5, True, {}, {"text": "hi"}, [5], [None], [[]]], False),
    "image-part": ("text", [[IMAGE], [PARTS[0], IMAGE], [{"type": "input_audio", "input_audio": {}}]], False),
    "parts-malformed": ("text", [[], ["hi"], [{"type": "text"}], [{**PARTS[0], "text": 5}], [{"text": "hi"}]], None),
    "text-parts": ("text", [PARTS[:1], PARTS], True),
    "answer-missing": ("answer", [DROP], False),
    "answer-null": ("answer", [None], False),
    "answer-blank": ("answer", BLANKS, False),
    "question-blank": ("question", BLANKS, None),
    "system-of-wrong-type": ("system", [None, "", 5, [], {}, ["be brief"]], None),
    "weight-of-wrong-type": ("weight", [None, "1", -1, 0.5, True, [], {}, "no"], None),
    "tools-malformed": ("tools", [None, 5, "no", "[", {}, [5], [{}], [{"type": "function"}]], None),
}  # fmt: skip


def _enter_insert(name: str) -> None:
    payloads, good, sound = INSERTS[name]

    @_damage(name, FORMS, good, sound)
    def spell(make: _Maker, row: Row) -> bytes:
        target, key = make.place(row)
        middle = len(target[key]) // 2
        target[key] = target[key][:middle] + MARK + target[key][middle:]
        return _fill(make.spell(row), make.rng.choice(payloads))


def _enter_text_value(name: str) -> None:
    @_damage(name)
    def spell(make: _Maker, row: Row) -> bytes:
        target, key = make.place(row)
        target[key] = MARK
        return _fill(make.spell(row), make.rng.choice(TEXT_VALUES[name]), '"')


def _enter_extra(name: str) -> None:
    payloads, good, sound = EXTRAS[name]

    @_damage(name, FORMS, good, sound)
    def spell(make: _Maker, row: Row) -> bytes:
        target = make.rng.choice([row, *row.get(make.form.turns, [])])
        extra = {make.rng.choice(["id", "ts", "lang", "meta", "url", "", "ключ"]): MARK}
        _refill(target, make.rng.choice([{**extra, **target}, {**target, **extra}]))
        return _fill(make.spell(row), make.rng.choice(payloads), '"')


def _fill(text: str, payload: bytes, quote: str = "") -> bytes:
    """The payload where the mark stands."""
    for mark in (MARK, r"\ue000"):
        before, found, behind = text.partition(quote + mark + quote)
        if found:
            return before.encode() + payload + behind.encode()
    raise AssertionError("no mark")


def _refill(target: Row, items: Row) -> None:
    target.clear()
    target.update(items)


def _enter_value(name: str) -> None:
    part, values, verdict = VALUES[name]

    def damage(make: _Maker, row: Row) -> _Line:
        form, good = make.form, verdict
        turns: list[Any] = row.get(form.turns, [])
        target: Any = row
        key: Any = part  # system, tools
        match part:
            case "turns":
                key = form.turns
            case "turn":
                target, key = turns, make.rng.randrange(len(turns))
            case "role":
                target, key = make.rng.choice(turns), form.role
            case "text":
                target, key = make.place(row)
            case "answer":
                target, key = make.place(row, form.bot)
            case "question":
                target, key = make.place(row, form.user)
            case "weight":
                target, _ = make.place(row, form.bot)
        if key == ALPACA.user or (name == "text-parts" and form is not OPENAI):
            good = None  # `input` alone may do; parts are OpenAI's
        if name == "answer-blank" and len(turns) > 3:
            good = None  # of several answers one is left
        value = make.rng.choice(values)
        if value is DROP:
            del target[key]
        else:
            target[key] = value
        return _Line(make.spell(row).encode(), good)

    forms: Sequence[_Form] = CHATS if part in ("turns", "turn", "role", "weight") else FORMS
    DAMAGES[name] = {"system": (SHAREGPT,), "tools": (OPENAI,)}.get(part, forms), damage


for _table, _enter in (
    (INSERTS, _enter_insert), (TEXT_VALUES, _enter_text_value), (EXTRAS, _enter_extra), (VALUES, _enter_value)
):  # fmt: skip
    for _name in _table:
        _enter(_name)


@_damage("no-object", sound=True)
def _no_object(make: _Maker, row: Row) -> str:
    return make.spell(make.rng.choice([None, True, 5, -1.5, "hi", "", [], {}, ["a"], [[]], [row]]))


@_damage("bare-turns", CHATS, good=None, sound=True)
def _bare_turns(make: _Maker, row: Row) -> str:
    return make.spell(row[make.form.turns])


@_damage("row-as-text", good=None, sound=True)
def _row_as_text(make: _Maker, row: Row) -> str:
    return make.spell(make.spell(row))


@_damage("truncated")
def _truncated(make: _Maker, row: Row) -> bytes:
    raw = make.spell(row).encode()
    return raw[: make.rng.randrange(1, len(raw))]


@_damage("missing-mark")
def _missing_mark(make: _Maker, row: Row) -> str:
    """Without one of the marks that make up the JSON: a brace, a bracket, a quote, a comma or a colon."""
    text = make.spell(row)
    marks, inside, place = [], False, 0
    while place < len(text):
        if inside and text[place] == "\\":
            place += 1
        elif text[place] == '"' or (not inside and text[place] in "{}[],:"):
            marks.append(place)
            inside ^= text[place] == '"'
        place += 1
    mark = make.rng.choice('{}"",:')
    place = make.rng.choice([place for place in marks if text[place] == mark] or marks)
    return text[:place] + text[place + 1 :]


@_damage("single-quotes")
def _single_quotes(make: _Maker, row: Row) -> str:
    return repr(row)


@_damage("trailing-comma")
def _trailing_comma(make: _Maker, row: Row) -> str:
    text = make.spell(row)
    return make.rng.choice([text + ",", text[:-1] + ",}", "," + text])


@_damage("two-objects")
def _two_objects(make: _Maker, row: Row) -> str:
    between = make.rng.choice(["", " ", ", ", "\t", "\r", "\u2028", "\x1e", "\0"])
    return make.spell(row) + between + make.spell(make.row())


@_damage("garbage-around")
def _garbage_around(make: _Maker, row: Row) -> str:
    return make.rng.choice(["data: @", "@;", "@]", "[@", ")]}'@", "x@", "@ // note", "@\0"]).replace(
        "@", make.spell(row)
    )


@_damage("garbage")
def _garbage(make: _Maker, row: Row) -> bytes:
    return make.rng.choice(b'# note|---|hello|\0|{|}|[|"|,|nul|<html>|\xff\xff|\\|-'.split(b"|"))


@_damage("duplicate-key", good=None, sound=True)
def _duplicate_key(make: _Maker, row: Row) -> str:
    text, key = make.spell(row), make.rng.choice(list(row))
    value = make.spell(make.rng.choice([row[key], make.row().get(key), None, [], "", "hi"]))
    return f'{text[:-1]}, "{key}": {value}}}'


@_damage("duplicate-key-in-message", CHATS, good=None, sound=True)
def _duplicate_key_in_message(make: _Maker, row: Row) -> bytes:
    target, _ = make.place(row)
    target[MARK] = make.rng.choice(["system", make.form.user, make.form.bot, "", 5, None])
    return _fill(make.spell(row), make.rng.choice([make.form.role, make.form.text]).encode())


@_damage("nesting-as-row")
def _nesting_as_row(make: _Maker, row: Row) -> bytes:
    return make.rng.choice(DEEP)


@_damage("white-space-around", good=True, sound=True)
def _white_space_around(make: _Maker, row: Row) -> str:
    before, behind = make.rng.choices(["", " ", "\t", "\r", " \t \r ", " " * 5000], k=2)
    return before + make.spell(row) + behind


@_damage("odd-white-space-around", good=None)
def _odd_white_space_around(make: _Maker, row: Row) -> str:
    before, behind = make.rng.choices("\v\f\x1c\u0085\u00a0\u2028\u2029\u3000\u200b", k=2)
    return before + make.spell(row) + behind


@_damage("bom-before-row", good=None)
def _bom_before_row(make: _Maker, row: Row) -> str:
    return "\ufeff" * make.rng.randint(1, 2) + make.spell(row)


@_damage("utf16-tail")
def _utf16_tail(make: _Maker, row: Row) -> bytes:
    text = make.spell(row)
    return text[:10].encode() + text[10:].encode("utf-16-be")


@_damage("long-line")
def _long_line(make: _Maker, row: Row) -> str:
    text, long = make.spell(row), "x" * 1_000_000
    return make.rng.choice([text[:-2] + long, long, "\ufffe" + long, text + long.replace("x", " ") + "x", text * 5000])


@_damage("keys-escaped", good=True, sound=True)
def _keys_escaped(make: _Maker, row: Row) -> str:
    key = next(iter(row))
    return make.spell(row).replace(f'"{key}"', '"' + "".join(rf"\u{ord(char):04x}" for char in key) + '"', 1)


@_damage("keys-spelt-oddly", good=None, sound=True)
def _keys_spelt_oddly(make: _Maker, row: Row) -> str:
    target = make.rng.choice([row, *row.get(make.form.turns, [])])
    odd = make.rng.choice([str.upper, str.title, "{} ".format, "\ufeff{}".format])
    _refill(target, {odd(key): value for key, value in target.items()})
    return make.spell(row)


@_damage("order-of-turns", CHATS, good=None, sound=True)
def _order_of_turns(make: _Maker, row: Row) -> str:
    """Roles in an order that some chat templates refuse."""
    user, bot = make.form.user, make.form.bot
    orders = [[bot, user, bot], [user, user, bot], [user, bot, bot], [bot], [user, "system", bot], [user, bot, user]]
    return make.spell({**row, make.form.turns: [make.turn(role) for role in make.rng.choice(orders)]})


@_damage("no-answer", CHATS, sound=True)
def _no_answer(make: _Maker, row: Row) -> str:
    user = make.form.user
    orders = [["system"], [user], ["system", user], [user, user], ["system", "system"]]
    return make.spell({**row, make.form.turns: [make.turn(role) for role in make.rng.choice(orders)]})


@_damage("nulls-beside", (OPENAI,), good=True, sound=True)
def _nulls_beside(make: _Maker, row: Row) -> str:
    """As tables write what a message doesn't have."""
    turns = [{**turn, "name": None, "tool_calls": None, "note": None} for turn in row["messages"]]
    return make.spell({"messages": turns, "tools": None, "note": None})


@_damage("tool-without-call", CHATS, good=None, sound=True)
def _tool_without_call(make: _Maker, row: Row) -> str:
    turns = row[make.form.turns]
    turns.insert(make.rng.randrange(len(turns) + 1), make.turn("tool" if make.form is OPENAI else "observation"))
    return make.spell(row)


@_damage("tool-calls-malformed", (OPENAI,), sound=True)
def _tool_calls_malformed(make: _Maker, row: Row) -> str:
    """`content` is null beside them, so that a reader which passes them over can't use the row either."""
    calls: list[Any] = [None, 5, "no", {}, [], [None], ["f"], [{}], [{"type": "function"}], [{"function": 5}]]
    return make.spell({"messages": _with_call(make, make.rng.choice(calls))})


@_damage("tool-call", (OPENAI,), good=None, sound=True)
def _tool_call(make: _Maker, row: Row) -> str:
    arguments: list[Any] = ['{"city": "Oslo"}', "{", "", "NaN", "[" * DEPTH, None, 5, {"city": "Oslo"}, []]
    function = {"name": make.rng.choice(["weather", "weather", None]), "arguments": make.rng.choice(arguments)}
    messages = _with_call(make, [{"id": "c1", "type": "function", "function": function}])
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    return make.spell({"messages": messages, "tools": [tool]})


def _with_call(make: _Maker, calls: Any) -> list[Row]:
    asked, answer, told = make.turn("user"), make.turn("tool"), make.turn("assistant")
    call = {"role": "assistant", "content": None, "tool_calls": calls}
    return [asked, call, {**answer, "tool_call_id": "c1"}, told]


def _damaged(rng: random.Random) -> tuple[str, list[_Line]]:
    """Rows of one format, some or all of them damaged in one way or in two."""
    names = rng.sample(list(DAMAGES), 1 if rng.random() < 0.8 else 2)
    both = [form for form in FORMS if all(form in DAMAGES[name][0] for name in names)]
    if not both:
        names = names[:1]
    make = _Maker(rng, both or DAMAGES[names[0]][0])
    rows = make.rows()
    hit = set(rng.sample(range(len(rows)), rng.choice([1, 1, 1, rng.randint(1, len(rows))])))
    used: dict[str, None] = {}
    lines = []
    for index, row in enumerate(rows):
        if index in hit:
            name = rng.choice(names)
            used[name] = None
            lines.append(DAMAGES[name][1](make, row))
        else:
            lines.append(_Line(make.spell(row).encode(), good=True))
    return "+".join(used), lines


def _sum(verdicts: Iterable[Verdict]) -> int | None:
    total = 0
    for verdict in verdicts:
        if verdict is None:
            return None
        total += verdict
    return total


def _flip(rng: random.Random, content: bytes) -> bytes:
    """Some bytes changed, at least one."""
    changed = bytearray(content)
    for place in rng.sample(range(len(changed)), min(len(changed), rng.choice([1, 1, 2, 5, 20]))):
        changed[place] ^= rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
    return bytes(changed)


def _encode(rng: random.Random, content: bytes) -> bytes:
    """Text as UTF-16 or UTF-32, with BOM or without."""
    return content.decode().encode(rng.choice(["utf-16", "utf-32"]) + rng.choice(["", "-le", "-be"]))


# -- JSON Lines --------------------------------------------------------------------------------------------------------

LINES_KINDS = _words("""
    good crlf lone-cr bom bom-twice no-final-newline blank-lines utf16-or-32 latin1 zero-bytes white-space-only
    bom-only random-bytes flips cut array-in-lines nul-tail line-by-line-in-two
""")
MAGIC = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"PAR1", b"ARROW1", b"PK")


def _json_lines(rng: random.Random) -> Mutant:
    if rng.random() < 0.72:
        name, lines = _damaged(rng)
        content = _join(rng, [line.raw for line in lines])
        return Mutant(name, ".jsonl", content, sum(line.rows for line in lines), _sum(line.good for line in lines))
    kind = rng.choice(LINES_KINDS)
    make = _Maker(rng, words=PLAIN if kind == "latin1" else WORDS)
    lines_ = [make.spell(row).encode() for row in make.rows()]
    content, count = b"".join(line + b"\n" for line in lines_), len(lines_)
    rows: int | None = count
    good: int | None = count
    match kind:
        case "crlf":
            content = content.replace(b"\n", b"\r\n")
        case "lone-cr":  # white space, so all is one line
            content = content.replace(b"\n", b"\r")
            rows, good = 1, int(count == 1)
        case "bom":
            content = b"\xef\xbb\xbf" + content
        case "bom-twice":
            content, good = b"\xef\xbb\xbf" * 2 + content, None
        case "no-final-newline":
            content = content[:-1]
        case "blank-lines":
            content = b"".join(rng.choice([b"\n", b" \t\n", b"\r\n", b"\n" * 1000]) + line + b"\n" for line in lines_)
            content += rng.choice([b"\n", b"  ", b"\t\r\n \n"])
        case "utf16-or-32":
            content, rows, good = _encode(rng, content), None, None
        case "latin1":
            lines_ = [json.dumps(json.loads(line), ensure_ascii=False).encode("latin-1") for line in lines_]
            content, good = b"".join(line + b"\n" for line in lines_), sum(line.isascii() for line in lines_)
        case "zero-bytes" | "white-space-only" | "bom-only":
            content, rows, good = _nothing(rng, kind), 0, 0
        case "random-bytes":
            content = rng.randbytes(rng.choice([1, 4, 100, 5000]))
            rows = _count_lines(content)
            good = None if rows is None else 0
        case "flips":
            content = _flip(rng, content)
            rows, good = _count_lines(content), None
        case "cut":
            content = content[: rng.randrange(len(content))]
            parts = [part for part in content.split(b"\n") if part]
            rows, good = len(parts), sum(part == line for part, line in zip(parts, lines_, strict=False))
        case "array-in-lines":
            content, rows, good = b"[" + b",\n".join(lines_) + b"]\n", None, None
        case "nul-tail":
            content, rows = content + b"\0" * rng.choice([1, 512, 4096]), count + 1
        case "line-by-line-in-two":  # indented, so no line is a row
            texts = [json.dumps(json.loads(line), indent=1) + "\n" for line in lines_]
            content, good = "".join(texts).encode(), None
            rows = content.count(b"\n")
    return Mutant(kind, ".jsonl", content, rows, good)


def _nothing(rng: random.Random, kind: str, blanks: Sequence[bytes] = (b"\n", b"\r\n", b"  ", b" \t\n \n")) -> bytes:
    return {"zero-bytes": b"", "bom-only": b"\xef\xbb\xbf"}.get(kind, rng.choice(blanks))


def _join(rng: random.Random, lines: Iterable[bytes]) -> bytes:
    """Lines as a file, at times with a BOM, CRLF, blank lines or no newline at the end: none of it matters."""
    end = b"\r\n" if rng.random() < 0.1 else b"\n"
    content = b"\xef\xbb\xbf" if rng.random() < 0.05 else b""
    blanks = rng.random() < 0.1
    for line in lines:
        content += rng.choice([b"", end, b"  " + end, b"\t" + end]) * blanks + line + end
    return content[: -len(end)] if rng.random() < 0.15 else content


def _count_lines(content: bytes) -> int | None:
    """Lines that aren't blank; None where one is of odd white space, or the start is another format's."""
    if content.startswith(MAGIC):
        return None
    lines = [line.strip(b" \t\r") for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    if any(line and not line.decode("utf-8", "replace").strip() for line in lines):
        return None
    return sum(bool(line) for line in lines)


def _huge(rng: random.Random) -> Mutant:
    """A line of 50 MB between two good ones."""
    make, size = _Maker(rng), 50_000_000
    before, row, behind = (make.spell(make.row()).encode() for _ in range(3))
    kind = rng.choice(["text", "unterminated", "blank", "nesting", "garbage"])
    match kind:
        case "text":
            line = b'{"x": "' + b"long " * (size // 5) + b'", ' + row[1:]
        case "unterminated":
            line = row[:-2] + b"x" * size
        case _:
            line = {"blank": b" ", "nesting": b"[", "garbage": b"x"}[kind] * size
    content, rows = b"\n".join([before, line, behind, b""]), 2 + (kind != "blank")
    return Mutant(f"huge-{kind}", ".jsonl", content, rows, None if kind == "text" else 2)


# -- JSON arrays -------------------------------------------------------------------------------------------------------

ARRAY_KINDS = _words("""
    good indented cut trailing-garbage nested-arrays object-with-list empty-array concatenated missing-comma
    trailing-comma json-lines one-object bom utf16-or-32 zero-bytes white-space-only bom-only random-bytes flips
    unclosed no-array
""")


def _json_array(rng: random.Random) -> Mutant:
    if rng.random() < 0.6:
        name, lines = _damaged(rng)
        content = _bracket(rng, [line.raw for line in lines])
        if not all(line.sound for line in lines):
            return Mutant(f"array-{name}", ".json", content, None, None)
        return Mutant(f"array-{name}", ".json", content, len(lines), _sum(line.good for line in lines))
    kind = rng.choice(ARRAY_KINDS)
    make = _Maker(rng)
    rows_ = make.rows()
    lines_ = [make.spell(row).encode() for row in rows_]
    content = _bracket(rng, lines_)
    rows: int | None = None
    good: int | None = None
    match kind:
        case "good":
            rows = good = len(rows_)
        case "indented":
            indent: Any = rng.choice([0, 2, "\t"])
            content, rows, good = json.dumps(rows_, indent=indent).encode(), len(rows_), len(rows_)
        case "bom":
            content, rows, good = b"\xef\xbb\xbf" + content, len(rows_), len(rows_)
        case "cut":
            content = content[: rng.randrange(1, content.rindex(b"]"))]
        case "trailing-garbage":
            content += rng.choice([b"x", b"]", b",", b"{}", b"\0", b"\0" * 512, b"// end", b"\xff"])
        case "nested-arrays":
            if rng.random() < 0.5:
                content, rows = b"[" + content + b"]", 1
            else:
                content, rows = b"[" + b",".join(b"[" + line + b"]" for line in lines_) + b"]", len(lines_)
            good = 0
        case "object-with-list":
            key = rng.choice(["data", "rows", "train", "examples", "x"])
            content = json.dumps({"version": 1, key: rows_}).encode()
        case "empty-array":
            content, rows, good = rng.choice([b"[]", b" [ ]\n", b"[\n]\n"]), 0, 0
        case "concatenated":
            content += rng.choice([b"", b"\n", b","]) + _bracket(rng, [make.spell(make.row()).encode()])
        case "missing-comma":
            content = b"[" + b"\n".join([*lines_, make.spell(make.row()).encode()]) + b"]"
        case "trailing-comma":
            content = b"[" + b",\n".join(lines_) + b",\n]"
        case "json-lines":
            content = b"\n".join(lines_) + b"\n"
        case "one-object":
            content = lines_[0]
        case "utf16-or-32":
            content = _encode(rng, content)
        case "zero-bytes" | "white-space-only" | "bom-only":
            content, rows, good = _nothing(rng, kind), 0, 0
        case "random-bytes":
            content = rng.randbytes(rng.choice([1, 4, 100, 5000]))
        case "flips":
            content = _flip(rng, content)
        case "unclosed":
            content = b"[" * rng.choice([1, 2, DEPTH])
        case "no-array":
            content = rng.choice([b"null", b"5", b'"hi"', b"{}", b"true", b"NaN", b"hello"])
    return Mutant(f"array-{kind}", ".json", content, rows, good)


def _bracket(rng: random.Random, lines: Sequence[bytes]) -> bytes:
    between = rng.choice([b",", b", ", b",\n", b"\n,\n", b",\r\n  "])
    return rng.choice([b"[", b"[\n", b" [ "]) + between.join(lines) + rng.choice([b"]", b"\n]\n", b" ]  \n\n"])


# -- CSV and TSV -------------------------------------------------------------------------------------------------------

SEPARATED_KINDS = _words("""
    good quoted crlf lone-cr bom no-final-newline blank-lines white-space-line open-quote quote-inside
    text-behind-quote too-few-fields too-many-fields only-delimiters nul control line-separators newlines
    words-for-nothing control-tokens answer-blank duplicate-header empty-header header-spelt-oddly header-only
    no-header unknown-header extra-column long-field semicolons messages-column utf16-or-32 no-utf8 zero-bytes
    white-space-only bom-only random-bytes flips cut
""")


def _separated(rng: random.Random) -> Mutant:
    delimiter, suffix = rng.choice([(",", ".csv"), (",", ".csv"), ("\t", ".tsv")])
    kind = rng.choice(SEPARATED_KINDS)
    plain = suffix == ".tsv" or kind in ("semicolons", "lone-cr", "too-few-fields")
    make = _Maker(rng, FLAT, PLAIN if plain else WORDS)
    rows_ = make.rows()
    header, records = list(rows_[0]), [list(row.values()) for row in rows_]
    hit = rng.randrange(len(records))
    record, count = records[hit], len(records)
    end = rng.choice(["\n", "\n", "\r\n"])
    quoting: Any = csv.QUOTE_MINIMAL
    rows: int | None = count
    good: int | None = count
    content: bytes | None = None
    match kind:
        case "quoted":
            quoting = csv.QUOTE_ALL
        case "crlf":
            end = "\r\n"
        case "lone-cr":
            end, good = "\r", None
        case "too-few-fields":
            del record[rng.randrange(1, len(record)) :]
            good = count - 1
        case "too-many-fields":
            record += ["more"] * rng.choice([1, 1, 3, 1000])
            good = None
        case "only-delimiters":
            record[:] = [""] * len(record)
            good = count - 1
        case "nul":
            record[-1] += rng.choice(["\0", "\0" * 50]) + "x"
            good = None
        case "control":
            record[-1] += rng.choice("\x01\x07\x08\x1b\x7f\x80") + "x"
        case "line-separators":
            record[rng.choice([0, -1])] += rng.choice("\u2028\u2029\u0085\v\f\x1c\x1d\x1e") + "x"
        case "newlines":
            record[rng.choice([0, -1])] += rng.choice(["\n", "\r\n", "\r", "\n\n\n"]) + 'x "y"'
        case "words-for-nothing":
            record[-1] = rng.choice(["NA", "nan", "null", "None", "1", "007", "1e5", "True", "#N/A", "inf", "-"])
        case "control-tokens":
            record[rng.choice([0, -1])] += rng.choice(TOKENS)
        case "answer-blank":
            record[-1] = rng.choice(BLANKS)
            good = count - 1
        case "duplicate-header":
            header.append(rng.choice(header))
            records, good = [[*fields, "more"] for fields in records], None
        case "empty-header":
            header, good = rng.choice([[""] * len(header), [*header[:-1], ""], ["", *header[1:]]]), None
        case "header-spelt-oddly":
            change = rng.choice([str.upper, str.title, " {}".format, "'{}'".format])
            header, good = [change(name) for name in header], None
        case "unknown-header":
            header, good = [f"column{index}" for index in range(len(header))], None
        case "extra-column":
            header = ["id", *header, "note"]
            records = [["7", *fields, rng.choice(["", "x"])] for fields in records]
        case "long-field":
            record[rng.choice([0, -1])] += "long " * 40_000
        case "messages-column":
            header, good = ["messages"], None
            records = [[json.dumps(_Maker(rng, (OPENAI,)).row()["messages"])] for _ in records]
        case "header-only":
            records, rows, good = [], 0, 0
        case "no-header":
            header, rows, good = [], None, None
    text = _separate(([header] if header else []) + records, ";" if kind == "semicolons" else delimiter, end, quoting)
    match kind:
        case "bom":
            text = "\ufeff" + text
        case "no-final-newline":
            text = text.removesuffix(end)
        case "blank-lines":
            text += end * rng.choice([1, 3, 1000])
            text += _separate([record], delimiter, end, quoting)
            rows = good = count + 1
        case "white-space-line":
            text, rows, good = text + rng.choice([" ", "  \t"]) + end, None, None
        case "open-quote":
            text, rows, good = text.replace(end, end + '"', rng.choice([1, 1, 3])), None, None
        case "quote-inside":
            text, rows, good = text + delimiter.join(['a"b'] * len(header)) + end, count + 1, None
        case "text-behind-quote":
            text, rows, good = text + delimiter.join(['"a"b'] * len(header)) + end, None, None
        case "semicolons":
            good = None
        case "utf16-or-32":
            content, rows, good = _encode(rng, text.encode()), None, None
        case "no-utf8":
            payload = rng.choice(INSERTS[rng.choice(["latin1-byte", "overlong", "utf8-cut"])][0])
            content, rows, good = f"{text}a{delimiter}b".encode() + payload + end.encode(), None, None
        case "zero-bytes" | "white-space-only" | "bom-only":
            content, rows, good = _nothing(rng, kind, (b"\n", b"\r\n", b"\n\n\r\n")), 0, 0
        case "random-bytes":
            content, rows, good = rng.randbytes(rng.choice([1, 4, 100, 5000])), None, None
        case "flips":
            content, rows, good = _flip(rng, text.encode()), None, None
        case "cut":
            content, rows, good = text.encode()[: rng.randrange(1, len(text))], None, None
    return Mutant(f"{suffix[1:]}-{kind}", suffix, text.encode() if content is None else content, rows, good)


def _separate(records: Sequence[Sequence[str]], delimiter: str, end: str, quoting: Any) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(records)
    return file.getvalue()


# -- Parquet and Arrow -------------------------------------------------------------------------------------------------

COLUMNS_KINDS = _words("""
    good good-chats other-string-types batches squeezed odd-columns-beside cut cut flips flips flips random-bytes
    zero-bytes lines-inside other-format stream no-rows unknown-columns messages-as-text messages-of-numbers
    messages-of-texts messages-of-maps messages-an-object nested-lists text-null turn-null role-null row-null
    list-empty answer-null question-null nulls-beside answers-numbers bytes-as-text no-utf8 duplicate-column
""")


def _columns(rng: random.Random) -> Mutant:
    suffix = rng.choice([".parquet", ".parquet", ".arrow"])
    kind = rng.choice(COLUMNS_KINDS)
    chat = kind.startswith(("good-chats", "messages", "turn", "role", "row", "list", "nested", "nulls", "text"))
    flat = kind in ("answer-null", "question-null", "answers-numbers", "other-string-types", "bytes-as-text", "no-utf8")
    make = _Maker(rng, (OPENAI,) if chat else FLAT if flat else FORMS)
    rows_, form = make.rows(), make.form
    count, row = len(rows_), rng.choice(rows_)
    rows: int | None = count
    good: int | None = count
    match kind:
        case "odd-columns-beside":
            when = datetime.datetime(2024, 2, 29, tzinfo=datetime.UTC)
            for each in rows_:
                each.update(when=when, raw=b"\xff", score=float("nan"), day=when.date(), tags=None, part={"a": [1]})
        case "unknown-columns":
            rows_, good = [{"id": index, "score": 0.5} for index in range(count)], 0
        case "messages-as-text":
            rows_, good = [{"messages": json.dumps(each["messages"])} for each in rows_], None
        case "messages-of-numbers":
            rows_, good = [{"messages": rng.choice([[1, 2], [3]])} for _ in rows_], 0
        case "messages-of-texts":
            rows_, good = [{"messages": [make.text(), make.text()]} for _ in rows_], 0
        case "messages-of-maps":
            good = None
        case "messages-an-object":
            rows_, good = [{"messages": each["messages"][0]} for each in rows_], 0
        case "nested-lists":
            rows_, good = [{"messages": [each["messages"]]} for each in rows_], 0
        case "text-null" | "role-null":
            rng.choice(row["messages"])["content" if kind == "text-null" else "role"] = None
            good = count - 1
        case "turn-null":
            row["messages"][rng.randrange(len(row["messages"]))] = None
            good = count - 1
        case "row-null" | "list-empty":
            row["messages"] = None if kind == "row-null" else []
            good = count - 1
        case "answer-null":
            row[form.bot] = None
            good = count - 1
        case "question-null":
            row[form.user] = None
            good = None
        case "nulls-beside":
            for each in rows_:
                each["tools"] = None
                for turn in each["messages"]:
                    turn.update(name=None, tool_calls=None)
        case "answers-numbers":
            for index, each in enumerate(rows_):
                each[form.bot] = index * 1.5
            good = None
        case "bytes-as-text":
            for each in rows_:
                each[form.bot] = each[form.bot].encode()
            good = None
        case "no-utf8":
            rows = good = None
        case "no-rows":
            rows = good = 0
    table = pa.Table.from_pylist(rows_)
    match kind:
        case "messages-of-maps":
            chats = [[list(turn.items()) for turn in each["messages"]] for each in rows_]
            table = pa.table({"messages": pa.array(chats, pa.list_(pa.map_(pa.string(), pa.string())))})
        case "other-string-types":
            kinds = [pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
            table = table.cast(pa.schema([(name, rng.choice(kinds)) for name in table.column_names]))
        case "no-utf8":
            answers = pa.array([rng.choice([b"caf\xe9", b"\xff", b"\xed\xa0\x80"]) for _ in rows_])
            table = table.set_column(table.num_columns - 1, form.bot, answers.cast(pa.string(), safe=False))
        case "duplicate-column":
            table, rows, good = table.append_column(table.column_names[0], table.column(0)), None, None
        case "no-rows":
            table = table.slice(0, 0)
    content = _write(rng, table, suffix, kind)
    match kind:
        case "cut":
            content, rows, good = content[: rng.randrange(1, len(content))], None, None
        case "flips":
            content, rows, good = _flip(rng, content), None, None
        case "random-bytes":
            magic = rng.choice([b"", b"PAR1", b"ARROW1\0\0"])
            content, rows, good = magic + rng.randbytes(rng.choice([4, 100, 5000])) + magic[:6], None, None
        case "zero-bytes":
            content, rows, good = b"", None, None
        case "lines-inside" | "other-format":
            if kind == "lines-inside":
                content = b"".join(make.spell(make.row()).encode() + b"\n" for _ in rows_)
            else:
                content = _write(rng, table, ".arrow" if suffix == ".parquet" else ".parquet", kind)
            rows = good = None
        case "stream":
            good = None if suffix == ".arrow" else good
    return Mutant(f"{suffix[1:]}-{kind}", suffix, content, rows, good)


def _write(rng: random.Random, table: pa.Table, suffix: str, kind: str) -> bytes:
    sink = pa.BufferOutputStream()
    batch = 1 if kind == "batches" else 1000
    if suffix == ".parquet":
        codec = rng.choice(["snappy", "zstd", "gzip", "brotli", "lz4"]) if kind == "squeezed" else "none"
        pq.write_table(table, sink, compression=codec, row_group_size=batch)
    else:
        options = pa.ipc.IpcWriteOptions(compression=rng.choice(["lz4", "zstd"]) if kind == "squeezed" else None)
        new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with new(sink, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=batch)
    return bytes(sink.getvalue())


# -- Compressed files --------------------------------------------------------------------------------------------------

SQUEEZABLE = (".jsonl", ".json", ".csv")
SQUEEZERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda content: gzip.compress(content, compresslevel=1, mtime=0),
    ".bz2": lambda content: bz2.compress(content, compresslevel=1),
    ".xz": lambda content: lzma.compress(content, preset=0),
}
SQUEEZED_KINDS = _words("""
    good members members nothing cut cut flips not-compressed other-compressor garbage-behind zeros-behind
    zero-bytes twice second-member-cut
""")


def _squeezed(rng: random.Random) -> Mutant:
    name = rng.choice(list(SQUEEZERS))
    squeeze, kind = SQUEEZERS[name], rng.choice(SQUEEZED_KINDS)
    make = _Maker(rng)
    lines = [make.spell(row).encode() + b"\n" for row in make.rows()]
    plain = b"".join(lines)
    content = squeeze(plain)
    rows: int | None = None
    good: int | None = None
    match kind:
        case "good":
            rows = good = len(lines)
        case "members":  # also where a line goes on in the next member
            parts = lines if rng.random() < 0.5 else [plain[: len(plain) // 2], b"", plain[len(plain) // 2 :]]
            content, rows, good = b"".join(map(squeeze, parts)), len(lines), len(lines)
        case "nothing":
            content, rows, good = squeeze(b""), 0, 0
        case "cut":
            content = content[: rng.randrange(1, len(content))]
        case "flips":
            content = _flip(rng, content)
        case "not-compressed":
            content = plain
        case "other-compressor":
            content = SQUEEZERS[rng.choice([other for other in SQUEEZERS if other != name])](plain)
        case "garbage-behind":
            content += rng.choice([b"x", b"garbage\n", rng.randbytes(100), content[:5]])
        case "zeros-behind":
            content += b"\0" * rng.choice([1, 4, 512])
        case "zero-bytes":
            content = b""
        case "twice":
            content = squeeze(content)
        case "second-member-cut":
            content += content[: rng.randrange(1, len(content))]
    return Mutant(f"{name[1:]}-{kind}", ".jsonl" + name, content, rows, good)
