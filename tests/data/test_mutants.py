"""Damaged files: no crash, no hang, a place and a reason for every row that is left out, counts that reconcile."""

import json
import time

import pytest
from mutants import mutants

from phinetune.data.prepare import prepare, task_of
from phinetune.data.sources import open_sources
from phinetune.data.tokenise import tokenise
from phinetune.errors import DataError
from phinetune.recipe import DataConfig

SECONDS = 20.0  # for the largest of them, a line of 50 MB


def outcome(path, tokenizer):
    """(used, [(where, reason)]), or the error that the whole file is."""
    used, rejected = 0, []

    def take(piece):
        nonlocal used
        used += len(piece.number)
        assert (piece.number >= 1).all()
        assert len(piece.ids) == piece.lengths.sum() == piece.parts.sum()
        for number, reason, raw in piece.rejected:
            json.dumps(raw, default=str)
            rejected.append((f"{path}:{number}", reason))

    config = DataConfig(train=str(path), max_length=1 << 26)
    with open_sources(config.train) as files:
        tokenise(task_of(files, tokenizer, config), take)
    return used, rejected


def explained(mutant, folder, tokenizer):
    """Nothing if the file came out as it should, else what is wrong."""
    path = folder / f"chats{mutant.suffix}"
    path.write_bytes(mutant.content)
    begin = time.perf_counter()
    try:
        used, rejected = outcome(path, tokenizer)
    except DataError as error:
        if not (str(path) in error.where and error.what and error.mend):
            return f"an error that doesn't say where, what and how: {error}"
        return f"refused as a whole, though {mutant.good} rows are good: {error}" if mutant.good else ""
    if time.perf_counter() - begin > SECONDS:
        return "took too long"
    if any(not reason.strip() or int(where.rpartition(":")[2]) < 1 for where, reason in rejected):
        return f"a rejection without place or reason: {rejected}"
    if mutant.rows is not None and used + len(rejected) != mutant.rows:
        return f"{used} used and {len(rejected)} rejected of {mutant.rows}: {rejected[:3]}"
    if mutant.good is not None and used != mutant.good:
        return f"{used} used where {mutant.good} are good: {rejected[:3]}"
    return ""


@pytest.mark.parametrize("seed", range(1))
def test_a_sample(seed, tmp_path, smollm2_tokenizer):
    faults = [(m.name, fault) for m in mutants(seed, 200) if (fault := explained(m, tmp_path, smollm2_tokenizer))]
    assert not faults


@pytest.mark.slow
def test_ten_thousand(tmp_path, smollm2_tokenizer):
    faults = [(m.name, fault) for m in mutants(4, 10_000) if (fault := explained(m, tmp_path, smollm2_tokenizer))]
    assert not faults


def test_the_ledger_counts_every_line_of_a_file_once(tmp_path, smollm2_tokenizer):
    chats = [[{"role": "user", "content": f"{i % 25}?"}, {"role": "assistant", "content": "Yes."}] for i in range(30)]
    lines = [*(json.dumps({"messages": chat}) for chat in chats), "nonsense", "[]", "{}"]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines))
    config = DataConfig(train=str(path), eval=0.2, duplicates="drop", max_rejected=0.5)
    data = prepare(config, smollm2_tokenizer, seed=0)
    ledger = data.ledgers["train"]
    assert ledger.rows == len(lines)
    assert ledger.used == len(data.train_rows) > 0
    assert ledger.held_out == len(data.eval_rows) > 0
    assert (ledger.rejected, sum(ledger.dropped.values())) == (3, 5)
