"""Labelled sessions: windows, labels, the watch-time scale, the collator, and KuaiRand-Pure."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onerec_hf import RewardItems
from onerec_hf.data import (
    DataError,
    RewardDataCollator,
    WatchTimeScale,
    feedback_windows,
    label_matrix,
    load_kuairand_feedback,
)
from onerec_hf.data.feedback.windows import window_slices


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(1, 6), st.integers(0, 5))
def test_windows_cover_every_user_with_enough_impressions_once(counts, min_items, more):
    max_items = 2 * min_items - 1 + more
    owners, starts, stops = window_slices(np.array(counts), min_items, max_items)
    assert all(min_items <= stop - start <= max_items for start, stop in zip(starts, stops, strict=True))
    covered = [i for start, stop in zip(starts, stops, strict=True) for i in range(start, stop)]
    ends = np.cumsum(counts)
    wanted = [i for n, end in zip(counts, ends, strict=True) if n >= min_items for i in range(end - n, end)]
    assert covered == wanted
    for owner, start, stop in zip(owners, starts, stops, strict=True):
        assert ends[owner] - counts[owner] <= start < stop <= ends[owner]


def rows(n=12, **columns):
    table = {"user_id": [1] * n, "item_id": list(range(n)), "timestamp": list(range(n))[::-1]}
    return pd.DataFrame({**table, "like": [1.0] + [0.0] * (n - 1), **columns})


def test_labels_are_rates_over_the_impressions_that_have_one():
    watch = [np.nan, 0.25, *[0.5] * 4, *[np.nan] * 6]
    windows = feedback_windows(rows(watch=watch), {"ltr": "like", "swt": "watch"}, {1: [99]})
    assert windows["session"][:] == [[11, 10, 9, 8, 7, 6], [5, 4, 3, 2, 1, 0]]  # in time order
    assert windows["history"][:] == [[99], [99]]
    assert windows["labels"][0] == [0.0, None]
    assert windows["labels"][1] == pytest.approx([1 / 6, (0.25 + 4 * 0.5) / 5])
    assert np.isnan(label_matrix(windows)).tolist() == [[False, True], [False, False]]


def test_users_with_few_impressions_give_no_window_and_string_ids_stay():
    table = pd.DataFrame(
        {"user_id": ["a"] * 4 + ["b"] * 5, "item_id": list("uvwxyuvwx"), "timestamp": range(9), "like": [0] * 9}
    )
    windows = feedback_windows(table, {"ltr": "like"})
    assert windows["user_id"][:] == ["b"]
    assert windows["session"][0] == list("yuvwx")
    assert windows["history"][0] == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            rows(like=[2.0, -1.0] + [0.0] * 10),
            r"column 'like': 2 of 12 values are outside \[0, 1\] \(first: row 0, 2.0\). Scale",
        ),
        (rows(like=["yes"] * 12), "column 'like': expected numbers"),
        (rows().drop(columns="like"), "no column 'like'"),
        (rows(item_id=[None] * 12), "column 'item_id': 12 of 12 ids are null"),
        (rows(4), "none of 1 users has 5 impressions .at most 4.. Lower min_items"),
    ],
)
def test_bad_impressions_get_one_clear_error(table, message):
    with pytest.raises(DataError, match=message):
        feedback_windows(table, {"ltr": "like"})


def test_lengths_that_cannot_cut_every_run_are_refused():
    with pytest.raises(ValueError, match=r"at least 2 \* min_items - 1"):
        feedback_windows(rows(), {"ltr": "like"}, min_items=5, max_items=8)


def test_watch_time_rank_is_uniform_within_a_duration_and_blind_to_it():
    rng = np.random.default_rng(0)
    duration = rng.choice([0, 300, 8000, 20_000, 90_000], 5000)
    play = rng.exponential(np.maximum(duration, 1000))
    play[rng.random(5000) < 0.1] = 0
    scale = WatchTimeScale.fit(play, duration)
    rank = scale(play, duration)
    assert rank.min() >= 0
    assert rank.max() <= 1
    for value in (0, 300, 8000, 90_000):
        here = duration == value
        brute = [((play[here] < t).mean() + (play[here] <= t).mean()) / 2 for t in play[here]]
        np.testing.assert_allclose(rank[here], brute)
        assert rank[here].mean() == pytest.approx(0.5)
    assert scale([5000], [10**9]).tolist() == scale([5000], [90_000]).tolist()  # an unseen bucket: the nearest


def test_watch_time_refuses_what_is_no_time():
    with pytest.raises(
        DataError, match=r"2 of 3 values of play time are negative or not finite \(first: row 1, -1.0\)"
    ):
        WatchTimeScale.fit([1, -1, np.nan], [1, 1, 1])
    with pytest.raises(DataError, match="no training impressions"):
        WatchTimeScale.fit([], [])


def test_collator_pads_and_marks_missing_labels():
    collate = RewardDataCollator(RewardItems([7, 8, 9]), max_history=1)
    batch = collate(
        [
            {"history": [7, 8], "session": [9], "labels": [None, 1.0]},
            {"history": [], "session": [7, 8], "labels": [0.5, 0.0]},
        ]
    )
    assert batch["input_ids"].tolist() == [[2], [0]]
    assert batch["attention_mask"].tolist() == [[1], [0]]
    assert batch["session_input_ids"].tolist() == [[3, 0], [1, 2]]
    assert batch["labels"].tolist() == [[-100.0, 1.0], [0.5, 0.0]]
    assert "users" not in batch
    example = {"history": [], "session": [7], "labels": [1.0, 1.0]}
    users = collate([{**example, "user_id": user} for user in ("b", "a", "b")])["users"]
    assert users.tolist() == [0, 1, 0]


@pytest.mark.slow
def test_kuairand_pure(data_folder):
    folder = data_folder / "kuairand_pure"
    feedback = load_kuairand_feedback(folder)
    assert (len(feedback.train), len(feedback.validation), len(feedback.test)) == (14_489, 3_505, 2_784)
    lengths = {len(session) for part in (feedback.train, feedback.test) for session in part["session"]}
    assert lengths == set(range(5, 11))
    # Rates of the windows' own impressions, computed another way.
    log = pd.read_parquet(folder / "log_standard_4_25_to_5_08_pure.parquet").drop_duplicates()
    log = log[log["date"] >= 20220506]
    counts = log.groupby("user_id")["user_id"].transform("size")
    log = log[counts >= 5]
    sizes = np.array([len(session) for session in feedback.test["session"]])
    labels = label_matrix(feedback.test)
    for k, column in ((1, "long_view"), (2, "is_follow"), (3, "is_like")):
        assert (labels[:, k] * sizes).sum() == pytest.approx(log[column].sum(), rel=1e-5)
    assert sizes.sum() == len(log)
    # Train labels make the base rates; watch time is a rank within training, so its mean is near a half.
    assert feedback.base_rates[0] == pytest.approx(0.5, abs=0.02)
    known = set(feedback.items.item_ids.tolist())
    assert all(set(history) <= known and len(history) <= 50 for history in feedback.test["history"])
    # Statistics: views and likes of the histories, then also all objectives of the training days.
    before, later = feedback.statistics, feedback.later_statistics
    assert before.known.tolist() == [False, True, False, True]
    assert (before.shown.sum(), before.observed[:, 1].sum(), before.observed[:, 3].sum()) == (817_187, 291_530, 16_131)
    training = pd.read_parquet(folder / "log_standard_4_25_to_5_08_pure.parquet").drop_duplicates()
    training = training[training["date"] < 20220503]
    assert later.shown.sum() - before.shown.sum() == len(training)
    assert (later.observed - before.observed)[:, 2].sum() == training["is_follow"].sum()
    np.testing.assert_allclose(later.expected.sum(0), later.observed.sum(0))


@pytest.mark.slow
def test_kuairand_pure_names_what_is_wrong(data_folder, tmp_path):
    with pytest.raises(DataError, match="lacks log_standard"):
        load_kuairand_feedback(tmp_path)
    with pytest.raises(DataError, match="column 'date': no test day among 20220425 to 20220508"):
        load_kuairand_feedback(data_folder / "kuairand_pure", test_start=20220601)
    with pytest.raises(ValueError, match="history must be one of"):
        load_kuairand_feedback(data_folder / "kuairand_pure", history="future")


def test_earlier_views_and_likes_are_those_of_the_counted_impressions():
    """Each list of a user ends with the latest 50 videos: a view that is older than all impressions says nothing about a rate."""
    from onerec_hf.data.feedback.kuairand import _counted_before

    past = pd.DataFrame(
        {
            "user_id": [1, 2],
            "watch_seq": [np.array([3, 4, 4]), np.array([5])],
            "long_watch_seq": [np.array([7, 3, 4]), np.array([], dtype=np.int64)],
            "like_seq": [np.array([7, 7, 4]), np.array([], dtype=np.int64)],
        }
    )
    counted = _counted_before(past, np.arange(8), ["swt", "vtr", "wtr", "ltr"])
    assert counted.shown.tolist() == [0, 0, 0, 1, 2, 1, 0, 0]
    assert (counted.observed <= counted.shown[:, None]).all()
    assert counted.observed[:, 1].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert counted.observed[:, 3].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
