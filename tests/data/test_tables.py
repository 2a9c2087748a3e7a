"""Arrow and Parquet: a row is what it was before it became a table's."""

import datetime
import json

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from phinetune.data import Rejected, read_rows
from phinetune.errors import DataError

USER = {"role": "user", "content": "Weather?"}
ANSWER = {"role": "assistant", "content": "Sunny."}


def call(**arguments):
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def arguments_of(row):
    return [c["function"]["arguments"] for m in row.messages for c in m.get("tool_calls", ())]


@pytest.fixture(params=["parquet", "arrow", "stream"])
def written(request, tmp_path):
    def write(table):
        path = tmp_path / f"rows.{request.param.replace('stream', 'arrow')}"
        if request.param == "parquet":
            parquet.write_table(table, path)
        else:
            with (ipc.new_file if request.param == "arrow" else ipc.new_stream)(path, table.schema) as file:
                file.write_table(table)
        return path

    return write


def test_nulls_that_a_table_has_added_are_not_learnt(written):
    chats = [[USER, call(city="Manila"), ANSWER], [USER, call(date="today", unit=None), ANSWER]]
    tools = [{"name": "f", "parameters": {"properties": {"city": {"type": "string"}}}},
             {"name": "f", "parameters": {"properties": {"date": {"type": "string"}}}}]  # fmt: skip
    table = pa.Table.from_pylist([{"messages": c, "tools": [t]} for c, t in zip(chats, tools, strict=True)])
    rows = list(read_rows(str(written(table))))
    assert [arguments_of(row) for row in rows] == [[{"city": "Manila"}], [{"date": "today"}]]
    assert [row.tools[0]["function"] for row in rows] == tools
    assert rows[0].messages[0] == USER


def test_json_that_a_table_keeps_as_text_is_json(written):
    """As `datasets` keeps fields of mixed types."""
    texts = [json.dumps([{"type": "text", "text": "Weather?"}]), json.dumps("Sunny.")]
    message = pa.struct([("role", pa.string()), ("content", pa.json_())])
    messages = pa.array([[{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]],
                        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))  # fmt: skip
    values = messages.values
    content = pa.ExtensionArray.from_storage(pa.json_(), values.field("content"))
    struct = pa.StructArray.from_arrays([values.field("role"), content], fields=list(message))
    typed = pa.ListArray.from_arrays(messages.offsets, struct)
    tools = pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps([{"name": "f", "x": {"d": None}}])]))
    table = pa.table({"messages": typed, "tools": tools})
    (row,) = read_rows(str(written(table)))
    assert row.messages == [USER, ANSWER]
    assert row.tools == [{"type": "function", "function": {"name": "f", "x": {"d": None}}}], "its own null stays"


def test_maps_are_objects(written):
    kind = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    calls = pa.array([[{"name": "f", "arguments": [("city", "Manila")]}]], pa.list_(kind))
    message = pa.StructArray.from_arrays([pa.array(["assistant"]), calls], names=["role", "tool_calls"])
    (row,) = read_rows(str(written(pa.table({"messages": pa.ListArray.from_arrays(pa.array([0, 1]), message)}))))
    assert arguments_of(row) == [{"city": "Manila"}]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([253402300799999999 + 86_400_000_000], pa.timestamp("us", tz="Asia/Manila")),
        pa.array([10_000_000], pa.date32()),
        pa.array([1], pa.timestamp("ns", tz="Nowhere/Land")),
        pa.array([datetime.datetime(2024, 1, 1)]),
    ],
)
def test_dates_that_python_has_not_are_no_reason_to_refuse_a_file(written, column):
    (row,) = read_rows(str(written(pa.table({"messages": [[USER, ANSWER]], "until": column}))))
    assert row.messages == [USER, ANSWER]


def test_a_column_that_stands_twice(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["question", "answer", "answer"])
    with ipc.new_file(tmp_path / "rows.arrow", table.schema) as file:
        file.write_table(table)
    with pytest.raises(DataError, match=r"rows\.arrow: has the column 'answer' twice"):
        list(read_rows(str(tmp_path / "rows.arrow")))


def test_rows_of_a_dataset_object_keep_their_types(tmp_path):
    from datasets import Dataset

    from phinetune.data.sources import open_sources

    chats = [[USER, call(city="Manila"), ANSWER], [USER, call(date="today"), ANSWER], [USER, ANSWER]]
    dataset = Dataset.from_list([{"messages": chat} for chat in chats]).select([2, 0])
    with open_sources("Python", dataset) as files:
        from phinetune.data.readers import chunks, rows

        read = [row for chunk in chunks(files[0], 0) for _, row in rows(chunk, files[0])]
    assert [row.where for row in read] == ["row:1", "row:2"]
    assert [arguments_of(row) for row in read] == [[], [{"city": "Manila"}]]
    assert not any(isinstance(row, Rejected) for row in read)
