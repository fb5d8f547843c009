"""User sequences against a naive dictionary of lists."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.data import DataError, PositiveFeedback, UserSequences, read_interactions
from onerec_hf.data.sequences import concatenated

ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=40)


def frame(rows):
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])


def naive(rows):
    users = {}
    for user, item, _ in sorted(rows, key=lambda row: (row[0], row[2])):
        users.setdefault(user, []).append(item)
    return users


def as_dict(sequences):
    return {user: items.tolist() for user, items in zip(sequences.user_ids.tolist(), sequences.lists(), strict=True)}


@settings(deadline=None)
@given(ROWS, st.booleans())
def test_from_interactions(rows, text):
    if text:
        rows = [(f"u{user}", f"é{item}", time) for user, item, time in rows]
    sequences, expected = UserSequences.from_interactions(frame(rows)), naive(rows)
    assert as_dict(sequences) == expected
    assert [sequences[u].tolist() for u in range(len(sequences))] == list(expected.values())
    assert sequences[-1].tolist() == list(expected.values())[-1]
    assert sequences.offsets.dtype == np.int64
    items, counts = sequences.item_counts()
    assert dict(zip(items.tolist(), counts.tolist(), strict=True)) == Counter(item for _, item, _ in rows)
    assert items.tolist() == sorted(items.tolist())


@settings(deadline=None)
@given(ROWS, st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_k_core(rows, min_user, min_item, iterative):
    expected = naive(rows)
    while True:
        size = sum(map(len, expected.values()))
        counts = Counter(item for items in expected.values() for item in items)
        expected = {user: [item for item in items if counts[item] >= min_item] for user, items in expected.items()}
        expected = {user: items for user, items in expected.items() if len(items) >= min_user}
        if not iterative or sum(map(len, expected.values())) == size:
            break
    sequences = UserSequences.from_interactions(frame(rows))
    if expected:
        core = sequences.k_core(min_user, min_item, iterative)
        assert as_dict(core) == expected
        assert core.offsets[-1] == len(core.item_ids) == len(core.timestamps)
    else:
        with pytest.raises(DataError, match="filtering removes all"):
            sequences.k_core(min_user, min_item, iterative)


def test_timestamps_follow_their_items():
    sequences = UserSequences.from_interactions(frame([(1, 10, 7), (0, 20, 9), (1, 30, 3)]))
    assert sequences.timestamps.tolist() == [9, 3, 7]
    assert sequences.where(np.array([False, True, True])).timestamps.tolist() == [3, 7]


def test_index_out_of_range():
    with pytest.raises(IndexError):
        UserSequences.from_interactions(frame([(1, 1, 1)]))[1]


def test_refuses():
    with pytest.raises(DataError, match="no column 'timestamp'"):
        UserSequences.from_interactions(frame([(1, 1, 1)]).drop(columns="timestamp"))
    with pytest.raises(DataError, match="no rows"):
        UserSequences.from_interactions(frame([(1, 1, 1)]).iloc[:0])


def test_places_of_a_table_without_times_are_no_times():
    """Also where rows are left out, so that a user's first place is not 0."""
    table = pd.DataFrame({"user_id": [1, 1, 2, 2], "item_id": [5, 6, 7, 8], "rating": [1, 5, 2, 5]})
    for column, timed in (("none", False), ("timestamp", True)):
        read = read_interactions(table.assign(timestamp=range(4)) if timed else table, timestamp_column=column)
        kept = PositiveFeedback.parse(["rating>=4"]).apply(read)
        sequences = UserSequences.from_interactions(kept)
        assert sequences.timed == timed
        assert sequences.where(sequences.item_ids > 6).timed == timed
        assert concatenated(sequences, sequences).timed == timed
