"""Steps and flat batches."""

import random
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phinetune.data import Example, Plan, flatten, lay_out
from phinetune.recipe import TrainingConfig


def example(length, start=100, learnt_from=1):
    return Example("here", list(range(start, start + length)), [i >= learnt_from for i in range(length)])


def test_a_flat_batch_drawn_by_hand():
    batch = flatten([example(3, 10, learnt_from=1), example(2, 20, learnt_from=0)])
    assert batch.ids.tolist() == [[10, 11, 12, 20, 21]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.paths == [[(0, 3)], [(3, 5)]]
    assert batch.counts is None
    # 10 predicts 11, 11 predicts 12, 20 predicts 21; nothing predicts 20, the first token of its row
    assert batch.predict.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [11, 12, 21]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=20),
    max_tokens=st.integers(1, 100),
    boundary=st.sampled_from([None, 30]),
)
def test_a_layout_holds_every_row_once_and_no_row_is_cut(lengths, max_tokens, boundary):
    rows = [example(length, 1000 * i) for i, length in enumerate(lengths)]
    batches = lay_out(rows, max_tokens, boundary, least_shared=0)
    seen = []
    for batch in batches:
        pieces = [batch.ids[0, a:b].tolist() for ((a, b),) in batch.paths]
        seen += pieces
        assert batch.ids.shape[1] <= max_tokens or len(pieces) == 1
        if boundary is not None:
            assert len({len(piece) > boundary for piece in pieces}) == 1
    assert sorted(seen) == sorted(row.ids for row in rows)


def test_a_common_beginning_is_laid_once_drawn_by_hand():
    rows = [
        Example("a", [1, 2, 3, 4], [False, True, False, True]),
        Example("b", [1, 2, 5], [False, True, True]),
        Example("c", [9, 8], [True, True]),
    ]
    batch = flatten(rows, least_shared=2)
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5, 9, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert batch.paths == [[(0, 2)], [(0, 2), (2, 4)], [(0, 2), (4, 5)], [(5, 7)]]
    # 1 predicts 2 for two rows; 2 predicts 5 for one of them; 3 predicts 4; 9 predicts 8
    learnt = zip(batch.predict.tolist(), batch.targets.tolist(), batch.counts.tolist(), strict=True)
    assert sorted(learnt) == [(0, 2, 2.0), (1, 5, 1.0), (2, 4, 1.0), (5, 8, 1.0)]


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=9), min_size=1, max_size=8),
    max_tokens=st.integers(1, 30),
    least_shared=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_row_learns_the_same_behind_the_same_tokens_when_beginnings_are_shared(
    rows, max_tokens, least_shared, seed
):
    masks = random.Random(seed)
    examples = [Example(str(i), ids, [masks.random() < 0.6 for _ in ids]) for i, ids in enumerate(rows)]
    expected = Counter(
        (tuple(e.ids[:i]), e.ids[i]) for e in examples for i in range(1, len(e.ids)) if e.mask[i]
    )  # fmt: skip
    seen = Counter()
    for batch in lay_out(examples, max_tokens, None, least_shared):
        ids, positions = batch.ids[0].tolist(), batch.position_ids[0].tolist()
        counts = [1] * len(batch.predict) if batch.counts is None else batch.counts.tolist()
        for place, target, count in zip(batch.predict.tolist(), batch.targets.tolist(), counts, strict=True):
            (path,) = (path for path in batch.paths if path[-1][0] <= place < path[-1][1])
            context = [i for start, end in path for i in range(start, end) if (start, end) != path[-1] or i <= place]
            assert [positions[i] for i in context] == list(range(len(context)))
            seen[tuple(ids[i] for i in context), target] += int(count)
        # Of what two neighbours have in common less than `least_shared` tokens may have to be laid twice.
        assert len(ids) <= max_tokens + (least_shared - 1) * len(batch.paths) or len(batch.paths) == 1
    assert seen == expected


def test_rows_on_both_sides_of_a_boundary_share_nothing():
    rows = [example(40), example(20), example(39), example(21)]
    for batch in lay_out(rows, 1000, boundary=30, least_shared=4):
        assert len({int(batch.position_ids.max()) >= 30}) == 1
        assert batch.ids.shape[1] in (40, 21)


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


@pytest.mark.parametrize(
    ("settings", "weights"),
    [({}, None), ({"num_train_epochs": 3}, None), ({"packing": True}, None), ({}, [2.5, 1, 0.5, 1, 0, 1, 3, 1, 1])],
)
def test_the_most_tokens_of_a_step(settings, weights):
    lengths = [30, 50, 20, 70, 10, 90, 40, 60, 500]
    plan = Plan(lengths, 0, config(**{"num_train_epochs": 1, **settings}), 60, weights and np.array(weights))
    assert plan.most_tokens == max(sum(lengths[row] for row in step) for step in plan)


def test_packed_steps_fill_a_token_budget():
    lengths = [30, 50, 20, 70, 10, 90, 40, 60]
    steps = list(Plan(lengths, 0, config(num_train_epochs=1, packing=True, per_device_train_batch_size=1), 60))
    assert sorted(chain(*steps)) == list(range(8))
    totals = [sum(lengths[row] for row in step) for step in steps]
    assert all(total <= 120 for total in totals)
    assert all(a + lengths[step[0]] > 120 for a, step in zip(totals, steps[1:], strict=False)), (
        "no step could take more"
    )
