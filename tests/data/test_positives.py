"""Positive feedback: thresholds, their command-line form and their messages."""

import numpy as np
import pandas as pd
import pytest

from onerec_hf.data import DataError, PositiveFeedback, read_interactions
from onerec_hf.data.positives import about_every_row
from tests.data.test_types import prepared

ROWS = pd.DataFrame({"item_id": [1, 2, 3, 4], "rating": [5.0, 3.9, np.nan, 4.0], "like": [False, True, False, False]})


def test_any_column_at_its_threshold():
    positive = PositiveFeedback({"rating": 4, "like": 1}).apply(ROWS)
    assert positive["item_id"].tolist() == [1, 2, 4]
    assert positive.index.tolist() == [0, 1, 2]


def test_no_rule_keeps_every_row():
    pd.testing.assert_frame_equal(PositiveFeedback().apply(ROWS), ROWS)


def test_nullable_columns():
    rows = pd.DataFrame({"like": pd.array([1, None, 0], dtype="Int64")})
    assert len(PositiveFeedback({"like": 1}).apply(rows)) == 1


def test_parse():
    assert PositiveFeedback.parse(["rating>=4", " watch time >= -0.5 "]).any_of == {"rating": 4.0, "watch time": -0.5}
    assert PositiveFeedback.parse([]) == PositiveFeedback()


@pytest.mark.parametrize(
    "rule", ["rating", "rating>", "rating>=", ">=4", "rating>high", "rating>=high", "rating>=nan", "a>=1>=2"]
)
def test_parse_refuses(rule):
    with pytest.raises(DataError, match=r"expected 'column>=number'"):
        PositiveFeedback.parse([rule])


def test_parse_refuses_two_thresholds():
    with pytest.raises(DataError, match="two thresholds for column 'a'"):
        PositiveFeedback.parse(["a>=1", "a>=2"])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"follow": 1}, "no column 'follow' among: item_id, rating, like"),
        (
            {"rating": 6, "item_id": 9},
            r"none of 4 rows has rating >= 6 or item_id >= 9 \(found: rating at most 5.0, item_id at most 4\)",
        ),
    ],
)
def test_apply_refuses(rule, message):
    with pytest.raises(DataError, match=message):
        PositiveFeedback(rule).apply(ROWS)


def test_text_column():
    with pytest.raises(DataError, match=r"'rating': expected numbers, got .* 'good'"):
        PositiveFeedback({"rating": 4}).apply(pd.DataFrame({"rating": ["good", "bad"]}))


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (["rating>3"], [1, 2]),
        (["rating<=3"], [3]),
        (["rating<4", "event=buy"], [3, 4]),
        (["event==buy", "event=cart"], [2, 4]),
        (["event!=view"], [2, 4]),
        (["day>=2024-01-02"], [2, 3]),
        (["day<2024-01-01T12:00:00+01:00"], [1]),
        (["at>2024-01-01T00:00:00Z"], [2]),
        (["count=2"], [2]),
    ],
)
def test_comparisons(tmp_path, rules, kept):
    """The same rows in memory and of `prepare`, whatever the file."""
    rows = pd.DataFrame(
        {
            "user_id": 1,
            "item_id": [1, 2, 3, 4],
            "timestamp": [1, 2, 3, 4],
            "rating": [5, 4, 3, None],
            "event": ["view", "cart", "view", "buy"],
            "day": ["2024-01-01", "2024-01-02", "2024-01-03", None],
            "at": pd.to_datetime(
                ["2024-01-01", "2024-01-01T00:00:00.000000001", None, "2023-01-01"], format="ISO8601"
            ),
            "count": ["1", "2", "3", None],
        }
    )
    positive = PositiveFeedback.parse(rules)
    assert PositiveFeedback.parse(positive.rules) == positive
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_csv(tmp_path / "rows.csv", index=False)
    for source in (rows, tmp_path / "rows.parquet", tmp_path / "rows.csv"):
        assert positive.apply(read_interactions(source))["item_id"].tolist() == kept
    for name in ("rows.parquet", "rows.csv"):
        assert [item for _, item in prepared(tmp_path / name, positive=positive)] == kept


def test_a_date_is_not_compared_with_milliseconds():
    rows = pd.DataFrame({"day": [1_700_000_000_000]})
    with pytest.raises(DataError, match="no seconds since 1970"):
        PositiveFeedback({"day": ">=2024-01-01"}).apply(rows)


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        (
            "event_type",
            ["view", "view", "view", "buy"],
            "'event_type' (view 75%, buy 25%): pass --positive 'event_type=...'",
        ),
        ("Behavior", ["pv", "cart", "fav", None], "'Behavior' (pv 33%, cart 33%, fav 33%)"),
        ("action", [*"abcde", "a"], "'action' (a 33%, b 17%, c 17%, d 17%, ...)"),
        ("rating", [0.5, 5.0, 3.0], "'rating' (0.5 to 5): pass --positive 'rating>=...'"),
        ("is_click", [False, True], "'is_click' (0 to 1): pass --positive 'is_click>=1'"),
        ("rating", [5, 5, 5], ""),
        ("rating", ["good", "bad"], ""),
        ("event", [f"page {number}" for number in range(50)], ""),
        ("country", ["fr", "de"], ""),
        ("event", [{"type": "view"}, {"type": "buy"}], ""),
        ("action", [["view"], ["buy"]], ""),
    ],
)
def test_columns_that_tell_positive_rows_from_others(column, values, said):
    note = about_every_row(pd.DataFrame({"user_id": range(len(values)), column: values}))
    assert said in note
    assert bool(said) == bool(note)
