"""Ranking metrics: hand computations, agreement with ir-measures (trec_eval), arrays against lists, and every error."""

from __future__ import annotations

import time

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.evaluation import (
    coverage_at_k,
    hit_rate_at_k,
    invalid_id_rate,
    mrr_at_k,
    ndcg_at_k,
    ranking_metrics,
    recall_at_k,
)

ROW_METRICS = [recall_at_k, ndcg_at_k, mrr_at_k, hit_rate_at_k]

rankings = st.integers(1, 5).flatmap(
    lambda rows: st.tuples(
        st.integers(1, 12).flatmap(
            lambda width: st.lists(
                st.lists(st.integers(-1, 15), min_size=width, max_size=width), min_size=rows, max_size=rows
            )
        ),
        st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=6), min_size=rows, max_size=rows),
    )
)


def as_strings(rows):
    """The same rows as string ids; "no item" becomes an id that is never relevant."""
    return [[f"m{item}" if item != -1 else "illegal" for item in row] for row in rows]


def padded(rows):
    width = max(map(len, rows))
    return np.array([list(row) + [-1] * (width - len(row)) for row in rows])


def trec(measure, ranked, relevant):
    """Per-row values of ir-measures. A run cannot repeat a document, so "no item" and repetitions become filler documents."""
    qrels = {str(row): {str(item): 1 for item in items} for row, items in enumerate(relevant)}
    run = {}
    for row, items in enumerate(ranked):
        documents = [
            f"filler{place}" if item == -1 or item in items[:place] else str(item) for place, item in enumerate(items)
        ]
        run[str(row)] = {document: float(len(items) - place) for place, document in enumerate(documents)}
    values = {int(result.query_id): result.value for result in ir_measures.iter_calc([measure], qrels, run)}
    return [values[row] for row in range(len(ranked))]


@settings(max_examples=100, deadline=None)
@given(rankings, st.sampled_from([1, 2, 3, 5, 10, 20]))
def test_equals_ir_measures(case, k):
    ranked, relevant = case
    measures = {
        recall_at_k: ir_measures.R @ k,
        ndcg_at_k: ir_measures.nDCG @ k,
        mrr_at_k: ir_measures.RR @ k,
        hit_rate_at_k: ir_measures.Success @ k,
    }
    for metric, measure in measures.items():
        expected = trec(measure, ranked, relevant)
        np.testing.assert_allclose(metric(ranked, relevant, k, per_row=True), expected, atol=1e-9, rtol=0)
        assert metric(ranked, relevant, k) == pytest.approx(np.mean(expected), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(rankings, st.integers(1, 14))
def test_arrays_lists_and_strings_agree(case, k):
    ranked, relevant = case
    for metric in ROW_METRICS:
        expected = metric(ranked, relevant, k, per_row=True)
        for other_ranked, other_relevant in [
            (np.array(ranked), padded(relevant)),
            (np.array(ranked, dtype=np.int32), [set(items) for items in relevant]),
            ([np.array(row) for row in ranked], [np.array(items) for items in relevant]),
            (as_strings(ranked), as_strings(relevant)),
        ]:
            assert metric(other_ranked, other_relevant, k, per_row=True).tolist() == expected.tolist()
    legal = [[item for item in row if item != -1] for row in ranked]
    assert coverage_at_k(np.array(ranked), 16, k) == coverage_at_k(ranked, 16, k)
    assert coverage_at_k(as_strings(legal), 16, k) == coverage_at_k(legal, 16, k)


@settings(max_examples=50, deadline=None)
@given(rankings)
def test_ranking_metrics_are_the_single_functions(case):
    ranked, relevant = case
    results = ranking_metrics(ranked, relevant, ks=(3, 1, 20), num_items=16)
    assert results == {
        name: value
        for k in (3, 1, 20)
        for name, value in {
            f"recall@{k}": recall_at_k(ranked, relevant, k),
            f"ndcg@{k}": ndcg_at_k(ranked, relevant, k),
            f"mrr@{k}": mrr_at_k(ranked, relevant, k),
            f"coverage@{k}": coverage_at_k(ranked, 16, k),
        }.items()
    }
    assert all(type(value) is float for value in results.values())
    assert not any(name.startswith("coverage") for name in ranking_metrics(ranked, relevant))


def test_hand_computed():
    ranked = np.array([[7, 3, 9, 1], [2, -1, 4, 5], [6, 8, 0, 3]])
    relevant = [[3, 1], [4], [9, 2, 7]]
    assert recall_at_k(ranked, relevant, 3, per_row=True).tolist() == [0.5, 1.0, 0.0]
    assert mrr_at_k(ranked, relevant, 3, per_row=True).tolist() == [1 / 2, 1 / 3, 0.0]
    assert hit_rate_at_k(ranked, relevant, 3, per_row=True).tolist() == [1.0, 1.0, 0.0]
    ideal = 1 + 1 / np.log2(3)
    np.testing.assert_allclose(ndcg_at_k(ranked, relevant, 3, per_row=True), [1 / np.log2(3) / ideal, 0.5, 0.0])
    full = (1 / np.log2(3) + 1 / np.log2(5)) / ideal
    np.testing.assert_allclose(ndcg_at_k(ranked, relevant, 4, per_row=True), [full, 0.5, 0.0])
    assert recall_at_k(ranked, relevant, 3) == pytest.approx(0.5)


def test_ideal_dcg_is_truncated_at_k():
    assert ndcg_at_k([[1, 2]], [[1, 2, 3, 4]], k=2) == 1.0


def test_a_repeated_item_counts_once_at_its_first_place():
    ranked, relevant = np.array([[5, 5, 5, 2]]), [[5, 2]]
    assert recall_at_k(ranked, relevant, 3) == 0.5
    assert recall_at_k(ranked, relevant, 4) == 1.0
    assert ndcg_at_k(ranked, relevant, 4) == pytest.approx((1 + 1 / np.log2(5)) / (1 + 1 / np.log2(3)))
    assert coverage_at_k(ranked, 10, 3) == 0.1
    # Repetitions among the relevant items count once, too.
    assert recall_at_k(ranked, [[5, 5, 9]], 4) == 0.5
    assert recall_at_k(ranked, np.array([[5, 5, 9]]), 4) == 0.5


def test_no_item_is_never_relevant():
    assert recall_at_k(np.array([[-1, -1]]), np.array([[3, -1]]), 2) == 0.0
    assert recall_at_k([[-1, 3]], [[3, -1]], 2) == 1.0
    assert coverage_at_k(np.array([[-1, 2]]), 4, 2) == 0.25
    assert coverage_at_k(np.array([[-2, 2]]), 4, 2) == 0.25
    # Places that could not be filled are no invalid IDs.
    assert invalid_id_rate(np.array([[-2, 2, -1], [0, 1, 2]])) == pytest.approx(1 / 5)
    assert invalid_id_rate(np.array([[-1, -1]])) == 0.0


def test_short_and_ragged_rankings():
    assert recall_at_k([[], ["m1"]], [["m1"], ["m1"]], 10) == 0.5
    assert mrr_at_k([[], []], [["m1"], ["m1"]], 10) == 0.0
    assert ndcg_at_k([[], []], [["m1"], ["m2"]], 10) == 0.0
    assert recall_at_k([["m2", "m3"], ["m1"]], [["m3"], ["m3"]], 2, per_row=True).tolist() == [1.0, 0.0]
    assert coverage_at_k([["m2", "m3"], [], ["m1"]], 4, 1) == 0.5
    assert coverage_at_k([[], []], 4, 1) == 0.0


def test_large_ids_do_not_overflow():
    big = 2**62
    assert recall_at_k(np.array([[big, -big], [big + 1, 3]]), np.array([-big, big]), 2) == 0.5


@pytest.mark.parametrize("metric", [*ROW_METRICS, ranking_metrics])
@pytest.mark.parametrize(
    ("ranked", "relevant", "message"),
    [
        ([[1], [2]], [[1]], "ranked has 2 rows, relevant 1"),
        ([], [], "no rows"),
        ([[1], [2], [3]], [[1], [], [-1]], r"row 1 has no item \(2 such rows of 3\)"),
        (np.array([[1], [2]]), np.array([[1], [-1]]), r"row 1 has no item \(1 such rows of 2\)"),
        ([[1]], [[]], "row 0 has no item"),
        (np.array([1, 2]), [[1], [2]], r"ranked: expected a 2-D array .* shape \(2,\)"),
        (np.array([[1.0]]), [[1]], "ranked: ids must be all strings or all integers, found float64"),
        ([["m1", 2]], [["m1"]], "ranked: .* found int, str"),
        ([["m1"]], [[None]], "relevant: .* found NoneType"),
        ([["1"]], [[1]], "ranked contains strings, relevant integers"),
        (["m1"], [["m1"]], "ranked: row 0 is the single id 'm1'"),
        ([["m1"]], ["m1"], "relevant: row 0 is the single id 'm1'"),
    ],
)
def test_errors(metric, ranked, relevant, message):
    k = {"ks": (5, 10)} if metric is ranking_metrics else {"k": 5}
    with pytest.raises(ValueError, match=message):
        metric(ranked, relevant, **k)


@pytest.mark.parametrize("metric", ROW_METRICS)
def test_k_below_one(metric):
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        metric([[1]], [[1]], 0)


def test_errors_of_the_rest():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        coverage_at_k([[1]], 3, 0)
    with pytest.raises(ValueError, match="k must be at least 1, got -1"):
        ranking_metrics([[1]], [[1]], ks=(5, -1))
    with pytest.raises(ValueError, match="ks is empty"):
        ranking_metrics([[1]], [[1]], ks=())
    with pytest.raises(ValueError, match="3 distinct items in its top 3, but num_items is 2"):
        coverage_at_k([[0, 1, 2]], 2, 3)
    for wrong in (np.array([1, -1]), np.zeros((2, 0), dtype=int), np.array([[0.5]])):
        with pytest.raises(ValueError, match="expected a non-empty 2-D integer array"):
            invalid_id_rate(wrong)


def test_a_large_evaluation_is_fast():
    ranked = np.random.default_rng(0).integers(-1, 22_363, (22_363, 50))
    start = time.process_time()
    ranking_metrics(ranked, np.arange(22_363), ks=(5, 10, 50), num_items=22_363)
    assert time.process_time() - start < 2
