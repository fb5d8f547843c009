"""Labelled sessions from impressions with feedback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa

from onerec_hf.data.columns import DataError, canonical_ids, column_of, require_columns
from onerec_hf.data.windows import examples

if TYPE_CHECKING:
    import datasets


def feedback_windows(
    impressions: pd.DataFrame,
    objectives: Mapping[str, str],
    histories: Mapping | None = None,
    min_items: int = 5,
    max_items: int = 10,
) -> datasets.Dataset:
    """
    Cuts every user's impressions into consecutive windows of `min_items` to `max_items`, for data without sessions. The number of windows is
    minimal and their lengths differ by at most one. Users with fewer than `min_items` impressions have no windows.

    A window's label is the mean of its impressions' values, the rate of the objective in the session: the paper's reward model (arXiv
    2502.18965, section 3.3) predicts one number per session and objective and does not say how to aggregate impressions. Impressions without a
    value do not enter the mean. A window without any value has a null label.

    Args:
        impressions: `user_id`, `item_id`, `timestamp` and the objectives' columns, in any order.
        objectives: objective name -> column with numbers in [0, 1], null if unknown.
        histories: user id -> item ids, oldest first. Missing users have an empty history.
        min_items, max_items: length of a window; `max_items >= 2 * min_items - 1`, so that any number of items can be divided.

    Returns:
        columns `user_id`, `history`, `session` (lists of ids) and `labels` (one float or null per objective, in their order), sorted by user
        and time.

    Raises:
        DataError: missing columns, null ids, values that are not numbers in [0, 1] (column, count, first row), or no user with enough
            impressions.

    Example:
        >>> rows = pd.DataFrame({"user_id": [1] * 3, "item_id": [7, 8, 9], "timestamp": [0, 1, 2], "liked": [1, 0, 0]})
        >>> feedback_windows(rows, {"ltr": "liked"}, {1: [5, 6]}, min_items=2, max_items=4)[0]
        {'user_id': 1, 'history': [5, 6], 'session': [7, 8, 9], 'labels': [0.3333333432674408]}
    """
    if not 1 <= min_items <= max_items or max_items < 2 * min_items - 1:
        raise ValueError(
            f"min_items={min_items} and max_items={max_items}: max_items must be at least 2 * min_items - 1, so that any number of items can be "
            "divided into windows"
        )
    require_columns(impressions, ["user_id", "item_id", "timestamp", *objectives.values()], "impressions")
    values = np.stack([_unit_interval(impressions, column) for column in objectives.values()], axis=1)
    codes, user_ids = pd.factorize(canonical_ids(column_of(impressions, "user_id"), "user_id"), sort=True)
    items = canonical_ids(column_of(impressions, "item_id"), "item_id")
    order = np.lexsort((impressions["timestamp"].to_numpy(), codes))
    counts = np.bincount(codes, minlength=len(user_ids))
    owners, starts, stops = window_slices(counts, min_items, max_items)
    if not len(owners):
        raise DataError(
            f"impressions: none of {len(user_ids):,} users has {min_items} impressions (at most {counts.max(initial=0)}). Lower min_items, or "
            "extend the period."
        )
    users = np.asarray(user_ids)[owners]
    given = [[] if histories is None else histories.get(user, []) for user in users.tolist()]
    windows = examples(users, _flat(given, items.dtype), (items[order], starts, stops))
    labels = _window_means(values[order], starts, stops)
    flat = pa.array(labels.ravel(), type=pa.float32(), mask=np.isnan(labels).ravel())
    offsets = pa.array(np.arange(len(labels) + 1) * len(objectives), type=pa.int32())
    return windows.add_column("labels", pa.ListArray.from_arrays(offsets, flat))  # type: ignore[arg-type]


def window_slices(counts: np.ndarray, min_items: int, max_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    (W,) owners, starts and stops of windows over consecutive runs of the given lengths.

    Example:
        >>> [part.tolist() for part in window_slices(np.array([2, 7, 3]), min_items=3, max_items=5)]
        [[1, 1, 2], [2, 6, 9], [6, 9, 12]]
    """
    counts = np.asarray(counts, dtype=np.int64)
    windows = np.where(counts >= min_items, -(-counts // max_items), 0)
    owners = np.repeat(np.arange(len(counts)), windows)
    nth = np.arange(len(owners)) - np.repeat(np.cumsum(windows) - windows, windows)
    short, longer = counts[owners] // windows[owners], counts[owners] % windows[owners]
    starts = (np.cumsum(counts) - counts)[owners] + nth * short + np.minimum(nth, longer)
    return owners, starts, starts + short + (nth < longer)


def _unit_interval(impressions: pd.DataFrame, column: str) -> np.ndarray:
    series = column_of(impressions, column)
    if not pd.api.types.is_numeric_dtype(series.dtype):
        raise DataError(
            f"column {column!r}: expected numbers in [0, 1], got {series.dtype}. Convert it, e.g. with pandas.to_numeric."
        )
    values = series.to_numpy(dtype=np.float64, na_value=np.nan)
    bad = (values < 0) | (values > 1)
    if bad.any():
        raise DataError(
            f"column {column!r}: {bad.sum():,} of {len(values):,} values are outside [0, 1] (first: row {int(bad.argmax())}, "
            f"{values[bad.argmax()].item()!r}). Scale them, e.g. watch times with WatchTimeScale, and set unknown values to null."
        )
    return values


def _window_means(values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """(W, K) float32 means of the known values in each window, NaN without any."""
    known = ~np.isnan(values)
    sums, counts = (
        np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(part, axis=0)])
        for part in (np.where(known, values, 0.0), known)
    )
    total, count = sums[stops] - sums[starts], counts[stops] - counts[starts]
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return np.clip(mean, 0.0, 1.0).astype(np.float32)  # rounding of the sums may exceed the interval


def _flat(lists: Sequence[Sequence], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lists as one flat array with starts and stops."""
    ends = np.cumsum([len(items) for items in lists])
    flat = np.array([item for items in lists for item in items], dtype=dtype)
    return flat, np.concatenate([[0], ends[:-1]]).astype(np.int64), ends.astype(np.int64)
