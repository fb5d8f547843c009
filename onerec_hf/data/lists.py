"""Columns that hold lists: a user's items in one row become a row each, and slices of flat values become lists."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pyarrow as pa

from onerec_hf.data.columns import column_of
from onerec_hf.data.types import plain_column

# Items per chunk; Arrow's list and string offsets are 32 bits.
_CHUNK_ITEMS = 1 << 24


def one_item_per_row(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """
    The table with a row per item of the lists in `column`. Lists of the same length in other columns go with the items.

    Example:
        >>> table = pd.DataFrame({"user_id": [1, 2], "items": [[5, 6], [7]], "rating": [[4, 3], [5]]})
        >>> one_item_per_row(table, "items").to_dict("list")
        {'user_id': [1, 1, 2], 'items': [5, 6, 7], 'rating': [4, 3, 5]}
    """
    lengths = list_lengths(column_of(table, column))
    if (lengths <= 0).any():
        warnings.warn(
            f"interactions: {(lengths <= 0).sum():,} of {len(table):,} rows have no items (first: row {int((lengths <= 0).argmax())})."
        )
    along = [name for name in table.columns if np.array_equal(list_lengths(column_of(table, name)), lengths)]
    rows = np.repeat(np.arange(len(table)), np.maximum(lengths, 0))
    flat = {}
    for name in table.columns:
        values = column_of(table, name)
        if name in along:
            parts = [value for value, length in zip(values, lengths, strict=True) if length > 0 for value in value]
            flat[name] = plain_column(pd.Series(parts, dtype=object).infer_objects())
        else:
            flat[name] = values.iloc[rows].reset_index(drop=True)
    return pd.DataFrame(flat)


def is_listed(series: pd.Series) -> bool:
    """
    Whether a column holds lists, null or empty ones aside.

    Example:
        >>> is_listed(pd.Series([[1], None])), is_listed(pd.Series(["a", "b"])), is_listed(pd.Series([1, [2]]))
        (True, False, False)
    """
    if series.dtype != object:
        return False
    lengths = list_lengths(series)
    return bool((lengths >= 0).any()) and not bool((lengths[series.notna().to_numpy()] < 0).any())


def list_lengths(series: pd.Series) -> np.ndarray:
    """
    (N,) lengths of a column's lists; -1 where there is none.

    Example:
        >>> list_lengths(pd.Series([[1, 2], None])).tolist()
        [2, -1]
    """
    return np.array([len(value) if isinstance(value, list | tuple | np.ndarray) else -1 for value in series])


def list_slices(values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> pa.ChunkedArray:
    """
    (E,) Arrow lists `values[starts[i]:stops[i]]`, of the type of the values; of strings where they are objects.

    Example:
        >>> list_slices(np.array([5, 6, 7]), np.array([0, 1]), np.array([2, 2])).to_pylist()
        [[5, 6], [6]]
    """
    flat = pa.array(values, type=pa.string() if values.dtype == object else None)
    ends = np.cumsum(stops - starts)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, np.arange(_CHUNK_ITEMS, total, _CHUNK_ITEMS))
    chunks = []
    for start, stop in zip([0, *cuts], [*cuts, len(ends)], strict=True):
        lengths = (stops - starts)[start:stop]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        indices = np.repeat(starts[start:stop] - offsets[:-1], lengths) + np.arange(offsets[-1])
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), flat.take(pa.array(indices))))
    return pa.chunked_array(chunks)
