"""Steps and flat batches."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phinetune.data import Example, Plan, flatten, lay_out
from phinetune.recipe import TrainingConfig


def example(length, start=100, learnt_from=1):
    return Example("here", list(range(start, start + length)), [i >= learnt_from for i in range(length)])


def test_a_flat_batch_drawn_by_hand():
    batch = flatten([example(3, 10, learnt_from=1), example(2, 20, learnt_from=0)])
    assert batch.ids.tolist() == [[10, 11, 12, 20, 21]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.bounds == [0, 3, 5]
    # 10 predicts 11, 11 predicts 12, 20 predicts 21; nothing predicts 20, the first token of its row
    assert batch.predict.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [11, 12, 21]


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=20),
    max_tokens=st.integers(1, 100),
    boundary=st.sampled_from([None, 30]),
)
def test_a_layout_holds_every_row_once_and_no_row_is_cut(lengths, max_tokens, boundary):
    rows = [example(length, 1000 * i) for i, length in enumerate(lengths)]
    batches = lay_out(rows, max_tokens, boundary)
    seen = []
    for batch in batches:
        spans = list(zip(batch.bounds, batch.bounds[1:], strict=False))
        pieces = [batch.ids[0, a:b].tolist() for a, b in spans]
        seen += pieces
        assert batch.ids.shape[1] <= max_tokens or len(pieces) == 1
        if boundary is not None:
            assert len({len(piece) > boundary for piece in pieces}) == 1
    assert sorted(seen) == sorted(row.ids for row in rows)


def config(**changes):
    return TrainingConfig(**{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **changes})


def test_each_epoch_sees_every_row_once_in_another_order():
    steps = list(Plan([5] * 10, 0, config(num_train_epochs=2), 100))
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = [*chain(*steps[:3])], [*chain(*steps[3:])]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert list(Plan([5] * 10, 0, config(num_train_epochs=2), 100)) == steps
    assert list(Plan([5] * 10, 1, config(num_train_epochs=2), 100)) != steps


@pytest.mark.parametrize(
    ("settings", "steps"), [({"max_steps": 7}, 7), ({"num_train_epochs": 0.5}, 2), ({"num_train_epochs": 2.3}, 7)]
)
def test_how_many_steps(settings, steps):
    assert len(Plan([5] * 10, 0, config(**settings), 100)) == steps


def test_packed_steps_fill_a_token_budget():
    lengths = [30, 50, 20, 70, 10, 90, 40, 60]
    steps = list(Plan(lengths, 0, config(num_train_epochs=1, packing=True, per_device_train_batch_size=1), 60))
    assert sorted(chain(*steps)) == list(range(8))
    totals = [sum(lengths[row] for row in step) for step in steps]
    assert all(total <= 120 for total in totals)
    assert all(a + lengths[step[0]] > 120 for a, step in zip(totals, steps[1:], strict=False)), (
        "no step could take more"
    )
