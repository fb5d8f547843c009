"""prefix_examples against window_examples: every target once, the same histories up to `max_history`, near ones beyond."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.data import UserSequences, lists, prefix_examples, prefixes, window_examples


def sequences_of(lengths, text=False):
    rows = [(user, user * 1000 + step, step) for user, n in enumerate(lengths) for step in range(n)]
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    return UserSequences.from_interactions(table.astype({"item_id": str}) if text else table)


def pairs(dataset):
    """(user, history, session) of windows or of prefixes, in order."""
    if "session" in dataset.column_names:
        return [(row["user_id"], row["history"], row["session"]) for row in dataset]
    return [
        (row["user_id"], row["history"][:length], session)
        for row in dataset
        for length, session in zip(row["history_lengths"], row["sessions"], strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(2, 9)),
    st.integers(1, 4),
    st.booleans(),
)
def test_the_windows_targets_each_once_with_nearly_their_histories(lengths, session_length, max_history, stride, text):
    sequences = sequences_of(lengths, text)
    wanted = pairs(window_examples(sequences, session_length, None, stride))
    got = pairs(prefix_examples(sequences, session_length, max_history, stride))
    assert [(user, session) for user, _, session in got] == [(user, session) for user, _, session in wanted]
    for (_, history, _), (_, whole, _) in zip(got, wanted, strict=True):
        assert history == whole[-len(history) :]
        if max_history is None or len(whole) <= max_history:
            assert history == whole
        else:
            assert max_history - max_history // 2 < len(history) <= max_history


@pytest.mark.parametrize("max_history", [None, 4])
def test_a_history_ends_where_its_last_session_begins(max_history):
    for row in prefix_examples(sequences_of([9, 2, 1, 30]), session_length=3, max_history=max_history):
        assert row["history_lengths"] == sorted(row["history_lengths"])
        assert row["history_lengths"][-1] == len(row["history"])


def test_users_of_one_item_have_no_example():
    assert len(prefix_examples(sequences_of([1, 1]))) == 0
    assert prefix_examples(sequences_of([1, 3, 1]))["user_id"][:] == [1]


def test_a_history_of_one_item_cannot_slide():
    with pytest.raises(ValueError, match=r"max_history \(1\) must be at least 2"):
        prefix_examples(sequences_of([3]), max_history=1)


def test_many_arrow_chunks_are_one_dataset(monkeypatch):
    sequences = sequences_of(np.random.default_rng(0).integers(1, 40, 50).tolist())
    wanted = prefix_examples(sequences, 3, 8)
    monkeypatch.setattr(prefixes, "_CHUNK_ITEMS", 64)
    monkeypatch.setattr(lists, "_CHUNK_ITEMS", 64)
    got = prefix_examples(sequences, 3, 8)
    assert got.data.column("sessions").num_chunks > 10
    assert got.to_dict() == wanted.to_dict()
