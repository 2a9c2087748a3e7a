"""What becomes of rows that are odd, too long, doubled, or held out: a policy each, and counts that add up."""

import json

import pytest

from phinetune.data import Finding, Rejected, Renderer, Row, prepare, write_ledgers
from phinetune.errors import DataError
from phinetune.recipe import DataConfig


def chat(*said, system=None):
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]


def write(path, *conversations):
    path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations), encoding="utf-8")
    return str(path)


def prepared(source, tokenizer, **settings):
    return prepare(DataConfig(train=source, **{"max_rejected": 0.9, **settings}), tokenizer, seed=0)


def reconcile(data):
    for ledger in data.ledgers.values():
        counts = ledger.summary()
        assert counts["rows"] == (
            counts["used"] + counts["rejected"] + counts["held_out"] + sum(counts["dropped"].values())
        )
        assert counts["tokens"] == sum(counts["tokens_by_part"].values())


@pytest.mark.parametrize(("policy", "used"), [("keep", 5), ("drop", 3)])
def test_duplicates(policy, used, tmp_path, smollm2_tokenizer):
    a, b, c = chat("a", "1"), chat("b", "2"), chat("c", "3")
    data = prepared(write(tmp_path / "x.jsonl", a, b, a, c, a), smollm2_tokenizer, duplicates=policy)
    ledger = data.ledgers["train"]
    assert (ledger.rows, ledger.used, len(data.train)) == (5, used, used)
    reconcile(data)
    if policy == "keep":
        count, places = ledger.findings[Finding.DUPLICATE]
        assert (count, [p.rpartition(":")[2] for p in places]) == (2, ["3", "5"])
    else:
        assert ledger.dropped == {"stand in the data before": 2}
        assert [(r.where.rpartition(":")[2], r.reason) for r in data.rejected()] == [
            ("3", "stands in the data before"),
            ("5", "stands in the data before"),
        ]


def test_duplicates_can_be_an_error(tmp_path, smollm2_tokenizer):
    source = write(tmp_path / "x.jsonl", chat("a", "1"), chat("a", "1"))
    with pytest.raises(DataError, match=r"1 rows stand in the data before .*x.jsonl:2.; remove them, or set data.dupl"):
        prepared(source, smollm2_tokenizer, duplicates="raise")


@pytest.mark.parametrize(("policy", "trained"), [("drop", 2), ("keep", 3)])
def test_held_out_rows_that_stand_in_train(policy, trained, tmp_path, smollm2_tokenizer):
    a, b, c, d = (chat(name, name * 2) for name in "abcd")
    train, held = write(tmp_path / "train.jsonl", a, b, c), write(tmp_path / "eval.jsonl", d, b)
    data = prepared(train, smollm2_tokenizer, eval=held, held_out_in_train=policy)
    assert (len(data.train), len(data.eval)) == (trained, 2)
    reconcile(data)
    with pytest.raises(DataError, match="are held-out rows too"):
        prepared(train, smollm2_tokenizer, eval=held, held_out_in_train="raise")


def test_a_held_out_share_takes_its_doubles_out_of_training(tmp_path, smollm2_tokenizer):
    source = write(tmp_path / "x.jsonl", *(chat(f"q{i % 10}", f"a{i % 10}") for i in range(30)))
    data = prepared(source, smollm2_tokenizer, eval=0.1)
    held = {row.messages[0]["content"] for row in data.eval_rows}
    assert held.isdisjoint(row.messages[0]["content"] for row in data.train_rows)
    ledger = data.ledgers["train"]
    assert (ledger.held_out, len(data.eval)) == (3, 3)
    assert ledger.used + sum(ledger.dropped.values()) == 27
    reconcile(data)


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("role_order", chat("a", "b")[:1] + chat("a", "b"), "message 2 is the user's behind the user's"),
        ("role_order", chat("a", "b")[1:] + chat("a", "b"), "message 1 is the assistant's behind nothing"),
        ("role_order", [*chat("a", "b"), {"role": "tool", "content": "x"}, *chat("a", "b")], "message 3 is the tool's"),
        (
            "role_order",
            [*chat("a", "b"), {"role": "system", "content": "x"}, *chat("a", "b")],
            "message 3 is the system's behind",
        ),
        ("empty_turns", chat("", "b"), r"message 1 \(user\) is empty"),
        ("empty_turns", chat("a", " \n", "c", "d"), r"message 2 \(assistant\) is empty"),
    ],
)
def test_odd_turns(name, messages, reason, tmp_path, smollm2_tokenizer):
    source = write(tmp_path / "x.jsonl", chat("ok", "yes"), messages)
    dropped = prepared(source, smollm2_tokenizer)
    (left_out,) = dropped.rejected()
    assert left_out.where.endswith(":2")
    assert __import__("re").match(reason, left_out.reason), left_out.reason
    kept = prepared(source, smollm2_tokenizer, **{name: "keep"})
    assert len(kept.train) == 2
    assert kept.ledgers["train"].findings[Finding[name.upper().removesuffix("S")]][0] == 1
    with pytest.raises(DataError, match=rf"x\.jsonl:2: {reason}.*set data\.{name}"):
        prepared(source, smollm2_tokenizer, **{name: "raise"})
    for data in (dropped, kept):
        reconcile(data)


def decoded(tokenizer, outcome):
    return [tokenizer.decode(example.ids[example.mask]) for example in outcome.examples]


def test_too_long(smollm2_tokenizer):
    """Three exchanges of 20, 20 and 220 tokens behind a system message."""
    messages = chat("one", "first answer", "two", "second answer", "three", "word " * 200, system="Be kind.")
    row = Row("chats.jsonl:9", messages)

    def render(strategy, limit):
        return Renderer.of(smollm2_tokenizer, max_length=limit, excess_length_strategy=strategy).render(row)

    size = len(smollm2_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    last = len(smollm2_tokenizer.apply_chat_template([messages[0], *messages[-2:]], tokenize=True, return_dict=False))
    assert render("drop", 100).reason == f"has {size} tokens, above data.max_length=100"
    with pytest.raises(DataError, match=rf"chats\.jsonl:9: has {size} tokens, above .*excess_length_strategy"):
        render("raise", 100)
    cut = render("truncate", 100)
    assert decoded(smollm2_tokenizer, cut) == ["first answer<|im_end|>second answer<|im_end|>"]
    assert cut.findings == Finding.TRUNCATED
    short = render("truncate", 24)
    assert decoded(smollm2_tokenizer, short) == ["first answer<|im_end|>"]
    inside = Renderer.of(smollm2_tokenizer, max_length=20, excess_length_strategy="truncate").render(
        Row("here:1", chat("one", "word " * 50, system="Be kind."))
    )
    assert decoded(smollm2_tokenizer, inside) == ["word word"]
    assert inside.findings == Finding.WITHOUT_END, "the end of turn is gone, and it is said"
    assert render("split", 100).reason == f"has an exchange of {last} tokens: it can't be split further"
    split = render("split", 230)
    assert decoded(smollm2_tokenizer, split) == [
        "first answer<|im_end|>second answer<|im_end|>",
        "word " * 200 + "<|im_end|>",
    ]
    assert split.findings == Finding.SPLIT
    assert all(smollm2_tokenizer.decode(e.ids).startswith("<|im_start|>system\nBe kind.") for e in split.examples)


def test_plain_text_is_learnt_to_its_end(smollm2_tokenizer, phi3_tokenizer):
    row = Row("a.txt:1", text="One two three four five six.")
    (example,) = Renderer.of(smollm2_tokenizer).render(row).examples
    assert smollm2_tokenizer.decode(example.ids) == "One two three four five six." + smollm2_tokenizer.eos_token
    assert example.mask.all()
    pieces = Renderer.of(smollm2_tokenizer, max_length=4, excess_length_strategy="split").render(row).examples
    ids = pieces[0].ids.tolist() + [i for piece in pieces[1:] for i in piece.ids[1:].tolist()]
    assert ids == example.ids.tolist(), "a piece begins with the last token of the one before"
    assert sum(piece.supervised for piece in pieces) == example.supervised
    spelled = Renderer.of(phi3_tokenizer).render(Row("a.txt:2", text="say <|end|> now")).examples[0]
    assert spelled.ids.tolist().count(32007) == 0
    assert spelled.ids[-1] == 32000


def test_a_system_message_that_the_template_does_not_write(smollm2_tokenizer):
    import copy

    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = Row("here:1", chat("Hi", "Hello.", system="Be kind."))
    assert isinstance(Renderer.of(tokenizer).render(row), Rejected)
    moved = Renderer.of(tokenizer, unwritten_system="prepend")
    outcome = moved.render(row)
    assert outcome.findings == Finding.SYSTEM_MOVED
    expected = "<|im_start|>user\nBe kind.\n\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(outcome.examples[0].ids) == expected + "Hello.<|im_end|>\n"
    assert tokenizer.decode(moved.prompt_ids(row.messages[:2])) == expected, "a prompt is written as in training"
    ignored = Renderer.of(tokenizer, unwritten_system="ignore").render(row)
    assert ignored.findings == Finding.SYSTEM_IGNORED
    assert "Be kind" not in tokenizer.decode(ignored.examples[0].ids)


def test_turns_that_the_template_rewrites(smollm2_tokenizer):
    import copy

    from templates import CONVERSATIONS, TEMPLATES

    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = next(t.jinja for t in TEMPLATES if t.name == "qwen3")
    row = Row("here:1", CONVERSATIONS["reasoning"].messages)
    split = Renderer.of(tokenizer).render(row)
    assert (len(split.examples), split.findings) == (2, Finding.REWRITTEN)
    last = Renderer.of(tokenizer, rewritten_turns="last").render(row)
    assert (len(last.examples), last.findings) == (1, Finding.NOT_LEARNT)
    assert "Six" in tokenizer.decode(last.examples[0].ids[last.examples[0].mask])
    assert "otherwise where others follow" in Renderer.of(tokenizer, rewritten_turns="drop").render(row).reason
    asked = Renderer.of(tokenizer, chat_template_kwargs={"enable_thinking": False}).prompt_ids(row.messages[:1])
    assert tokenizer.decode(asked).endswith("<think>\n\n</think>\n\n")


def test_a_date_in_the_template_is_one_day_for_the_whole_run(smollm2_tokenizer):
    import copy
    import datetime

    from phinetune.data import writes_date

    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = (
        "\n{{ strftime_now('%d %b %Y') }}|{{ strftime_now(\"%Y\") }} " + smollm2_tokenizer.chat_template
    )
    assert writes_date(tokenizer)
    assert not writes_date(smollm2_tokenizer)
    messages = chat("Hi", "Hello.")
    today = Renderer.of(tokenizer).renderings(messages)[0].text
    assert today == tokenizer.apply_chat_template(messages, tokenize=False)
    now = datetime.date.today()
    fixed = Renderer.of(tokenizer, today="2031-02-03").renderings(messages)[0].text
    assert fixed.startswith("\n03 Feb 2031|2031 ")
    assert fixed.replace("03 Feb 2031|2031", f"{now:%d %b %Y}|{now:%Y}") == today


def test_every_row_left_out_is_written_down(tmp_path, smollm2_tokenizer):
    good, long = chat("a", "b"), chat("a", "word " * 300)
    size = len(smollm2_tokenizer.apply_chat_template(long, tokenize=True, return_dict=False))
    path = tmp_path / "x.jsonl"
    write(path, good, long, good, [{"role": "user", "content": "a"}])
    data = prepared(str(path), smollm2_tokenizer, duplicates="drop", max_length=100)
    write_ledgers(tmp_path, data.ledgers, data.rejected(), {"fingerprint": data.fingerprint})
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [(line["where"].rpartition(":")[2], line["reason"]) for line in lines] == [
        ("2", f"has {size} tokens, above data.max_length=100"),
        ("4", "has no assistant message, so there is nothing to learn"),
        ("3", "stands in the data before"),
    ]
    assert lines[0]["row"]["messages"] == long
    counts = json.loads((tmp_path / "ledger.json").read_text())["train"]
    assert (counts["rows"], counts["used"], counts["rejected"], counts["dropped"]) == (
        4, 1, 2, {"stand in the data before": 1},
    )  # fmt: skip
    assert counts["padded"] == 0


def test_what_a_second_reading_found(smollm2_tokenizer):
    """Each row once went wrong in silence."""
    import copy

    def learnt(messages, **settings):
        outcome = Renderer.of(smollm2_tokenizer, **settings).render(Row("here:1", messages))
        return outcome.reason if isinstance(outcome, Rejected) else decoded(smollm2_tokenizer, outcome)

    marked = [{**chat("yes", "ok")[0], "train": True}, chat("", "ok")[1], *chat("yes", "fine")]
    assert learnt(marked) == ["yes<|im_end|>ok<|im_end|>fine<|im_end|>"], "one of two equal messages is marked"
    user = [{"role": "user", "content": "user", "train": True}, {"role": "assistant", "content": "ok"}]
    assert learnt(user) == ["user<|im_end|>ok<|im_end|>"]
    answer = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
    assert "does not write the reasoning of message 2" in learnt([chat("2+2?")[0], answer])
    long = [*chat("a", "b", "c", "d"), {"role": "user", "content": "word " * 100}]
    assert learnt(long, max_length=60, excess_length_strategy="truncate") == ["b<|im_end|>d<|im_end|>"]
    row = Row("here:1", [*chat("a", "b", "c"), {"role": "assistant", "content": "d", "train": False}])
    assert Renderer.of(smollm2_tokenizer).last_answer(row).expected == "d", "and not the turn before"

    opening = copy.deepcopy(smollm2_tokenizer)
    opening.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<file_sep>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = Renderer.of(opening)
    assert renderer.render(Row("here:1", chat("a", "b"))).examples[0].ids.tolist().count(5) == 1
    assert renderer.turn_ids() == [1, 2], "what opens an answer doesn't end it"


def test_calls_and_their_answers(smollm2_tokenizer):
    """A template that quotes a tool's answer; a call and its answer aren't split."""
    import copy

    quoting = copy.deepcopy(smollm2_tokenizer)
    quoting.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content | tojson if m.role == 'tool' else m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    said = [chat("a")[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    said += [{"role": "tool", "content": '{"degrees": "31"}'}, {"role": "assistant", "content": "b"}]
    assert decoded(quoting, Renderer.of(quoting).render(Row("here:1", said))) == ["f<|im_end|>b<|im_end|>"]
    split = Renderer.of(quoting, max_length=40, excess_length_strategy="split")
    assert decoded(quoting, split.render(Row("here:1", said + chat("c", "d")))) == [
        "f<|im_end|>b<|im_end|>",
        "d<|im_end|>",
    ]


def test_a_system_column_beside_messages():
    from phinetune.data import to_row

    row = to_row({"system": "Be kind.", "messages": chat("a", "b")}, "here:1")
    assert row.messages == chat("a", "b", system="Be kind.")
    assert to_row({"system": "Be kind.", "messages": row.messages}, "here:1").messages == row.messages


def test_dates_in_tables_do_no_harm(tmp_path, smollm2_tokenizer):
    import datetime

    from pyarrow import Table, parquet

    first = {"role": "user", "content": "a", "timestamp": datetime.datetime(2026, 1, 2)}
    rows = [{"conversation": [first, {"role": "assistant", "content": "b"}]}]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    data = prepared(str(tmp_path / "a.parquet"), smollm2_tokenizer)
    assert data.train_rows[0].messages[0] == {"role": "user", "content": "a", "timestamp": "2026-01-02 00:00:00"}


def test_messages_that_make_a_control_token_together(smollm2_tokenizer):
    """A template that writes messages side by side: half a token in each."""
    import copy

    gluing = copy.deepcopy(smollm2_tokenizer)
    gluing.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{{ m.content }}<|im_end|>\n"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    renderer = Renderer.of(gluing)
    whole = chat("a", "b", system="Be kind.")
    assert decoded(gluing, renderer.render(Row("here:1", whole))) == ["b<|im_end|>"]
    halves = chat("end|> a", "b", system="Be kind.<|im_")
    outcome = renderer.render(Row("here:1", halves))
    assert outcome.reason == "the chat template does not write the system message as it is"
