"""`data check` counts and refuses what a run does: `prepare` on the same rows."""

import json
import re

import pytest
from commands import phinetune

from phinetune.data import prepare
from phinetune.data.check import check_data
from phinetune.errors import DataError
from phinetune.recipe import DataConfig

POLICIES = ["keep", "drop", "raise"]


def written(path, contents):
    rows = [
        {"messages": [{"role": "user", "content": f"Say {said}"}, {"role": "assistant", "content": str(said)}]}
        for said in contents
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def agree(config, tokenizer, seed):
    """Whether both refuse the rows; where neither does, their ledgers are the same."""
    checked = check_data(config, tokenizer, seed)
    refused = [str(error) for source in checked.values() for error in source.refused]
    empty = [source for source in checked.values() if not source.ledger.used]
    try:
        prepared = prepare(config, tokenizer, seed)
    except DataError as error:
        assert refused or empty
        assert str(error) in refused or "none is left" in str(error)
        return True
    assert not refused
    assert not empty
    for name, source in checked.items():
        ours, its = source.ledger, prepared.ledgers[name]
        for count in ("rows", "used", "held_out", "dropped", "rejected"):
            assert getattr(ours, count) == getattr(its, count), count
        assert {f: n for f, (n, _) in ours.findings.items()} == {f: n for f, (n, _) in its.findings.items()}
    return False


@pytest.mark.parametrize("held_out_in_train", POLICIES)
@pytest.mark.parametrize("duplicates", POLICIES)
@pytest.mark.parametrize("doubled", [True, False])
def test_a_share_that_is_held_out(tmp_path, smollm2_tokenizer, duplicates, held_out_in_train, doubled):
    train = written(tmp_path / "train.jsonl", [i % 5 if doubled else i for i in range(12)])
    refused = []
    for seed in range(4):
        config = DataConfig(train=train, eval=0.2, duplicates=duplicates, held_out_in_train=held_out_in_train)
        refused.append(agree(config, smollm2_tokenizer, seed))
    refuses = duplicates == "raise" or (held_out_in_train == "raise" and duplicates == "keep")
    assert refused == 4 * [doubled and refuses]


@pytest.mark.parametrize("held_out_in_train", POLICIES)
def test_a_file_that_is_held_out(tmp_path, smollm2_tokenizer, held_out_in_train):
    train, held = written(tmp_path / "train.jsonl", range(6)), written(tmp_path / "held.jsonl", [4, 5, 6])
    config = DataConfig(train=train, eval=held, held_out_in_train=held_out_in_train)
    assert agree(config, smollm2_tokenizer, 0) == (held_out_in_train == "raise")


def test_rows_too_few_for_a_share(tmp_path, smollm2_tokenizer):
    train = written(tmp_path / "train.jsonl", [1])
    assert agree(DataConfig(train=train, eval=0.05), smollm2_tokenizer, 0)
    assert not agree(DataConfig(train=train, eval=0), smollm2_tokenizer, 0)


def test_training_rows_that_are_all_held_out(tmp_path, smollm2_tokenizer):
    train = written(tmp_path / "train.jsonl", [1] * 8)
    assert agree(DataConfig(train=train, eval=0.25), smollm2_tokenizer, 0), "the others say the same"
    assert not agree(DataConfig(train=train, eval=0.25, held_out_in_train="keep"), smollm2_tokenizer, 0)


def test_from_the_command_line_what_a_run_refuses_is_refused(tmp_path):
    one, same = written(tmp_path / "one.jsonl", [1]), written(tmp_path / "same.jsonl", [1] * 8)
    for data, settings, what in (
        (one, ["eval=0.05"], f"{one}: has 1 usable rows, too few to hold out 0.05 of them; set data.eval: 0"),
        (same, ["eval=0.25"], f"{same}: none of 8 rows is left to train on: a run would refuse this data; "),
        (same, ["eval=0.25", "held_out_in_train=raise"], f"{same}: 6 rows are held-out rows too "),
    ):
        checked = phinetune("data", "check", data, *settings)
        assert checked.returncode == 2
        assert checked.stderr.startswith(f"error: {what}"), checked.stderr
        assert "rows " in checked.stdout, "what was counted is said before"
    kept = phinetune("data", "check", same, "eval=0.25", "held_out_in_train=keep")
    assert kept.returncode == 0, kept.stderr
    assert re.search(r"can be used +6 .*\n  held out +2\n", kept.stdout)
