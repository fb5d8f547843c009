"""The paper's session criteria, by hand and against a loop."""

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.data import DataError, PositiveFeedback, SessionCriteria, find_sessions, session_examples

ROWS = pd.DataFrame(
    {
        "user_id": [1, 1, 1, 1, 1, 2, 2],
        "item_id": [10, 11, 12, 13, 14, 15, 16],
        "timestamp": [0, 10, 100, 110, 120, 121, 122],
        "watch_time": [5.0, 5.0, 1.0, 1.0, np.nan, 30.0, 30.0],
        "view": [1, 1, 1, 0, 1, 1, 1],
        "like": [0, 0, 0, 1, 0, 0, 0],
        "share": [1, 0, 0, 0, 0, 0, 0],
    }
)


@pytest.mark.parametrize(
    ("criteria", "expected"),
    [
        (SessionCriteria(min_views=2), [10, 11, 12, 13, 14, 15, 16]),
        (SessionCriteria(min_views=3), [12, 13, 14]),
        (SessionCriteria(min_views=1, min_watch_time=10), [15, 16]),  # a threshold is exceeded, not reached
        (SessionCriteria(min_views=1, min_watch_time=9.9), [10, 11, 15, 16]),
        (SessionCriteria(min_views=1, require_interaction_columns=("like",)), [12, 13, 14]),
        (SessionCriteria(min_views=1, require_interaction_columns=("like", "share")), [10, 11, 12, 13, 14]),
        (SessionCriteria(min_views=2, min_watch_time=5, require_interaction_columns=("share",)), [10, 11]),
        (SessionCriteria(min_views=2, view_column="view", require_interaction_columns=("like",)), [12, 13, 14]),
    ],
)
def test_criteria(criteria, expected):
    found = find_sessions(ROWS.sample(frac=1, random_state=0), criteria, gap_seconds=50)
    assert found["item_id"].tolist() == expected
    assert (found.groupby("session_id")["user_id"].nunique() == 1).all()


def test_the_gap_itself_does_not_end_a_session():
    found = find_sessions(ROWS, SessionCriteria(min_views=5), gap_seconds=90)
    assert found["session_id"].tolist() == [0] * 5


def test_session_ids_are_kept_and_belong_to_their_user():
    rows = ROWS.assign(session_id=["x", "y", "x", "y", "x", "x", "y"])
    found = find_sessions(rows, SessionCriteria(min_views=3))
    assert found["item_id"].tolist() == [10, 12, 14]
    assert found["session_id"].unique().tolist() == ["x"]


def test_refuses():
    with pytest.raises(DataError, match=r"no column 'session_id'. Pass gap_seconds.*per-user windows"):
        find_sessions(ROWS, SessionCriteria())
    with pytest.raises(DataError, match="no column 'forward' among"):
        find_sessions(ROWS, SessionCriteria(require_interaction_columns=("forward",)), 50)
    with pytest.raises(
        DataError, match="none of 3 meets all criteria: 2 miss 'at least 3 views'; 2 miss 'watch_time above 20'"
    ):
        find_sessions(ROWS, SessionCriteria(min_views=3, min_watch_time=20), 50)
    with pytest.raises(DataError, match="2 miss 'a row with like'"):
        find_sessions(ROWS, SessionCriteria(min_views=4, require_interaction_columns=("like",)), 50)
    with pytest.raises(DataError, match="expected numbers"):
        find_sessions(ROWS.assign(like="yes"), SessionCriteria(require_interaction_columns=("like",)), 50)
    with pytest.raises(DataError, match="no rows"):
        find_sessions(ROWS.iloc[:0], SessionCriteria(), 50)
    with pytest.raises(ValueError, match="at least 1"):
        session_examples(ROWS, SessionCriteria(), PositiveFeedback(), session_length=0)


def test_examples_by_hand():
    positive = PositiveFeedback({"view": 1})
    message = "2 of 3 qualifying sessions skipped: 0 without a positive item, 2 without a positive item before them"
    with pytest.warns(UserWarning, match=message):
        data = session_examples(ROWS, SessionCriteria(min_views=2), positive, session_length=2, gap_seconds=50)
    assert data.to_list() == [{"user_id": 1, "history": [10, 11], "session": [12, 14]}]


def test_nothing_left():
    with pytest.raises(DataError, match="1 without a positive item, 2 without a positive item before them"):
        session_examples(
            ROWS, SessionCriteria(min_views=2), PositiveFeedback({"share": 1, "timestamp": 121}), gap_seconds=50
        )


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=30
    ),
    st.integers(1, 3),
    st.sampled_from([None, 1, 3]),
)
def test_examples_equal_the_loop(rows, session_length, max_history):
    """Session ids may interleave in time; history is strictly before the session's first row."""
    table = pd.DataFrame(rows, columns=["user_id", "timestamp", "session_id", "like"])
    table["item_id"] = [f"m{i}" for i in range(len(rows))]
    expected = []
    ordered = table.sort_values(["user_id", "timestamp"], kind="stable")
    for (user, _), session in ordered.groupby(["user_id", "session_id"], sort=False):
        liked = ordered[(ordered["user_id"] == user) & (ordered["like"] == 1)]
        history = liked.loc[liked["timestamp"] < session["timestamp"].min(), "item_id"].tolist()
        targets = session.loc[session["like"] == 1, "item_id"].tolist()[:session_length]
        if len(session) >= 2 and history and targets:
            expected.append({"user_id": user, "history": history[-(max_history or 99) :], "session": targets})
    arguments = (SessionCriteria(min_views=2), PositiveFeedback({"like": 1}), session_length, max_history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if expected:
            assert session_examples(table, *arguments).to_list() == expected
        else:
            with pytest.raises(DataError):
                session_examples(table, *arguments)


def test_kuairand_has_few_time_gap_sessions(data_folder):
    """What its README says of the raw log: 657 thirty-minute sessions of at least five events."""
    log = pd.read_parquet(data_folder / "kuairand_pure" / "log_standard_4_25_to_5_08_pure.parquet")
    log = log.rename(columns={"video_id": "item_id", "time_ms": "timestamp"})
    found = find_sessions(log, SessionCriteria(min_views=5), gap_seconds=30 * 60 * 1000)
    assert found["session_id"].nunique() == 657
