"""Pearson's r and its bootstrap over groups."""

import numpy as np
import pytest

from dora_core.analysis.correlation import correlate


def test_r_is_numpys_and_the_interval_is_that_of_a_plain_bootstrap():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(12), 4)
    x = rng.normal(size=12)[groups] + 0.3 * rng.normal(size=48)
    y = -x + rng.normal(size=12)[groups]
    found = correlate(x.tolist(), y.tolist(), groups.tolist())
    assert found.r == pytest.approx(np.corrcoef(x, y)[0, 1]) and (found.num_points, found.num_groups) == (48, 12)
    values = []
    for _ in range(3000):
        index = np.concatenate([np.flatnonzero(groups == g) for g in rng.integers(12, size=12)])
        values.append(np.corrcoef(x[index], y[index])[0, 1])
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.03)
    assert found.low < found.r < found.high < 0
    assert found == correlate(x.tolist(), y.tolist(), groups.tolist())


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(100):
        a, b = rng.normal(size=(2, 40))
        found = correlate(a, 0.6 * a + 0.8 * b, range(40))
        hits += found.low <= 0.6 <= found.high
    assert 85 <= hits <= 100


def test_dependent_points_widen_it():
    x, y = np.random.default_rng(3).normal(size=(2, 10))
    x, y = np.repeat(x, 5), np.repeat(y, 5)
    alone, grouped = correlate(x, y, range(50)), correlate(x, y, np.repeat(np.arange(10), 5))
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)


def test_where_it_is_not_defined():
    assert correlate([1, 2], [2, 3], "ab").r is None
    assert str(correlate([1, 1, 1], [2, 3, 4], "abc")) == "not defined"
    few = correlate([1, 2, 3], [2, 4, 6.1], "abc")
    assert few.r > 0.99 and few.low is None and str(few) == "+1.00"
