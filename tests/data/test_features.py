"""Features are learned from columns: kinds, vocabularies, buckets, and what is left out."""

import datetime

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.data import DataError, read_users
from onerec_hf.data.features import MOST_BUCKETS, MOST_VALUES, bucket_edges, encode_column, learn_feature, raw_values
from onerec_hf.modeling.features import FIRST, MISSING, UNKNOWN


def codes(name, column, later=None):
    learned = learn_feature(name, pd.Series(column))
    return encode_column(learned.feature, raw_values(name, pd.Series(column if later is None else later))).tolist()


@pytest.mark.parametrize(
    ("name", "column", "values", "why"),
    [
        ("like", [0, 1, 1, 0], ("0", "1"), "flag"),
        ("like", [True, False, True, False], ("0", "1"), "flag"),
        ("like", [1.0, 0.0, np.nan, 1.0, 0.0], ("0", "1"), "flag"),
        ("stars", [5, 3, 5, 3, 4, 4, 4], ("4", "3", "5"), "few whole numbers"),
        ("author_id", [10**12, 7, 10**12, 7], ("1000000000000", "7"), "named like an id"),
        ("authorId", [10**12, 7, 10**12, 7], ("1000000000000", "7"), "named like an id"),
        ("category", [*range(40), *range(40)], tuple(sorted(map(str, range(40)))), "codes without gaps"),
        ("genres", ["Action|Comedy", "Comedy", "Action", "Comedy|Action"], ("Action", "Comedy"), "separated by |"),
        ("tag", ["1,2", "2", "1", "2, 1"], ("1", "2"), "separated by ,"),
        ("tags", [["a", "b"], ["b"], ["a"], None], ("a", "b"), "lists"),
        ("title", ["Postman, The", "Matrix, The", "Postman, The", "Matrix, The"], ("Matrix, The", "Postman, The"), ""),
    ],
)
def test_categories(name, column, values, why):
    learned = learn_feature(name, pd.Series(column))
    assert learned.feature.values == values
    assert why in learned.about


@pytest.mark.parametrize(
    ("column", "edges"),
    [
        ([0.5, 1.5, 2.5] * 40, (1.5, 2.5)),
        (["x"] * 0 + [None, 3.5, 4.5, float("inf")], (4.5,)),
        ([datetime.datetime(1970, 1, 1), datetime.datetime(1970, 1, 2)], (86400.0,)),
    ],
)
def test_numbers(column, edges):
    assert learn_feature("n", pd.Series(column)).feature.edges == edges


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6).map(lambda x: round(x, 1)), min_size=1, max_size=800))
def test_buckets_hold_quantiles(numbers):
    numbers = np.array(numbers)
    edges = bucket_edges(numbers)
    assert list(edges) == sorted(set(edges))
    assert len(edges) <= 3 * MOST_BUCKETS
    counts = np.bincount(np.searchsorted(edges, numbers, side="right"), minlength=len(edges) + 1)
    assert (counts > 0).all()
    buckets = min(MOST_BUCKETS, max(2, len(numbers) // 20))
    assert counts.max() <= len(numbers) / buckets + np.unique(numbers, return_counts=True)[1].max()


def test_a_heavy_value_has_its_own_bucket():
    numbers = np.concatenate([np.zeros(900), np.linspace(0.1, 1, 100)])
    edges = bucket_edges(numbers)
    assert np.searchsorted(edges, 0.0, side="right") < np.searchsorted(edges, 0.1, side="right")


def test_rare_new_and_missing_values():
    column = ["a"] * 3 + ["b"] * 2 + ["once", None, ""]
    assert codes("city", column) == [[FIRST]] * 3 + [[FIRST + 1]] * 2 + [[UNKNOWN], [MISSING], [MISSING]]
    assert codes("city", column, ["new", np.nan, "b"]) == [[UNKNOWN], [MISSING], [FIRST + 1]]


def test_a_million_values_are_hashed_to_a_stated_size():
    texts = [f"v{i}" for i in range(MOST_VALUES + 5)] * 2
    learned = learn_feature("url", pd.Series(texts))
    assert learned.feature.hashes == MOST_VALUES
    assert learned.feature.size == MOST_VALUES + FIRST
    assert f"{len(texts) // 2:,} values share {MOST_VALUES:,} codes by their hash" in learned.about
    new = encode_column(learned.feature, pd.Series(["never seen"]))
    assert FIRST <= new[0, 0] < learned.feature.size


@pytest.mark.parametrize(
    ("column", "about"),
    [
        (["x", "x", "x"], "constant"),
        ([7.5, 7.5], "constant"),
        ([None, None], "no value in training rows"),
        ([np.nan, np.inf], "no finite number in training rows"),
        (["a", "b", "c"], "each of 3 values occurs once"),
    ],
)
def test_what_is_left_out(column, about):
    learned = learn_feature("x", pd.Series(column))
    assert learned.feature is None
    assert about in learned.about


def test_a_guess_leaves_out_texts_that_do_not_recur():
    titles = [f"t{i}" for i in range(9)] + ["t0"]
    assert learn_feature("title", pd.Series(titles)).feature.values == ("t0",)
    assert learn_feature("title", pd.Series(titles), guess=True).about == "most of 9 values occur once"


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ([[0.5, 1.5], [0.2, 1.0]], "vectors.* no feature"),
        ([{"a": 1}, {"a": 2}], "nested values.* no feature"),
        ([{"a"}, {"b"}], "nested values.* no feature"),
        ([["a", "b"], None, "b", ["a"]], "lists beside single values"),
    ],
)
def test_what_is_no_feature(column, words):
    with pytest.raises(DataError, match=f"column 'v': {words}"):
        learn_feature("v", pd.Series(column))


def test_another_type_later():
    age = learn_feature("age", pd.Series([18.5, 30.5, 40.5])).feature
    with pytest.raises(
        DataError, match=r"column 'age': feature 'age' is a number; got 'old', as in training. Convert the column."
    ):
        encode_column(age, pd.Series(["old"]))
    assert encode_column(age, pd.Series(["30.5", None])).tolist() == [[FIRST + 1], [MISSING]]
    city = learn_feature("city", pd.Series(["a", "b", "a", "b"])).feature
    with pytest.raises(DataError, match="one value per row"):
        encode_column(city, pd.Series([["a", "b"]]))


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ({"user_id": [1, 1], "age": [3, 4]}, r"1 of 2 rows duplicate an earlier user id \(first: row 1, 1\)"),
        ({"user_id": [1, None], "age": [3, 4]}, "1 of 2 ids are null"),
        ({"person": [1, 2], "age": [3, 4]}, "users: no column 'user_id' among: person, age"),
    ],
)
def test_users_are_one_row_each(rows, error):
    with pytest.raises(DataError, match=error):
        read_users(pd.DataFrame(rows))


def test_users_by_another_name_and_type():
    with pytest.warns(UserWarning, match="'uid' is read as user_id"):
        users = read_users(pd.DataFrame({"age": [3, 4], "uid": ["7", "8"]}))
    with pytest.warns(UserWarning, match="users: their ids are text"):
        assert users.with_ids_like(np.array([7])).user_ids.tolist() == [7, 8]
