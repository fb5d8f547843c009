"""Splits: counts on real data, and that nothing of the future is trained on."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.data import (
    DataError,
    LeaveOneOutSplit,
    TemporalSplit,
    UserSequences,
    leave_one_out,
    load_source,
    temporal_split,
    window_examples,
)

# Every interaction has an item id of its own here, so "in a training example" means "that very interaction was trained on".
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=6).filter(lambda lengths: max(lengths) >= 4)


def frame(lengths, seed=0):
    users = np.repeat(np.arange(len(lengths)), lengths)
    times = np.random.default_rng(seed).integers(0, 50, len(users))
    return pd.DataFrame({"user_id": users, "item_id": np.arange(len(users)), "timestamp": times})


def trained_on(data):
    return {item for row in data for item in row["history"] + row["session"]}


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 5), st.integers(3, 4))
def test_leave_one_out(lengths, session_length, stride, min_length):
    sequences = UserSequences.from_interactions(frame(lengths))
    split = leave_one_out(sequences, session_length, 4, stride, min_length)
    assert isinstance(split, LeaveOneOutSplit)
    kept = [items.tolist() for items in sequences.lists() if len(items) >= min_length]
    assert [row["history"] + row["session"] for row in split.test] == kept
    assert [row["history"] + row["session"] for row in split.validation] == [items[:-1] for items in kept]
    assert all(len(row["session"]) == 1 for data in (split.validation, split.test) for row in data)

    targets = {item for items in kept for item in items[-2:]}
    assert not trained_on(split.train) & targets
    assert set(split.train_sequences.item_ids.tolist()) == set(sequences.item_ids.tolist()) - targets
    assert split.train.to_list() == window_examples(split.train_sequences, session_length, 4, stride).to_list()
    short = sum(length < min_length for length in lengths)
    assert f"{len(kept)} users with at least {min_length}" in split.description
    assert f"{short} users with fewer" in split.description
    assert f"{len(split.train)} training examples are per-user sliding windows" in split.description


def test_leave_one_out_refuses():
    with pytest.raises(DataError, match=r"none of 2 users has 3 items \(the longest sequence has 2\)"):
        leave_one_out(UserSequences.from_interactions(frame([2, 1])))
    with pytest.raises(DataError, match="none of 1 users has two items"):
        leave_one_out(UserSequences.from_interactions(frame([3])))
    with pytest.raises(ValueError, match="at least 3"):
        leave_one_out(UserSequences.from_interactions(frame([5])), min_length=2)


def test_leave_one_out_on_beauty(data_folder):
    data = load_source("amazon-beauty", data_folder / "amazon_beauty")
    sequences = UserSequences.from_interactions(data.interactions)
    assert (len(sequences), len(sequences.item_counts()[0]), len(sequences.item_ids)) == (22_363, 12_101, 198_502)
    split = leave_one_out(sequences)
    assert len(split.validation) == len(split.test) == 22_363
    assert len(split.train) == 198_502 - 3 * 22_363
    assert len(split.train_sequences.item_ids) == 198_502 - 2 * 22_363
    assert (split.validation[0]["session"], split.test[0]["session"]) == ([4], [5])
    assert split.description.startswith("Leave-one-out split: for each of 22,363 users")


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 20), st.integers(1, 49), st.integers(1, 49), st.integers(1, 4))
def test_temporal_split(lengths, seed, one, other, session_length):
    start, end = min(one, other), max(one, other)
    rows = frame(lengths, seed)
    time = dict(zip(rows["item_id"], rows["timestamp"], strict=True))
    sequences = UserSequences.from_interactions(rows)
    try:
        split = temporal_split(rows, start, end, session_length)
    except DataError:
        return
    assert isinstance(split, TemporalSplit)
    assert split.train.to_list() == window_examples(split.train_sequences, session_length, 50).to_list()
    assert split.train_sequences.item_ids.tolist() == [
        item for item in sequences.item_ids.tolist() if time[item] < start
    ]
    for data, first, last in ((split.validation, start, end), (split.test, end, 10**9)):
        expected = []
        for user, items in zip(sequences.user_ids.tolist(), sequences.lists(), strict=True):
            past = [item for item in items.tolist() if time[item] < first]
            future = [item for item in items.tolist() if first <= time[item] < last]
            if past and future:
                when = {"request_time": time[future[0]]}
                expected.append({"user_id": user, "history": past, "session": future[:session_length], **when})
        assert data.to_list() == expected
    assert f"{len(split.test)} test users" in split.description
    again = temporal_split(sequences, start, end, session_length)
    assert again.test.to_list() == split.test.to_list()


def test_temporal_split_refuses():
    rows = pd.DataFrame({"user_id": [1, 1, 2, 3], "item_id": [1, 2, 3, 4], "timestamp": [0, 1, 5, 9]})
    for start, end in ((5, 5), (6, 5), (0, 5), (5, 10)):
        with pytest.raises(DataError, match="must lie in this order inside the data's times, 0 to 9"):
            temporal_split(rows, start, end)
    with pytest.raises(DataError, match="no user has items both in the validation period"):
        temporal_split(rows, 4, 8)
    with pytest.raises(DataError, match="has two items left for training"):
        temporal_split(rows, 1, 8)
