"""Each data set is taken by its weight, and its rows equally often over time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_core.data.mixture import Mixture

data_sets = st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 3.5)), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data_sets, st.integers(0, 3), st.integers(1, 9))
def test_over_time_the_rows_of_a_data_set_are_used_equally_often(pairs, seed, num_epochs):
    sizes, weights = zip(*pairs, strict=True)
    mixture = Mixture(sizes, weights, seed)
    used = Counter()
    for epoch in range(num_epochs):
        rows = mixture.epoch(epoch)
        assert rows.dtype == np.int64 and len(rows) == mixture.epoch_size
        used.update(rows.tolist())
    start = 0
    for size, weight in pairs:
        counts = [used[row] for row in range(start, start + size)]
        assert sum(counts) == num_epochs * max(1, round(weight * size))
        assert max(counts) - min(counts) <= 1
        start += size
    assert start == mixture.num_rows and set(used) <= set(range(start))


def test_weight_one_is_each_row_once_per_epoch_and_other_weights_are_in_proportion():
    mixture = Mixture([10, 100, 7, 5], [1.0, 0.25, 3.0, 0.001], seed=4)
    assert mixture.num_taken == (10, 25, 21, 1)
    assert mixture.epoch_size == 57
    for epoch in range(4):
        rows = mixture.epoch(epoch)
        assert sorted(rows[:10]) == list(range(10))
        assert Counter(rows[35:56].tolist()) == dict.fromkeys(range(110, 117), 3)
    quarters = np.concatenate([mixture.epoch(epoch)[10:35] for epoch in range(4)])
    assert sorted(quarters) == list(range(10, 110))


def test_an_epoch_depends_on_the_arguments_and_its_number_alone():
    mixture = Mixture([40, 30], [0.5, 1.0], seed=1)
    epochs = [mixture.epoch(epoch).tolist() for epoch in range(5)]
    again = Mixture([40, 30], [0.5, 1.0], seed=1)
    assert [again.epoch(epoch).tolist() for epoch in reversed(range(5))] == epochs[::-1]
    assert epochs[0] != epochs[1]
    assert Mixture([40, 30], [0.5, 1.0], seed=2).epoch(0).tolist() != epochs[0]


def test_one_data_sets_rows_do_not_depend_on_the_others_sizes_and_weights():
    one = Mixture([40, 30], [0.5, 1.0], seed=1).epoch(3)[-30:] - 40
    other = Mixture([9, 30], [2.0, 1.0], seed=1).epoch(3)[-30:] - 9
    assert one.tolist() == other.tolist()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_positive_number_is_an_error(weight):
    with pytest.raises(ValueError, match=r"weights is .* must be finite numbers above 0\. Leave out a data set"):
        Mixture([3, 4], [1.0, weight], seed=0)


def test_each_data_set_needs_rows_and_one_weight():
    with pytest.raises(ValueError, match=r"len\(weights\) is 1; it must be the number of data sets \(2\)\. Give each"):
        Mixture([3, 4], [1.0], seed=0)
    with pytest.raises(ValueError, match=r"sizes is .* positive number of rows"):
        Mixture([3, 0], [1.0, 1.0], seed=0)
    with pytest.raises(ValueError, match="sizes is"):
        Mixture([], [], seed=0)
    with pytest.raises(ValueError, match="epoch is -1"):
        Mixture([3], [1.0], seed=0).epoch(-1)
