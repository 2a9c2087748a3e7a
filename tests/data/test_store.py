"""Tokenised data in the cache: the same from one process or several, bounded, found again, made anew when it must."""

import itertools
import json
import os
import time

import numpy as np
import pytest

from phinetune.data import Plan, deal, prepare, readers
from phinetune.data import tokenise as room
from phinetune.errors import DataError
from phinetune.recipe import DataConfig, DataSource, TrainingConfig


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "data"


def write(path, count, first=0):
    rows = [
        {"messages": [
            {"role": "user", "content": f"What is {i}?"},
            {"role": "assistant", "content": f"It is {i}." * (1 + i % 7)},
        ]}
        for i in range(first, first + count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_processes_give_what_one_gives(tmp_path, cache, smollm2_tokenizer):
    source = write(tmp_path / "a.jsonl", 12_000)  # several chunks
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("nonsense\n")
    one = prepare(DataConfig(train=source, num_proc=1), smollm2_tokenizer, 0)
    two = prepare(DataConfig(train=source, num_proc=2, max_length=2047), smollm2_tokenizer, 0)
    assert one.train.store.folder != two.train.store.folder
    assert one.train.store.digest == two.train.store.digest
    assert one.fingerprint == two.fingerprint
    assert [r.where for r in two.rejected()] == [f"{source}:12001"]
    assert one.train[11_999].ids.tolist() == two.train[11_999].ids.tolist()
    assert two.train_rows[8_765].messages[0]["content"] == "What is 8765?"
    assert two.train[8_765].where == f"{source}:8766"
    assert isinstance(one.train.store._ids, np.memmap)


def test_an_error_in_a_process_is_an_error_here(tmp_path, cache, smollm2_tokenizer):
    source = write(tmp_path / "a.jsonl", 10)
    config = DataConfig(train=source, num_proc=2, max_length=20, excess_length_strategy="raise")
    with pytest.raises(DataError, match=r"a\.jsonl:\d+: has \d+ tokens, above"):
        prepare(config, smollm2_tokenizer, 0)
    assert not list(cache.iterdir()), "nothing half-made stays behind"


def test_the_cache_is_used_and_knows_what_it_depends_on(tmp_path, cache, smollm2_tokenizer, monkeypatch):
    source = write(tmp_path / "a.jsonl", 20)

    def folders():
        return {path.name for path in cache.iterdir()}

    def prepared(tokenizer=smollm2_tokenizer, **settings):
        return prepare(DataConfig(train=source, **settings), tokenizer, 0)

    first = prepared()
    assert len(folders()) == 1
    with monkeypatch.context() as patch:
        patch.setattr(room, "tokenise", lambda *_: pytest.fail("tokenised again"))
        again = prepared(eval=0.1, duplicates="drop", max_rejected=0.5)
        assert again.train.store.folder == first.train.store.folder
    seen = folders()
    import copy

    other = copy.deepcopy(smollm2_tokenizer)
    other.chat_template = "{# another #}" + other.chat_template
    grown = copy.deepcopy(smollm2_tokenizer)
    grown.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    for change in (
        lambda: prepared(max_length=100),
        lambda: prepared(supervise="last"),
        lambda: prepared(tokenizer=other),
        lambda: prepared(tokenizer=grown),
        lambda: prepared(chat_template_kwargs={"x": 1}),
        lambda: write(tmp_path / "a.jsonl", 21) and prepared(),
    ):
        change()
        assert len(folders() - seen) == 1
        seen = folders()


@pytest.mark.parametrize("name", ["manifest.json", "rows.npz", "examples.npz", "ids.bin"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"{}"])
def test_damaged_data_in_the_cache_is_made_again(tmp_path, cache, smollm2_tokenizer, caplog, name, content):
    config = DataConfig(train=write(tmp_path / "a.jsonl", 5))
    first = prepare(config, smollm2_tokenizer, 0).train
    (first.store.folder / name).write_bytes(content)
    again = prepare(config, smollm2_tokenizer, 0).train
    assert [list(example.ids) for example in again] == [list(example.ids) for example in first]
    assert "is damaged: it is made again" in caplog.text


def test_rows_from_python_and_what_json_can_not_hold(cache, smollm2_tokenizer):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = (row for row in [good, {"messages": {1, 2}}, good])
    data = prepare(DataConfig(train="rows", max_rejected=0.5), smollm2_tokenizer, 0, train_rows=rows)
    assert [example.where for example in data.train] == ["row:1", "row:3"]
    (left_out,) = data.rejected()
    assert left_out.where == "row:2"
    assert "holds what JSON can't" in left_out.reason


def test_sources_mixed_by_weight(tmp_path, cache, smollm2_tokenizer):
    a, b, c = write(tmp_path / "a.jsonl", 10), write(tmp_path / "b.jsonl", 8, 100), write(tmp_path / "c.jsonl", 4, 200)
    config = DataConfig(train=[a, DataSource(path=b, weight=0.25), DataSource(path=c, weight=2)])
    data = prepare(config, smollm2_tokenizer, 0)
    settings = TrainingConfig(per_device_train_batch_size=20, num_train_epochs=4)
    plan = Plan(data.train.lengths, 0, settings, 2048, data.weights)
    assert len(plan) == 4
    quarter = []
    for epoch in range(4):
        rows = plan[epoch]
        assert sorted(row for row in rows if row < 10) == list(range(10)), "weight 1: each once"
        assert sorted(row for row in rows if row >= 18) == sorted([18, 19, 20, 21] * 2), "weight 2: each twice"
        mine = [row for row in rows if 10 <= row < 18]
        assert len(mine) == 2, "weight 0.25: a quarter of eight"
        quarter += mine
    assert sorted(quarter) == list(range(10, 18)), "another quarter in each epoch"


def test_a_step_is_found_again_at_once():
    lengths = np.random.default_rng(0).integers(5, 500, 50_000)
    for packing in (False, True):
        config = TrainingConfig(per_device_train_batch_size=8, num_train_epochs=2.5, packing=packing)
        plan = Plan(lengths, 7, config, 512)
        steps = list(plan)
        again = Plan(lengths, 7, config, 512)
        for step in (0, len(plan) // 2, len(plan) - 1):
            assert again[step] == steps[step]
            assert again.rows_from(step).tolist() == [row for rows in steps[step:] for row in rows]
        seen = [row for rows in steps[: plan.ends[0]] for row in rows]
        assert sorted(seen) == list(range(50_000)), "every row once an epoch"
        assert plan.epoch_ends == {plan.ends[0], plan.ends[1]}, "the half epoch has no end"
        if packing:
            totals = [lengths[rows].sum() for rows in steps]
            assert max(totals) <= 8 * 512
            assert np.mean(totals) > 0.9 * 8 * 512


def test_a_steps_rows_are_dealt_evenly():
    lengths = [900, 30, 500, 480, 20, 470, 100, 90]
    shares = deal(lengths, 3)
    assert sorted(place for share in shares for place in share) == list(range(8))
    most = max(sum(lengths[place] for place in share) for share in shares)
    best = min(  # of all ways to deal them
        max(sum(n for n, rank in zip(lengths, ranks, strict=True) if rank == r) for r in range(3))
        for ranks in itertools.product(range(3), repeat=8)
    )
    assert best <= most <= 4 / 3 * best
    assert deal(lengths, 3) == shares
    assert deal([5], 2) == [[0], []]


@pytest.mark.parametrize("gone", ["manifest.json", "rows.jsonl", "rejected.jsonl", "ids.bin", "rows.npz"])
@pytest.mark.parametrize("how", ["removed", "cut"])
def test_a_damaged_cache_is_made_again(tmp_path, cache, smollm2_tokenizer, gone, how):
    source = write(tmp_path / "a.jsonl", 5)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("nonsense\n")
    config = DataConfig(train=source, max_rejected=1)
    before = prepare(config, smollm2_tokenizer, 0)
    path = before.train.store.folder / gone
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    again = prepare(config, smollm2_tokenizer, 0)
    assert again.fingerprint == before.fingerprint
    assert again.train_rows[4].messages[0]["content"] == "What is 4?"
    assert [r.where for r in again.rejected()] == [f"{source}:6"]


def test_what_is_not_the_caches_is_never_removed(tmp_path, cache, smollm2_tokenizer):
    old = time.time() - 100 * 86400
    mine, theirs, half = cache / "my corpus", cache / ("a" * 32), cache / ".tmp-abc"
    for folder in (mine, theirs, half):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
        os.utime(folder, (old, old))
    prepare(DataConfig(train=write(tmp_path / "a.jsonl", 5)), smollm2_tokenizer, 0)
    assert (mine / "file").read_text() == "x"
    assert not theirs.exists()
    assert not half.exists()


def test_the_fingerprint_is_of_the_tokens_not_of_how_they_are_read(tmp_path, cache, smollm2_tokenizer, monkeypatch):
    source = write(tmp_path / "a.jsonl", 3000)
    one = prepare(DataConfig(train=source, num_proc=1), smollm2_tokenizer, 0)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 10_000)
    other = prepare(DataConfig(train=source, num_proc=1, max_length=2047), smollm2_tokenizer, 0)
    assert one.train.store.folder != other.train.store.folder
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize(
    ("epochs", "in_an_epoch", "steps"),
    [
        (1.1, 10, 11),
        (1.3, 10, 13),
        (1.6, 10, 16),
        (0.5, 10, 5),
        (2, 10, 20),
        (1.11, 10, 12),
        (0.01, 10, 1),
        (1.1, 100, 110),
        (0.07, 100, 7),
    ],
)
def test_part_of_an_epoch_has_its_share_of_the_steps_rounded_up(epochs, in_an_epoch, steps):
    """Counted by hand. transformers takes the product in floating point, and makes a step more of the last two, 111 and
    8: 1.1 · 100 is a little more than 110 there."""
    config = TrainingConfig(num_train_epochs=epochs, per_device_train_batch_size=4)
    assert len(Plan([10] * (4 * in_an_epoch), 0, config, 512)) == steps
