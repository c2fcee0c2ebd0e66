"""Rows come back equal from one shared block of memory, in this process and in others."""

from __future__ import annotations

import datetime
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dora_core.data.rows import DataError
from dora_core.data.store import RowStore

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
ROWS = [{"id": str(number), "turns": [{"from": "human", "value": "ü\u2028" * number}]} for number in range(20)]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=6))
def test_rows_come_back_equal_and_in_order(rows):
    store = RowStore(rows)
    assert len(store) == len(rows)
    assert list(store) == rows
    assert [store[index - len(rows)] for index in range(len(rows))] == rows


def test_half_a_surrogate_pair_comes_back():
    rows = [{"text": "\ud83d"}, {"text": "\ud83d\ude00"}]
    assert list(RowStore(rows)) == rows


def test_an_index_outside_is_an_error_and_numpys_integers_are_indices():
    store = RowStore(iter(ROWS))
    assert store[np.int64(3)] == ROWS[3]
    for index in (20, -21):
        with pytest.raises(IndexError, match=f"row {index} was asked for; there are 20"):
            store[index]
    with pytest.raises(IndexError):
        RowStore([])[0]


def test_changing_a_row_does_not_change_the_store():
    store = RowStore(ROWS)
    store[0]["turns"].clear()
    assert store[0] == ROWS[0]
    with pytest.raises(ValueError, match="read-only"):
        store._text[0] = 0


def test_the_store_holds_no_object_per_row():
    store = RowStore([{"n": number} for number in range(1000)])
    assert len(pickle.dumps(store)) < 1000 * (len('{"n":999}\n') + 8) + 1000


def test_a_pickled_store_has_the_same_rows_and_hash():
    store = RowStore(ROWS)
    copy = pickle.loads(pickle.dumps(store))
    assert list(copy) == ROWS
    assert copy.sha256 == store.sha256


def test_the_hash_depends_on_content_and_order():
    hashes = {RowStore(rows).sha256 for rows in (ROWS, ROWS[::-1], ROWS[1:], [{"id": "0"}], [])}
    assert len(hashes) == 5


def test_forked_workers_read_the_same_rows():
    loader = DataLoader(RowStore(ROWS), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == ROWS


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "row 2 is a list; a row must be a JSON object"),
        ({"when": datetime.date(2020, 1, 1)}, "row 2 cannot be written as JSON .*date"),
        ({"image": b"bytes"}, "row 2 cannot be written as JSON .*bytes"),
    ],
)
def test_what_is_no_json_object_is_named_by_its_row(row, reason):
    with pytest.raises(DataError, match=reason):
        RowStore([ROWS[0], row])
