"""A table of impressions becomes histories and labelled windows of three periods, none of which sees a later one."""

import numpy as np
import pandas as pd
import pytest

from onerec_hf.data import DataError
from onerec_hf.data.feedback.impressions import load_impressions
from onerec_hf.data.feedback.item_statistics import ItemStatistics
from onerec_hf.data.interactions import read_items


def table(users=4, each=40):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "user_id": np.repeat([f"u{i}" for i in range(users)], each),
            "item_id": rng.choice([f"m{i}" for i in range(30)], users * each),
            "timestamp": np.tile(np.arange(each), users),
            "like": rng.integers(0, 2, users * each).astype(float),
            "view": rng.random(users * each),
        }
    )


def test_windows_hold_their_period_and_histories_what_came_before(tmp_path):
    rows = table()
    rows.to_csv(tmp_path / "log.csv", index=False)
    feedback = load_impressions(tmp_path / "log.csv", {"ltr": "like", "vtr": "view"}, 10, 22, 31, max_history=6)
    assert feedback.objectives == ["ltr", "vtr"]
    for part, start, stop in ((feedback.train, 10, 22), (feedback.validation, 22, 31), (feedback.test, 31, 40)):
        for user in rows["user_id"].unique():
            mine = rows[rows["user_id"] == user]
            windows = [row for row in part if row["user_id"] == user]
            inside = mine[(mine["timestamp"] >= start) & (mine["timestamp"] < stop)]
            assert [item for row in windows for item in row["session"]] == inside["item_id"].tolist()
            assert all(row["history"] == mine["item_id"].tolist()[4:10] for row in windows)
            at = 0
            for row in windows:
                held = inside.iloc[at : at + len(row["session"])]
                assert row["labels"] == pytest.approx([held["like"].mean(), held["view"].mean()], abs=1e-6)
                at += len(row["session"])
    # Co-watching features may not know held-out days.
    assert all(len(sequence) == 22 for sequence in feedback.train_sequences)


def test_only_what_was_liked_enters_histories():
    rows = table()
    feedback = load_impressions(rows, {"ltr": "like"}, 10, 22, 31, history_objective="ltr")
    for row in feedback.train:
        mine = rows[(rows["user_id"] == row["user_id"]) & (rows["timestamp"] < 10) & (rows["like"] > 0)]
        assert row["history"] == mine["item_id"].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objectives": {}}, "Name at least one"),
        ({"objectives": {"ltr": "liked"}}, "liked"),
        ({"validation_start": 5}, "not in ascending order"),
        ({"test_start": 100}, "no test rows among timestamps 0 to 39"),
        ({"history_objective": "vtr"}, "history_objective='vtr' is unknown"),
        ({"items": read_items(pd.DataFrame({"item_id": ["m1", "m2"]}))}, "m"),
    ],
)
def test_refuses(settings, message):
    given = {"objectives": {"ltr": "like"}, "history_end": 10, "validation_start": 22, "test_start": 31, **settings}
    with pytest.raises(DataError, match=message):
        load_impressions(table(), **given)


def test_item_statistics_are_of_the_period_before():
    rows = table()
    rows.loc[rows["timestamp"] % 5 == 0, "view"] = np.nan
    items = read_items(pd.DataFrame({"item_id": [*(f"m{i}" for i in range(30)), "new"]}))
    given = ({"ltr": "like", "vtr": "view"}, 10, 22, 31)
    feedback = load_impressions(rows, *given, items=items)
    for counted, end in ((feedback.statistics, 10), (feedback.later_statistics, 22)):
        before = rows[rows["timestamp"] < end]
        for row, item in enumerate(items.item_ids):
            mine = before[before["item_id"] == item]
            assert counted.shown[row] == len(mine)
            assert counted.observed[row] == pytest.approx([mine["like"].sum(), mine["view"].sum()])
            rates = before["like"].mean(), before["view"].mean()
            assert counted.expected[row] == pytest.approx([len(mine) * rates[0], mine["view"].count() * rates[1]])
    later = rows.assign(like=rows["like"].where(rows["timestamp"] < 22, 1 - rows["like"]))
    again = load_impressions(later, *given, items=items)  # what happens from the validation period on is not read
    np.testing.assert_array_equal(again.later_statistics.features(), feedback.later_statistics.features())
    read = feedback.statistics.features()
    assert read.shape == (31, 3)
    assert read[30, 1:].tolist() == [0, 0]  # never shown: as the average item
    assert read[30, 0] == read[:, 0].min()


def test_item_statistics_of_logs_with_other_rates_add_up():
    few = ItemStatistics.count([0, 0, 1, 1], [[0.0], [0.2], [0.0], [0.0]], 2)
    many = ItemStatistics.count([1] * 8, [[1.0]] * 8, 2)  # an item is no better for being shown where all is viewed
    ratio = (few + many).features()[:, 1]
    assert ratio[0] > 0 > ratio[1]
    nothing = ItemStatistics.count([], np.zeros((0, 2)), 3)
    assert not nothing.features().any()
    assert nothing.known.tolist() == [False, False]
    assert few.features(few.known).shape == (2, 2)
    assert nothing.features(nothing.known).shape == (3, 1)
