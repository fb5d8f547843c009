"""Advantages of logged impressions by play time, and what of a log becomes a sample."""

import numpy as np
import pandas as pd
import pytest

from onerec_hf.data import UserSequences, duration_rewards, logged_samples
from onerec_hf.data.columns import DataError
from tests.conftest import make_catalogue

CATALOGUE = make_catalogue(20, (4, 4, 4))
HISTORY = pd.DataFrame({"user_id": ["a"] * 4, "item_id": ["m0", "m1", "m2", "m3"], "timestamp": [10, 20, 30, 40]})


def test_percentiles_are_within_a_users_items_of_similar_duration():
    rng = np.random.default_rng(0)
    users, duration = rng.integers(3, size=300), rng.choice([1_000, 5_000, 60_000], 300)
    play = rng.permutation(300) * 1000.0  # no ties
    rewards, wanted = duration_rewards(users, play, duration, top=0.3), np.zeros(300)
    shares = np.array(
        [
            np.mean([play[j] < play[i] for j in range(300) if (users[j], duration[j]) == (users[i], duration[i])])
            + 0.5 / np.sum((users == users[i]) & (duration == duration[i]))
            for i in range(300)
        ]
    )
    wanted[shares > np.sort(shares)[int(np.ceil(300 * 0.7)) - 1]] = 1
    assert rewards.tolist() == wanted.tolist()
    assert 0.2 < rewards.mean() <= 0.3


def test_equal_play_times_are_equally_good_and_dislikes_outweigh():
    assert duration_rewards(["u"] * 4, [5.0] * 4, [1000] * 4).tolist() == [0] * 4
    assert duration_rewards(["u"] * 2, [1.0, 9.0], [1000] * 2, [False, True], top=0.5).tolist() == [0, -1]


@pytest.mark.parametrize(("play", "message"), [([-1.0], "negative"), ([np.nan], "not finite"), ([], "no rows")])
def test_bad_times_have_one_clear_error(play, message):
    with pytest.raises(DataError, match=message):
        duration_rewards(["u"] * len(play), play, [1000] * len(play))


def impressions(**columns):
    rows = {
        "user_id": ["a"] * 7 + ["stranger"],
        "item_id": ["m5", "m6", "m0", "gone", "m7", "m8", "m9", "m5"],
        "timestamp": [5, 15, 25, 25, 35, 40, 50, 15],
        "play_time_ms": [100.0] * 8,
        "duration_ms": [1000] * 8,
    }
    return pd.DataFrame({**rows, **columns})


def test_samples_are_of_known_users_between_their_training_interactions():
    play = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    log = impressions(play_time_ms=play, hate=[0, 1, 0, 0, 0, 0, 0, 0])
    sequences = UserSequences.from_interactions(HISTORY)
    rows, note = logged_samples(log, sequences, CATALOGUE, dislike_column="hate", max_history=2)
    assert rows.to_list() == [
        {"user_id": "a", "history": ["m0"], "session": ["m6"], "advantage": -1.0},
        {"user_id": "a", "history": ["m1", "m2"], "session": ["m7"], "advantage": 0.0},
    ]
    assert note.startswith("2 of 8 impressions: 0 with advantage 1, 1 with -1")
    assert "1 of items that the catalogue lacks, 1 of items of the history" in note
    both, _ = logged_samples(log, sequences, CATALOGUE, exclude_seen=False)
    assert [row["session"] for row in both] == [["m6"], ["m0"], ["m7"]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": range(8)}, "another type"),
        ({"timestamp": [5] * 8}, "none of 8 rows"),
        ({"play_time_ms": [None, *[1.0] * 7]}, "'play_time_ms' has 1 missing"),
    ],
)
def test_bad_logs_have_one_clear_error(columns, message):
    with pytest.raises(DataError, match=message):
        logged_samples(impressions(**columns), UserSequences.from_interactions(HISTORY), CATALOGUE)
