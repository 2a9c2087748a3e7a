"""Rows of a file: which are used, which are listed, and when that is too many."""

import json

import pytest

from phinetune.data import Rejected, Row, prepare, read_rows, write_ledgers
from phinetune.errors import DataError
from phinetune.recipe import DataConfig

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [', "not valid JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[1, 2]", "is a list"),
        (b'{"texts": "a"}', "has no `messages`, nor .* .it has texts"),
        (b'{"messages": []}', "empty"),
        (b'{"messages": [{"role": "boss", "content": "a"}]}', "the role 'boss'"),
        (b'{"messages": [{"role": "assistant", "content": 5}]}', "a number as content"),
        (b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "surrogate"),
        (b"[" * 100_000, "nested too deeply|not valid JSON"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path, line, reason):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n" + json.dumps(GOOD).encode() + b"\n")
    first, bad, last = read_rows(str(path))
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert isinstance(bad, Rejected)
    assert bad.where == f"{path}:2"
    assert __import__("re").search(reason, bad.reason), bad.reason


def test_byte_order_mark_crlf_and_blank_lines(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(GOOD).encode())
    assert [row.where for row in read_rows(str(path))] == [f"{path}:1", f"{path}:3"]


def write(tmp_path, good, bad):
    path = tmp_path / "chats.jsonl"
    path.write_text((json.dumps(GOOD) + "\n") * good + "nonsense\n" * bad)
    return DataConfig(train=str(path))


def test_counts_reconcile_and_every_rejected_row_is_written(tmp_path, smollm2_tokenizer):
    prepared = prepare(write(tmp_path, 200, 2), smollm2_tokenizer, seed=0)
    write_ledgers(tmp_path, prepared.ledgers, prepared.rejected(), {"fingerprint": prepared.fingerprint})
    counts = json.loads((tmp_path / "ledger.json").read_text())["train"]
    assert (counts["rows"], counts["used"], counts["rejected"]) == (202, 200, 2)
    assert counts["tokens"] == sum(len(e.ids) for e in prepared.train)
    assert counts["supervised"] == 200 * 2  # "b" and <|im_end|>
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [r["where"].rpartition(":")[2] for r in rejected] == ["201", "202"]
    assert all("not valid JSON" in r["reason"] and r["row"] == "nonsense" for r in rejected)


def test_too_many_bad_rows_end_the_run(tmp_path, smollm2_tokenizer):
    with pytest.raises(DataError, match=r"3 of 103 rows can't be used, more than data.max_rejected=0.01") as error:
        prepare(write(tmp_path, 100, 3), smollm2_tokenizer, seed=0)
    assert "chats.jsonl:101" in str(error.value)


def test_no_usable_row_is_an_error_whatever_the_threshold(tmp_path, smollm2_tokenizer):
    config = write(tmp_path, 0, 3).model_copy(update={"max_rejected": 1.0})
    with pytest.raises(DataError, match="3 of 3 rows"):
        prepare(config, smollm2_tokenizer, seed=0)


def test_a_share_is_held_out_and_never_trained_on(chats, smollm2_tokenizer):
    config = DataConfig(train=str(chats), eval=0.1)
    prepared = prepare(config, smollm2_tokenizer, seed=3)
    assert (len(prepared.train), len(prepared.eval)) == (36, 4)
    held = {e.where for e in prepared.eval}
    assert held.isdisjoint(e.where for e in prepared.train)
    assert {e.where for e in prepare(config, smollm2_tokenizer, seed=3).eval} == held
    assert {e.where for e in prepare(config, smollm2_tokenizer, seed=4).eval} != held


def test_missing_files_and_unknown_shipped_sets():
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        list(read_rows("nowhere.jsonl"))
    with pytest.raises(DataError, match="phinetune:orders/eval, phinetune:orders/train"):
        list(read_rows("phinetune:nothing/train"))


def test_the_shipped_rows_are_what_their_generator_writes():
    import random

    from phinetune.data.shipped import orders

    rng = random.Random(orders.SEED)
    train, held_out = orders.make_sets(rng)
    assert [row.raw for row in read_rows("phinetune:orders/train")] == train
    assert [row.raw for row in read_rows("phinetune:orders/eval")] == held_out
    assert len(held_out) >= 100


def test_held_out_orders_share_no_item_word_and_no_sentence_with_training():
    from phinetune.data.shipped import orders

    assert not set(orders.TRAIN_FLAVOURS + orders.TRAIN_PRODUCTS) & set(orders.EVAL_FLAVOURS + orders.EVAL_PRODUCTS)
    trained = [row.messages[1]["content"] for row in read_rows("phinetune:orders/train") if isinstance(row, Row)]
    for pattern in orders.EVAL_PATTERNS:
        opening, ending = pattern.partition("{")[0], pattern.rpartition("}")[2]
        assert not any(said.startswith(opening) and said.endswith(ending) for said in trained), pattern
