"""Positive feedback: thresholds, their command-line form and their messages."""

import numpy as np
import pandas as pd
import pytest

from onerec_hf.data import DataError, PositiveFeedback

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
