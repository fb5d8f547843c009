"""Windows against a plain loop over positions."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.data import UserSequences, lists, window_examples
from onerec_hf.data.windows import window_bounds

LENGTHS = st.lists(st.integers(1, 17), min_size=1, max_size=6)


def sequences_of(lengths, text=False):
    users = np.repeat(np.arange(len(lengths)), lengths)
    items = [f"m{i}" for i in range(len(users))] if text else np.arange(len(users)) * 10
    return UserSequences.from_interactions(
        pd.DataFrame({"user_id": users, "item_id": items, "timestamp": range(len(users))})
    )


def naive(sequence, session_length, max_history, stride):
    n, spans = len(sequence), []
    if stride == 1:
        spans = [(t, min(t + session_length, n)) for t in range(1, n)]
    else:
        stop = n
        while stop >= 2:
            spans.append((max(1, stop - session_length), stop))
            if stop - session_length <= 1:
                break
            stop -= stride
        spans.reverse()
    return [(sequence[max(0, t - max_history) : t], sequence[t:stop]) for t, stop in spans]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 7), st.integers(1, 9), st.integers(1, 8), st.booleans())
def test_equal_to_the_loop(lengths, session_length, max_history, stride, text):
    sequences = sequences_of(lengths, text)
    data = window_examples(sequences, session_length, max_history, stride)
    expected = [
        {"user_id": user, "history": history, "session": session}
        for user, items in zip(sequences.user_ids.tolist(), sequences.lists(), strict=True)
        for history, session in naive(items.tolist(), session_length, max_history, stride)
    ]
    assert data.to_list() == expected


@given(LENGTHS, st.integers(1, 7), st.integers(1, 8))
def test_coverage(lengths, session_length, stride):
    rows, starts, stops = window_bounds(np.array(lengths), session_length, stride)
    assert (stops > starts).all()
    assert (starts >= 1).all()
    for row, n in enumerate(lengths):
        spans = list(zip(starts[rows == row], stops[rows == row], strict=True))
        assert bool(spans) == (n >= 2)
        covered = [t for start, stop in spans for t in range(start, stop)]
        if n >= 2:
            assert n - 1 in covered
        if stride <= session_length:
            assert set(covered) == set(range(1, n))
        if stride == session_length:
            assert sorted(covered) == list(range(1, n))
        if stride > 1:
            assert all(stop - start == session_length for start, stop in spans[1:])
        else:
            assert [start for start, _ in spans] == list(range(1, n))


def test_whole_history_and_bad_arguments():
    sequences = sequences_of([6])
    assert window_examples(sequences, 1, None)["history"][-1] == [0, 10, 20, 30, 40]
    for arguments in ({"session_length": 0}, {"stride": 0}, {"max_history": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            window_examples(sequences, **arguments)


def test_chunks_join(monkeypatch):
    sequences = sequences_of([17, 3, 9], text=True)
    whole = window_examples(sequences).to_list()
    for items in (1, 2, 7):
        monkeypatch.setattr(lists, "_CHUNK_ITEMS", items)
        assert window_examples(sequences).to_list() == whole


def test_features():
    features = window_examples(sequences_of([3], text=True)).features
    assert features["user_id"].dtype == "int64"
    assert features["history"].feature.dtype == features["session"].feature.dtype == "string"


@pytest.mark.slow
def test_a_million_windows():
    rng = np.random.default_rng(0)
    users = rng.integers(0, 20_000, 1_020_000)
    rows = pd.DataFrame(
        {"user_id": users, "item_id": rng.integers(0, 50_000, len(users)), "timestamp": range(len(users))}
    )
    sequences = UserSequences.from_interactions(rows)
    data = window_examples(sequences)
    assert len(data) == len(users) - len(sequences)
    last = sequences[-1].tolist()
    assert data[-1]["history"] == last[:-1][-50:]
    assert data[-1]["session"] == last[-1:]
