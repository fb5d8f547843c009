"""Counts of pairs of items in training sequences, as sparse matrices, and the strongest pairs of every item as neighbour lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

# Stored entries that are sorted at a time: bounds the working memory of `top_neighbours` at about 200 MB.
_BLOCK = 4_000_000


Sequences = Sequence[np.ndarray] | tuple[np.ndarray, np.ndarray]


def near_counts(
    sequences: Sequences,
    num_items: int,
    decay: float = 0.7,
    back: float = 0.3,
    window: int = 8,
    longest: int = 50,
    new: np.ndarray | None = None,
) -> sp.csr_matrix:
    """
    How often two items stand near each other: pairs at distance d <= `window` count `decay ** (d - 1)`, and times `back` in the other direction.

    Args:
        sequences: per user the item indices in time order, -1 for an item of which no pair counts; or, as a tuple, all of them concatenated
            and the (users + 1,) offsets.
        num_items: size of the catalogue.
        decay, back, window: weights of the pairs.
        longest: the latest items of each sequence that count.
        new: bool for each item of the concatenated sequences: only pairs with a new item count.

    Returns:
        (num_items, num_items) float32 of raw counts: row a, column b for pairs in which a stands before b (fully) or after it (times
        `back`). An item that a user has twice is its own neighbour.

    Raises:
        ValueError: an item index outside of the catalogue, or offsets or `new` that do not fit.

    Example:
        >>> near_counts([np.array([0, 1, 2])], 3, decay=0.5, back=0.25).toarray().tolist()
        [[0.0, 1.0, 0.5], [0.25, 0.0, 1.0], [0.125, 0.25, 0.0]]
    """
    latest = _latest(sequences, num_items, longest, new)
    forward = sp.csr_matrix((num_items, num_items), dtype=np.float32)
    for distance in range(1, window + 1):
        forward = forward + np.float32(decay ** (distance - 1)) * _pairs(*latest, distance, num_items)
    return forward if back == 0 else (forward + np.float32(back) * forward.T.tocsr()).tocsr()


def follow_counts(
    sequences: Sequences, num_items: int, longest: int = 50, new: np.ndarray | None = None
) -> sp.csr_matrix:
    """
    How often one item directly followed another. The transposed matrix says how often one stood directly before another.

    Args:
        sequences, num_items, longest, new: as in [`near_counts`].

    Returns:
        (num_items, num_items) float32: row n, column i for how often i directly followed n.

    Raises:
        ValueError: as [`near_counts`].

    Example:
        >>> follow_counts([np.array([0, 1, 0, 1]), np.array([2])], 3).toarray().tolist()
        [[0.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    return _pairs(*_latest(sequences, num_items, longest, new), 1, num_items)


def top_neighbours(
    matrix: Any, k: int, scale_rows: np.ndarray | None = None, scale_cols: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """
    The k columns of every row with the largest `scale_rows[row] * value * scale_cols[column]`, with their unscaled values.

    Args:
        matrix: (n, m) sparse matrix of scipy's, no stored entry negative.
        k: at least 1.
        scale_rows: (n,) positive; a factor of a whole row, which changes no order within it.
        scale_cols: (m,) positive.

    Returns:
        (n, k) int32 columns, largest scaled value first (equal ones by column), -1 where a row has fewer stored entries than k, and
        (n, k) float32 unscaled values, 0 there.

    Raises:
        ValueError: k below 1, a negative value.

    Example:
        >>> items, values = top_neighbours(sp.csr_matrix([[0, 4.0, 5.0], [1.0, 0, 0]]), 2, scale_cols=np.array([1.0, 1.0, 0.5]))
        >>> items.tolist(), values.tolist()
        ([[1, 2], [0, -1]], [[4.0, 5.0], [1.0, 0.0]])
    """
    if k < 1:
        raise ValueError(f"k ({k}) must be at least 1.")
    matrix = matrix.tocsr()
    matrix = matrix if matrix.has_sorted_indices else matrix.sorted_indices()
    if matrix.nnz and matrix.data.min() < 0:
        raise ValueError(f"the matrix holds a negative value ({matrix.data.min():g}). Counts are not negative.")
    found = np.full((matrix.shape[0], k), -1, dtype=np.int32)
    values = np.zeros((matrix.shape[0], k), dtype=np.float32)
    first = 0
    while first < matrix.shape[0]:
        # As many whole rows as fit into a block, one at least.
        stop = int(np.searchsorted(matrix.indptr, matrix.indptr[first] + _BLOCK, side="right")) - 1
        stop = max(first + 1, min(stop, matrix.shape[0]))
        entries = slice(matrix.indptr[first], matrix.indptr[stop])
        columns, raw = matrix.indices[entries], matrix.data[entries]
        lengths = np.diff(matrix.indptr[first : stop + 1])
        rows = np.repeat(np.arange(first, stop, dtype=np.int32), lengths)
        scaled = raw if scale_cols is None else raw * np.asarray(scale_cols)[columns]
        if scale_rows is not None:
            scaled = scaled * np.asarray(scale_rows)[rows]
        # One integer for row and value: bits of floats that are not negative are in the floats' order. Stable, so equal values stay in the
        # order of their columns, and far faster than a sort by two keys.
        bits = np.ascontiguousarray(scaled, dtype=np.float32).view(np.int32)
        order = np.argsort((rows.astype(np.int64) << 32) - bits, kind="stable")
        place = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        kept = place < k
        order, place = order[kept], place[kept]
        found[rows[kept], place] = columns[order]
        values[rows[kept], place] = raw[order]
        first = stop
    return found, values


def concatenated(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """
    All items one after the other, and the (users + 1,) offsets.

    Raises:
        ValueError: given offsets that do not fit.

    Example:
        >>> [array.tolist() for array in concatenated([np.array([4, 2]), np.array([7])])]
        [[4, 2, 7], [0, 2, 3]]
    """
    if not isinstance(sequences, tuple):
        items = np.concatenate([np.zeros(0, dtype=np.int64), *map(np.asarray, sequences)])
        return items, np.cumsum([0, *map(len, sequences)])
    items, offsets = (np.asarray(array) for array in sequences)
    if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(items):
        raise ValueError(f"offsets must go from 0 to {len(items)}, the number of items in all sequences.")
    return items, offsets


def _latest(
    sequences: Sequences, num_items: int, longest: int, new: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The latest `longest` items of every sequence, concatenated; the sequence of each, and whether it is new."""
    items, offsets = concatenated(sequences)
    if len(items) and not -1 <= items.min() <= items.max() < num_items:
        raise ValueError(
            f"item indices must lie in 0..{num_items - 1}, the catalogue, or be -1; found {items.min()} to {items.max()}."
        )
    if new is not None and len(new) != len(items):
        raise ValueError(f"new has {len(new)} entries, the sequences have {len(items)} items; pass one for each.")
    owners = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    latest = np.arange(len(items)) >= offsets[1:][owners] - longest
    return items[latest].astype(np.int32), owners[latest], None if new is None else np.asarray(new)[latest]


def _pairs(
    items: np.ndarray, owners: np.ndarray, new: np.ndarray | None, distance: int, num_items: int
) -> sp.csr_matrix:
    """Row a, column b: how often b stands `distance` places after a in the same sequence."""
    counted = (owners[:-distance] == owners[distance:]) & (items[:-distance] >= 0) & (items[distance:] >= 0)
    if new is not None:
        counted &= new[:-distance] | new[distance:]
    before, after = items[:-distance][counted], items[distance:][counted]
    ones = np.ones(len(before), dtype=np.float32)
    return sp.csr_matrix((ones, (before, after)), shape=(num_items, num_items))
