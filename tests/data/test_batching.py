import bisect
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.data.batching import EMPTY, collate, default_buckets, plan_epoch
from jaxdistill.errors import UserError

BUCKETS = (8, 16, 24, 64)


def reference_sampler(lengths, order, batch_size, buckets):
    """The length-grouped sampler of DistilBERT, row by row."""
    buffers = [[] for _ in buckets]
    for row in order:
        group = bisect.bisect_left(buckets, lengths[row])
        buffers[group].append(row)
        if len(buffers[group]) == batch_size:
            yield buffers[group], buckets[group]
            buffers[group] = []
    rest = [(row, width) for buffer, width in zip(buffers, buckets, strict=True) for row in buffer]
    for start in range(0, len(rest), batch_size):
        batch = rest[start : start + batch_size]
        yield [row for row, _ in batch], max(width for _, width in batch)


@given(
    lengths=st.lists(st.integers(1, 64), max_size=80),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_plan_is_the_reference_sampler_with_each_row_once(lengths, batch_size, seed, epoch, shuffle):
    lengths = np.array(lengths, np.int64)
    arguments = dict(batch_size=batch_size, buckets=BUCKETS, seed=seed, epoch=epoch, shuffle=shuffle)
    plan = plan_epoch(lengths, **arguments)

    assert plan.ids.shape == (math.ceil(len(lengths) / batch_size), batch_size)
    rows = plan.ids[plan.ids != EMPTY]
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(lengths)))
    assert (plan.ids[:-1] != EMPTY).all(), "only the last batch has empty rows"
    again = plan_epoch(lengths, **arguments)
    np.testing.assert_array_equal(plan.ids, again.ids)

    order = np.random.default_rng((seed, epoch)).permutation(len(lengths)) if shuffle else range(len(lengths))
    expected = list(reference_sampler(lengths, order, batch_size, BUCKETS))
    assert [[row for row in ids if row != EMPTY] for ids in plan.ids.tolist()] == [rows for rows, _ in expected]
    assert plan.widths.tolist() == [width for _, width in expected]


def test_seed_and_epoch_change_the_order():
    lengths = np.full(100, 8)
    orders = {
        tuple(plan_epoch(lengths, batch_size=10, buckets=(8,), seed=seed, epoch=epoch).ids.flat)
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_too_long_a_row_names_both_lengths():
    with pytest.raises(UserError, match="65 tokens does not fit the widest bucket of 64"):
        plan_epoch(np.array([3, 65]), batch_size=2, buckets=BUCKETS, seed=0, epoch=0)


@pytest.mark.parametrize(
    ("max_length", "widths"), [(128, (16, 32, 64, 128)), (512, (64, 128, 256, 512)), (10, (8, 10)), (8, (8,))]
)
def test_default_buckets(max_length, widths):
    assert default_buckets(max_length) == widths


def test_collate_pads_on_the_right():
    rows = [np.array([5, 6, 7], np.uint16), np.array([], np.uint16), np.array([8], np.uint16)]
    batch = collate(rows, width=4, pad=1)
    np.testing.assert_array_equal(batch["input_ids"], [[5, 6, 7, 1], [1, 1, 1, 1], [8, 1, 1, 1]])
    np.testing.assert_array_equal(batch["attention_mask"], [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    assert batch["input_ids"].dtype == np.int32
    assert batch["attention_mask"].dtype == bool
