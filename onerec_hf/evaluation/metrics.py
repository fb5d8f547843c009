"""Ranking metrics over item indices or item ids, as plain numpy functions.

All metrics expect `ranked` in best-first order and share two conventions:
  - the integers -1 (an empty place: nothing was left to rank, or padding) and -2 (an invalid semantic ID) mean "no item": they occupy their
    rank and are never relevant;
  - a repeated item counts at its first rank only: repetitions occupy a rank without gain.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain

import numpy as np

Ranked = np.ndarray | Sequence[Sequence[str]] | Sequence[Sequence[int]] | Sequence[np.ndarray]
Relevant = np.ndarray | Sequence[Collection[str]] | Sequence[Collection[int]] | Sequence[np.ndarray]

_SCALARS = (str, int, np.integer)

#: In `ranked`: a place that could not be filled, and a generated semantic ID without an item.
EMPTY, INVALID = -1, -2


def recall_at_k(ranked: Ranked, relevant: Relevant, k: int, *, per_row: bool = False) -> float | np.ndarray:
    """
    Recall@k: the share of a row's relevant items in its top k, averaged over rows.

    Args:
        ranked: (n, R) integer array of item indices, best first, -1 or -2 for "no item"; or n lists of ids, all strings or all integers.
        relevant: n lists or sets of ids (duplicates count once), or an (n,) or (n, m) integer array padded with -1.
        k: cut-off, at least 1. Ranks beyond R contain no item.
        per_row: return the (n,) float64 values instead of their mean.

    Returns:
        The mean over rows, in [0, 1].

    Raises:
        ValueError: unequal numbers of rows, no rows, a row without a relevant item, k < 1, ids of mixed or different types.

    Example:
        >>> recall_at_k([["m1", "m2", "m3"], ["m1", "m2", "m3"]], [["m2"], ["m3", "m9"]], k=2)
        0.5
        >>> recall_at_k(np.array([[4, 1, -1], [2, 0, 3]]), np.array([1, 3]), k=3, per_row=True).tolist()
        [1.0, 1.0]
    """
    hits, counts = _hits(ranked, relevant, k)
    return _mean(_recall(hits, counts, k), per_row)


def ndcg_at_k(ranked: Ranked, relevant: Relevant, k: int, *, per_row: bool = False) -> float | np.ndarray:
    """
    NDCG@k with binary gains: a relevant item at rank p (from 1) gains 1 / log2(p + 1); the sum is divided by that of the ideal
    ranking with min(k, number of relevant items) relevant items at the top. Averaged over rows.

    Args, errors: as in `recall_at_k`.

    Returns:
        The mean over rows, in [0, 1].

    Example:
        >>> round(ndcg_at_k([["m1", "m2"]], [["m2"]], k=10), 4)  # 1 / log2(3)
        0.6309
    """
    hits, counts = _hits(ranked, relevant, k)
    return _mean(_ndcg(hits, counts, k), per_row)


def mrr_at_k(ranked: Ranked, relevant: Relevant, k: int, *, per_row: bool = False) -> float | np.ndarray:
    """
    MRR@k: the reciprocal rank of the first relevant item, 0 if none is in the top k. Averaged over rows.

    Args, errors: as in `recall_at_k`.

    Returns:
        The mean over rows, in [0, 1].

    Example:
        >>> mrr_at_k([["m1", "m2"], ["m1", "m2"]], [["m2"], ["m3"]], k=10)  # (1/2 + 0) / 2
        0.25
    """
    hits, counts = _hits(ranked, relevant, k)
    return _mean(_mrr(hits, counts, k), per_row)


def hit_rate_at_k(ranked: Ranked, relevant: Relevant, k: int, *, per_row: bool = False) -> float | np.ndarray:
    """
    The share of rows with a relevant item in the top k. Equals `recall_at_k` if every row has one relevant item.

    Args, errors: as in `recall_at_k`.

    Returns:
        The mean over rows, in [0, 1].

    Example:
        >>> hit_rate_at_k([["m1", "m2"], ["m1", "m2"]], [["m2", "m7"], ["m3"]], k=10)
        0.5
    """
    hits, _ = _hits(ranked, relevant, k)
    return _mean(np.any(hits[:, :k], axis=1).astype(np.float64), per_row)


def coverage_at_k(ranked: Ranked, num_items: int, k: int) -> float:
    """
    The share of the catalogue in the top k of any row.

    Args:
        ranked: as in `recall_at_k`.
        num_items: size of the catalogue.
        k: cut-off, at least 1.

    Returns:
        The share, in [0, 1].

    Raises:
        ValueError: k < 1, or more distinct items than `num_items`.

    Example:
        >>> coverage_at_k(np.array([[0, 1, 2], [0, 3, -1]]), num_items=8, k=2)  # rows 0, 1, 3
        0.375
    """
    _check_k(k)
    flat, lengths = _flatten(ranked, "ranked")
    kind = _kind(flat, "ranked")
    places = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    found = np.unique(np.asarray(flat)[places < k])
    distinct = len(found) - (int(np.isin(found, (EMPTY, INVALID)).sum()) if kind == "integers" else 0)
    if distinct > num_items:
        raise ValueError(
            f"ranked contains {distinct} distinct items in its top {k}, but num_items is {num_items}; pass the size of the catalogue"
        )
    return distinct / num_items


def invalid_id_rate(ranked: np.ndarray) -> float:
    """
    The share of invalid semantic IDs among generated ones; places that could not be filled do not count.

    Args:
        ranked: (n, R) integer array of item indices, -2 for a semantic ID without an item, -1 for an empty place.

    Returns:
        The share, in [0, 1]; 0 where nothing was generated.

    Raises:
        ValueError: not a 2-D integer array, or empty.

    Example:
        >>> invalid_id_rate(np.array([[4, -2], [2, -1], [0, -1]]))
        0.25
    """
    ranked = np.asarray(ranked)
    if ranked.dtype.kind not in "iu" or ranked.ndim != 2 or ranked.size == 0:
        raise ValueError(f"ranked: expected a non-empty 2-D integer array, got shape {ranked.shape} of {ranked.dtype}")
    return float((ranked == INVALID).sum() / max(1, (ranked != EMPTY).sum()))


def ranking_metrics(
    ranked: Ranked, relevant: Relevant, ks: Sequence[int] = (5, 10), num_items: int | None = None
) -> dict[str, float]:
    """
    Recall, NDCG and MRR at every k (and coverage if `num_items` is given), computed in one pass.

    Args:
        ranked, relevant: as in `recall_at_k`.
        ks: the cut-offs.
        num_items: size of the catalogue.

    Returns:
        `{"recall@5": ..., "ndcg@5": ..., "mrr@5": ..., "coverage@5": ..., "recall@10": ..., ...}`.

    Raises:
        ValueError: as in `recall_at_k` and `coverage_at_k`; `ks` is empty.

    Example:
        >>> ranking_metrics([["m1", "m2"]], [["m2"]], ks=(1, 2), num_items=4)  # doctest: +NORMALIZE_WHITESPACE
        {'recall@1': 0.0, 'ndcg@1': 0.0, 'mrr@1': 0.0, 'coverage@1': 0.25,
         'recall@2': 1.0, 'ndcg@2': 0.6309297535714575, 'mrr@2': 0.5, 'coverage@2': 0.5}
    """
    if len(ks) == 0:
        raise ValueError("ks is empty; pass at least one cut-off")
    for k in ks:
        _check_k(k)
    hits, counts = _hits(ranked, relevant, max(ks))
    results = {}
    for k in ks:
        results[f"recall@{k}"] = float(_recall(hits, counts, k).mean())
        results[f"ndcg@{k}"] = float(_ndcg(hits, counts, k).mean())
        results[f"mrr@{k}"] = float(_mrr(hits, counts, k).mean())
        if num_items is not None:
            results[f"coverage@{k}"] = coverage_at_k(ranked, num_items, k)
    return results


def rankable(ranked: np.ndarray) -> np.ndarray:
    """
    (n,) bool, the users with a candidate at all: a ranking of empty places is that of a user whose exclusions leave none.

    Args:
        ranked: (n, R) item indices, -1 for an empty place.

    Raises:
        ValueError: no user has a candidate.

    Example:
        >>> rankable(np.array([[4, -1], [-1, -1], [-2, -1]])).tolist()
        [True, False, True]
    """
    found = (np.asarray(ranked) != EMPTY).any(1)
    if len(found) and not found.any():
        raise ValueError(
            f"none of {len(found):,} held-out users can be ranked: their histories hold every item. Rank seen items too "
            "(--eval_exclude_seen false in training, --no_exclude_seen in evaluate)"
        )
    return found


def metrics_of_ranked(
    ranked: np.ndarray, relevant: np.ndarray, ks: Sequence[int] = (5, 10), num_items: int | None = None
) -> dict[str, float]:
    """
    [`ranking_metrics`] over the users who can be ranked ([`rankable`]), and the number of the others as `unranked_users`, where there are any.

    Example:
        >>> metrics_of_ranked(np.array([[4, 1], [-1, -1]]), np.array([1, 2]), ks=(2,))
        {'recall@2': 1.0, 'ndcg@2': 0.6309297535714575, 'mrr@2': 0.5, 'unranked_users': 1.0}
    """
    kept = rankable(ranked)
    metrics = ranking_metrics(ranked[kept], relevant[kept], ks, num_items)
    return metrics if kept.all() else {**metrics, "unranked_users": float((~kept).sum())}


def _recall(hits: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    return hits[:, :k].sum(axis=1) / counts


def _ndcg(hits: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    hits = hits[:, :k]
    ideal_hits = np.minimum(counts, k)
    discounts = 1 / np.log2(np.arange(2, max(hits.shape[1], ideal_hits.max()) + 2))
    return hits @ discounts[: hits.shape[1]] / np.cumsum(discounts)[ideal_hits - 1]


def _mrr(hits: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    hits = hits[:, :k]
    if hits.shape[1] == 0:
        return np.zeros(len(hits))
    return hits.any(axis=1) / (hits.argmax(axis=1) + 1)


def _mean(values: np.ndarray, per_row: bool) -> float | np.ndarray:
    return values if per_row else float(values.mean())


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def _hits(ranked: Ranked, relevant: Relevant, k: int) -> tuple[np.ndarray, np.ndarray]:
    """
    (n, min(k, R)) bool, true at the first rank of each relevant item; and the (n,) numbers of distinct relevant items. Time and memory
    are proportional to the number of ids, independent of the longest row of `relevant`.
    """
    _check_k(k)
    ranked, owners, ids = _to_integers(ranked, relevant)
    num_rows = len(ranked)
    ranked = ranked[:, :k]

    # One key per (row, relevant id). Only relevant ids are numbered, so keys do not overflow.
    vocabulary, numbers = np.unique(ids, return_inverse=True)
    keys = np.unique(owners * len(vocabulary) + numbers)
    counts = np.bincount(keys // max(len(vocabulary), 1), minlength=num_rows)
    if (counts == 0).any():
        raise ValueError(
            f"relevant: row {np.argmin(counts)} has no item ({np.sum(counts == 0)} such rows of {num_rows}), so recall is undefined; "
            "drop these rows from ranked and relevant"
        )
    numbers = np.minimum(np.searchsorted(vocabulary, ranked), len(vocabulary) - 1)
    ranked_keys = np.arange(num_rows)[:, None] * len(vocabulary) + numbers
    places = np.minimum(np.searchsorted(keys, ranked_keys), len(keys) - 1)
    matches = np.flatnonzero((vocabulary[numbers] == ranked) & (keys[places] == ranked_keys))
    _, first = np.unique(ranked_keys.ravel()[matches], return_index=True)
    hits = np.zeros(ranked.shape, dtype=bool)
    hits.ravel()[matches[first]] = True
    return hits, counts


def _to_integers(ranked: Ranked, relevant: Relevant) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, R) int64 padded with -1; the relevant ids as flat (row, id) pairs without -1."""
    ranked_flat, ranked_lengths = _flatten(ranked, "ranked")
    relevant_flat, relevant_lengths = _flatten(relevant, "relevant")
    if len(ranked_lengths) != len(relevant_lengths):
        raise ValueError(
            f"ranked has {len(ranked_lengths)} rows, relevant {len(relevant_lengths)}; pass one row per user in both"
        )
    if len(ranked_lengths) == 0:
        raise ValueError("ranked and relevant have no rows; pass at least one")
    ranked_kind, relevant_kind = _kind(ranked_flat, "ranked"), _kind(relevant_flat, "relevant")
    if ranked_kind and relevant_kind and ranked_kind != relevant_kind:
        raise ValueError(
            f"ranked contains {ranked_kind}, relevant {relevant_kind}, so no id can match; convert one of them"
        )
    if "strings" in (ranked_kind, relevant_kind):
        numbers: dict[str, int] = {}
        ranked_flat, relevant_flat = (
            [numbers.setdefault(item, len(numbers)) for item in flat] for flat in (ranked_flat, relevant_flat)
        )
    ranked_flat, relevant_flat = np.asarray(ranked_flat, dtype=np.int64), np.asarray(relevant_flat, dtype=np.int64)
    padded = np.full((len(ranked_lengths), ranked_lengths.max()), EMPTY, dtype=np.int64)
    padded[np.arange(padded.shape[1]) < ranked_lengths[:, None]] = ranked_flat
    owners = np.repeat(np.arange(len(relevant_lengths)), relevant_lengths)
    real = relevant_flat != -1
    return padded, owners[real], relevant_flat[real]


def _flatten(ids, name: str) -> tuple[np.ndarray | list, np.ndarray]:
    """The ids of all rows in one sequence, and the length of each row."""
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":
        if ids.ndim == 1 and name == "relevant":
            ids = ids[:, None]
        if ids.ndim != 2:
            raise ValueError(f"{name}: expected a 2-D array of item indices, got shape {ids.shape}")
        return ids.ravel(), np.full(len(ids), ids.shape[1])
    rows = list(ids)
    for number, row in enumerate(rows):
        # Without this check a string would be iterated by characters.
        if isinstance(row, _SCALARS):
            raise ValueError(f"{name}: row {number} is the single id {row!r}; pass a list of ids per row")
    return list(chain.from_iterable(rows)), np.fromiter(map(len, rows), np.int64, len(rows))


def _kind(flat: np.ndarray | list, name: str) -> str | None:
    if isinstance(flat, np.ndarray):
        return "integers"
    types = {type(item) for item in flat}
    if not types:
        return None
    if all(issubclass(kind, str) for kind in types):
        return "strings"
    if all(issubclass(kind, (int, np.integer)) for kind in types):
        return "integers"
    found = ", ".join(sorted(kind.__name__ for kind in types))
    raise ValueError(f"{name}: ids must be all strings or all integers, found {found}")
