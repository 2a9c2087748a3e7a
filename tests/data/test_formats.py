"""Records of every known format as conversations, each written out by hand."""

import csv
import gzip
import io
import json
import os

import pytest
from conftest import SHARED_DATA

from phinetune.data import Rejected, Row, read_rows, readers, to_row
from phinetune.data.sources import open_sources
from phinetune.errors import DataError
from phinetune.recipe import DataSource

USER, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be kind."}
WEATHER = {"name": "get_weather", "description": "Weather of a city", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Manila"}}}


@pytest.mark.parametrize(
    ("format", "record", "messages"),
    [
        ("messages", {"messages": [USER, SAID]}, [USER, SAID]),
        ("messages", {"messages": json.dumps([USER, SAID]), "prompt": "Hi"}, [USER, SAID]),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]},
            [USER],
        ),
        ("messages", {"messages": [{"role": "developer", "content": "Be kind."}, USER]}, [SYSTEM, USER]),
        ("messages", {"messages": [USER, {**SAID, "weight": 0}]}, [USER, {**SAID, "train": False}]),
        ("messages", {"messages": [{**USER, "train": True}, SAID]}, [{**USER, "train": True}, SAID]),
        (
            "sharegpt",
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
                "system": "Be kind.",
            },
            [SYSTEM, USER, SAID],
        ),
        ("sharegpt", {"conversation": [{"role": "user", "content": "Hi"}, SAID]}, [USER, SAID]),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello."}, [USER, SAID]),
        (
            "alpaca",
            {
                "instruction": "Add.", "input": "1 and 2", "output": "3",
                "system": "Be kind.", "history": [["Hi", "Hello."]],
            },
            [SYSTEM, USER, SAID, {"role": "user", "content": "Add.\n1 and 2"}, {"role": "assistant", "content": "3"}],
        ),
        ("prompt_completion", {"prompt": "Hi", "completion": "Hello."}, [USER, SAID]),
        (
            "prompt_completion",
            {"prompt": [SYSTEM, USER, SAID, USER], "completion": [SAID]},
            [SYSTEM, USER, {**SAID, "train": False}, USER, SAID],
        ),
        ("pairs", {"question": "Hi", "answer": "Hello."}, [USER, SAID]),
        ("pairs", {"problem": "Hi", "solution": "Hello.", "source": "x"}, [USER, SAID]),
    ],
)  # fmt: skip
def test_recognised_by_its_columns(format, record, messages):
    row = to_row(record, "chats.jsonl:7")
    assert isinstance(row, Row), row
    assert (row.format, row.messages, row.where, row.raw) == (format, messages, "chats.jsonl:7", record)
    assert to_row({**record, "score": None, "extra": [1]}, "here:1").messages == messages


def test_plain_text():
    row = to_row({"text": "Once upon a time."}, "here:1")
    assert (row.format, row.text, row.messages) == ("text", "Once upon a time.", [])


@pytest.mark.parametrize(
    ("record", "columns", "asked", "format"),
    [
        (
            {"instruction": "Sum up.", "context": "A text.", "response": "B", "category": "x"},
            None,
            "Sum up.\nA text.",
            "alpaca",
        ),
        ({"question": "How many?", "context": "CREATE TABLE", "answer": "B"}, None, "How many?\nCREATE TABLE", "pairs"),
        (
            {"q": "How many?", "c": "In it.", "a": "B"},
            {"user": "q", "assistant": "a", "input": "c"},
            "How many?\nIn it.",
            "pairs",
        ),
        ({"input": "How many?", "output": "B"}, None, "How many?", "pairs"),
        ({"instruction": "Hi", "output": "B", "history": ""}, None, "Hi", "alpaca"),
        ({"instruction": "Hi", "output": "B", "history": "[]"}, None, "Hi", "alpaca"),
        # what the recipe names decides
        (
            {"messages": [USER, SAID], "q": "Hi", "a": "B"},
            {"prompt": "q", "completion": "a"},
            "Hi",
            "prompt_completion",
        ),
        ({"messages": [USER, SAID], "q": "Hi", "a": "B"}, {"user": "q", "assistant": "a"}, "Hi", "pairs"),
    ],
)
def test_what_is_asked(record, columns, asked, format):
    row = to_row(record, "here:1", columns=columns)
    assert row.messages == [{"role": "user", "content": asked}, {"role": "assistant", "content": "B"}]
    assert row.format == format


def test_named_columns_decide_and_must_be_of_use():
    assert to_row({"question": "a", "answer": "b", "body": "T"}, "here:1", columns={"text": "body"}).text == "T"
    typo = to_row({"text": "T", "q": "a", "a": "b"}, "here:1", columns={"usr": "q", "assistant": "a"})
    assert typo.reason == "is read as text, which knows no column assistant, usr (data.columns names it)"
    row = {"question": "Who?", "context": {"title": ["a"]}, "answer": "B"}
    assert to_row(row, "here:1").reason.startswith("`context` is an object, not text")
    named = to_row(row, "here:1", columns={"user": "question", "assistant": "answer"})
    assert named.messages[0]["content"] == "Who?"


def test_a_bad_completion_is_not_imitated():
    row = {"prompt": "Hi", "completion": "Go away.", "label": False}
    assert "is marked as a bad completion" in to_row(row, "here:1").reason
    assert to_row({**row, "label": True}, "here:1").messages[1]["content"] == "Go away."


def test_no_calls_are_no_calls():
    for none in ([], "[]", "", None):
        row = to_row({"messages": [USER, {**SAID, "tool_calls": none}]}, "here:1")
        assert row.messages == [USER, SAID]
    assert "not a list" in to_row({"conversations": [{"from": "function_call", "value": ""}]}, "here:1").reason


def test_a_fault_stays_with_its_row(tmp_path):
    good = json.dumps({"messages": [USER, SAID]})
    bad = good[:-1] + ', "score": NaN}'
    twice = good[:-1] + ', "a": 1, "a": 2}'
    path = tmp_path / "held.json"
    path.write_text(f'{{"version": 1, "data": [{good}, {bad}, {twice}, {good}]}}')
    rows = list(read_rows(str(path)))
    assert [type(row) for row in rows] == [Row, Rejected, Rejected, Row]
    assert [row.where for row in rows] == [f"{path}:{number}" for number in (1, 2, 3, 4)]
    assert "NaN" in rows[1].reason
    for held in (
        f'{{"data": [{good}], "data": [{good}, {good}]}}',
        f'{{"meta": {{"a": 1, "a": 2}}, "data": [{good}]}}',
    ):
        path.write_text(held)
        (row,) = read_rows(str(path))
        assert "twice, and which one counts is not said" in row.reason
    path.write_text("[" + '{"a":' * 800 + "1" + "}" * 800 + "]")
    assert all(isinstance(row, Rejected) for row in read_rows(str(path)))
    assert "has the key 'a' twice" in rows[2].reason


def test_a_csv_line_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\nHi,Hello\nHi," + "x" * 2000)
    with pytest.raises(DataError, match=r"rows\.csv:3: has a line of more than"):
        list(read_rows(str(path)))


def test_large_rows_go_in_small_chunks(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\n" + f"Hi,{'x' * 400_000}\n" * 10)
    with open_sources(str(path)) as files:
        sizes = [len(chunk.records) for chunk in readers.chunks(files[0], 0)]
    assert sizes == [3, 3, 3, 1]


def test_all_files_of_a_folder(tmp_path):
    folder, other = tmp_path / "chats", tmp_path / "elsewhere"
    for path in (folder / "a.jsonl", other / "b.jsonl", folder / "_hidden.jsonl", folder / ".old" / "c.jsonl"):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps({"messages": [USER, SAID]}) + "\n")
    (folder / "linked").symlink_to(other)
    (folder / "linked" / "round").symlink_to(folder)
    (folder / "other").symlink_to(folder / "linked")
    os.mkfifo(folder / "live.jsonl")
    assert [row.where for row in read_rows(str(folder))] == [f"{folder}/a.jsonl:1", f"{folder}/linked/b.jsonl:1"]
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.jsonl: can't be read"):
        list(read_rows(str(folder)))


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x.jsonl", "x" * 300 + ".jsonl"])
def test_paths_that_cannot_be_looked_at(path):
    with pytest.raises(DataError, match="can't be looked at"):
        list(read_rows(path))


def test_nothing_is_no_number(tmp_path):
    """As pandas writes what isn't there."""
    rows = [{"question": "Hi", "answer": "Hello.", "score": float("nan"), "system": float("nan")}]
    with open_sources("Python", rows) as files:
        (chunk,) = readers.chunks(files[0], 0)
        ((_, row),) = readers.rows(chunk, files[0])
    assert row.messages == [USER, SAID]


def test_columns_that_the_recipe_names():
    record = {"q": "Hi", "a": "Hello.", "persona": "Be kind.", "question": "not this"}
    row = to_row(record, "here:1", columns={"user": "q", "assistant": "a", "system": "persona"})
    assert row.messages == [SYSTEM, USER, SAID]
    assert to_row({"chat": [USER, SAID]}, "here:1", columns={"messages": "chat"}).messages == [USER, SAID]
    missing = to_row({"q": "Hi"}, "here:1", columns={"user": "q", "assistant": "a"})
    assert missing.reason == "has no column a (it has q)"


def test_tools_and_calls_as_templates_read_them():
    record = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "abc", "function": {"name": "get_weather", "arguments": '{"city": "Manila"}'}},
            ]},
            {"role": "tool", "tool_call_id": "abc", "content": "31"},
            SAID,
        ],
        "tools": [{"type": "function", "function": WEATHER}],
    }  # fmt: skip
    row = to_row(record, "here:1")
    assert row.tools == [{"type": "function", "function": WEATHER}]
    assert row.messages[1] == {"role": "assistant", "content": None, "tool_calls": [{"id": "abc", **CALL}]}
    assert row.messages[2] == {"role": "tool", "content": "31", "tool_call_id": "abc"}


def test_sharegpt_function_calls():
    record = {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Manila"}}'},
            {"from": "observation", "value": "31"},
            {"from": "gpt", "value": "Hello."},
        ],
        "tools": json.dumps([WEATHER]),
    }
    row = to_row(record, "here:1")
    assert row.tools == [{"type": "function", "function": WEATHER}]
    assert row.messages == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call00000", **CALL}]},
        {"role": "tool", "content": "31"},
        SAID,
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "a", "rejected": "b"}, "is a preference pair"),
        ({"body": "a"}, r"has no `messages`, nor the columns of another known format \(it has body\)"),
        ({"messages": {}}, "`messages` is empty or not a list"),
        ({"messages": [USER, 3]}, "message 2 is a number"),
        ({"messages": [USER, {"role": "boss", "content": ""}]}, "message 2 has the role 'boss'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"no text \(image_url\)"),
        ({"messages": [{"role": "user", "content": None}]}, r"\(user\) has null as content"),
        ({"messages": [USER, {**SAID, "weight": 0.5}]}, "weight=0.5; it is 0 or 1"),
        ({"messages": [USER, {**SAID, "tool_calls": [{"function": {}}]}]}, "a tool call without a function name"),
        ({"messages": [USER, {**SAID, "tool_calls": [{"name": "f", "arguments": "x"}]}]}, "that are no JSON object"),
        ({"messages": [USER, SAID], "tools": "nothing"}, "`tools` is not a list"),
        ({"instruction": "a", "output": None}, "has no `messages`"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "turn 1 of `history`"),
        ({"prompt": "a", "completion": {"b": 1}}, "`completion` is an object, not text"),
        ({"text": " "}, "`text` is empty"),
        ({"question": "a\ud800", "answer": "b"}, "half a surrogate pair"),
        ([1], "is a list"),
    ],
)
def test_a_record_that_is_none_says_why(record, reason):
    outcome = to_row(record, "chats.jsonl:3")
    assert isinstance(outcome, Rejected)
    assert outcome.where == "chats.jsonl:3"
    assert __import__("re").search(reason, outcome.reason), outcome.reason


CHATS = [{"question": f"What is {i}?", "answer": f'It is\n{i}, "{"i" * i}".'} for i in range(7)]


def table():
    import pyarrow

    return pyarrow.Table.from_pylist(CHATS)


def as_bytes(kind):
    lines = "".join(json.dumps(row) + "\n" for row in CHATS)
    if kind in ("csv", "tsv"):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, ["question", "answer"], delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(CHATS)
        return out.getvalue().encode()
    if kind == "parquet":
        from pyarrow import parquet

        out = io.BytesIO()
        parquet.write_table(table(), out, row_group_size=3)
        return out.getvalue()
    if kind in ("arrow", "stream"):
        from pyarrow import ipc

        out = io.BytesIO()
        with (ipc.new_file if kind == "arrow" else ipc.new_stream)(out, table().schema) as writer:
            writer.write_table(table(), max_chunksize=2)
        return out.getvalue()
    return {
        "jsonl": lines,
        "json": json.dumps(CHATS, indent=1),
        "object": json.dumps({"version": 1, "data": CHATS}),
        "lines": lines,
    }[kind].encode()


def compressed(data, suffix):
    import bz2
    import lzma

    import pyarrow

    if suffix == ".zst":
        return pyarrow.compress(data, "zstd", asbytes=True)
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](data)


FILES = {
    "jsonl": "a.jsonl", "json": "a.json", "object": "b.json", "lines": "c.json", "csv": "a.csv", "tsv": "a.tsv",
    "parquet": "a.parquet", "arrow": "a.arrow", "stream": "b.arrow",
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_compressed_or_not(kind, suffix, tmp_path):
    path = tmp_path / (FILES[kind] + suffix)
    path.write_bytes(compressed(as_bytes(kind), suffix) if suffix else as_bytes(kind))
    rows = list(read_rows(str(path)))
    assert [[m["content"] for m in row.messages] for row in rows] == [[c["question"], c["answer"]] for c in CHATS]
    numbers = [int(row.where.rpartition(":")[2]) for row in rows]
    if kind in ("csv", "tsv"):
        assert numbers == [2 + 2 * i for i in range(7)], "the line where a row begins"
    elif kind == "json":
        assert numbers == [2 + 4 * i for i in range(7)]
    else:
        assert numbers == list(range(1, 8))


def test_names_without_a_suffix_are_looked_into(tmp_path):
    for name, kind in (("one", "jsonl"), ("two", "json"), ("three", "parquet"), ("four", "arrow")):
        (tmp_path / name).write_bytes(as_bytes(kind))
        assert len(list(read_rows(str(tmp_path / name)))) == 7
    (tmp_path / "five").write_text("hello")
    with pytest.raises(DataError, match="is of no known kind"):
        list(read_rows(str(tmp_path / "five")))


def test_folders_patterns_and_lists(tmp_path):
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    for name, kind in (
        ("a.jsonl", "jsonl"),
        ("deep/b.parquet", "parquet"),
        ("deep/c.csv.gz", "csv"),
        ("notes.txt", ""),
    ):
        data = as_bytes(kind) if kind else b"not data"
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (tmp_path / "deep" / ".hidden" / "d.jsonl").write_bytes(as_bytes("jsonl"))
    assert len(list(read_rows(str(tmp_path)))) == 21
    assert len(list(read_rows(f"{tmp_path}/**/*.parquet"))) == 7
    assert len(list(read_rows([str(tmp_path / "a.jsonl"), DataSource(path=f"{tmp_path}/deep/*")]))) == 21
    for nothing, what in ((f"{tmp_path}/*.tsv", "no file matches"), (f"{tmp_path}/x.jsonl", "no such file")):
        with pytest.raises(DataError, match=what):
            list(read_rows(nothing))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no data files"):
        list(read_rows(str(tmp_path / "empty")))


def test_a_hub_id_that_can_not_be_reached_says_so():
    with pytest.raises(DataError, match=r"nobody/nothing:train_sft: no such file, and it can't be had from the .* Hub"):
        list(read_rows("nobody/nothing:train_sft"))


def test_a_hub_data_set(tmp_path, monkeypatch):
    """As `datasets` keeps one: a folder in the Hub's layout stands for the Hub."""
    import datasets

    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_bytes(as_bytes("jsonl"))
    load, asked = datasets.load_dataset, []

    def load_dataset(name, config, **options):
        asked.append((name, config, options))
        return load(str(tmp_path / "set"), split=options["split"], cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_rows(DataSource(path="owner/set", split="test", revision="abc", name="plain")))
    ((name, config, options),) = asked
    assert (name, config, options["split"], options["revision"]) == ("owner/set", "plain", "test", "abc")
    with pytest.raises(DataError, match="name whole splits"):
        list(read_rows("owner/set:test[:10%]"))
    assert [row.messages[0]["content"] for row in rows] == [c["question"] for c in CHATS]
    assert rows[0].where == "owner/set:test:1"


def test_standard_input(monkeypatch):
    for kind in ("jsonl", "json", "parquet"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(as_bytes(kind))))
        rows = list(read_rows("-"))
        assert len(rows) == 7
        assert rows[0].where.startswith("stdin:")


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real files are not here")
def test_the_real_files():
    alpaca = list(read_rows(str(SHARED_DATA / "alpaca_en_demo.json")))
    assert len(alpaca) == len(json.loads((SHARED_DATA / "alpaca_en_demo.json").read_text()))
    assert all(isinstance(row, Row) and row.format == "alpaca" for row in alpaca)
    calls = list(read_rows(str(SHARED_DATA / "glaive_toolcall_en_demo.json")))
    assert len(calls) == 300
    assert all(isinstance(row, Row) and row.format == "sharegpt" for row in calls)
    assert sum(bool(row.tools) for row in calls) == 191
    raw = json.loads((SHARED_DATA / "glaive_toolcall_en_demo.json").read_text())
    made = sum(m["from"] == "function_call" for row in raw for m in row["conversations"])
    assert sum("tool_calls" in message for row in calls for message in row.messages) == made > 100
