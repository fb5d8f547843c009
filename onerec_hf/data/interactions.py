"""Reads interactions and items from files, DataFrames and datasets, and validates ids, timestamps and embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from onerec_hf.data.columns import (
    DataError,
    canonical_ids,
    column_of,
    first,
    integers_from_text,
    names_source,
    require_columns,
    to_numbers,
)
from onerec_hf.data.tables import load_table
from onerec_hf.modeling.files import map_npy

if TYPE_CHECKING:
    from onerec_hf.data.tables import TableSource

_CHUNK = 65_536


@names_source
def read_interactions(
    source: TableSource,
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
    timestamp_column: str = "timestamp",
    feedback_columns: Sequence[str] | None = None,
    session_column: str | None = None,
) -> pd.DataFrame:
    """
    Reads interactions, one row each, sorted by user and time (stable: rows with equal timestamps keep their order).

    Ids are kept unchanged. In a text file an id column becomes integers only if every value is a canonical integer: a single "00123"
    keeps the whole column as text.

    Args:
        source: path of a .csv, .tsv, .parquet, .jsonl or RecBole .inter or .item file, a DataFrame, or a `datasets.Dataset`.
        user_column, item_column, timestamp_column: column names in the source.
        feedback_columns: further columns to keep (default: all other columns).
        session_column: column of session ids (default: "session_id" if present).

    Returns:
        columns `user_id`, `item_id` (int64 or str), `timestamp` (int64; datetimes become seconds since 1970 UTC, fractions are truncated
        after sorting), `session_id` if present, then the feedback columns.

    Raises:
        DataError: unreadable or empty source, missing columns, null or mixed ids, timestamps that are not finite numbers or datetimes.

    Warns:
        UserWarning: exact duplicate rows were dropped (with their number).

    Example:
        >>> rows = pd.DataFrame({"user": ["b", "a", "a"], "movie": ["07", "7", "8"], "t": [3, 2, 1], "rating": [5.0, 3.0, 4.0]})
        >>> read_interactions(rows, user_column="user", item_column="movie", timestamp_column="t")
          user_id item_id  timestamp  rating
        0       a       8          1     4.0
        1       a       7          2     3.0
        2       b      07          3     5.0
    """
    table = load_table(source, (user_column, item_column, session_column or "session_id"))
    if session_column is None and "session_id" in table.columns:
        session_column = "session_id"
    names = {"user_id": user_column, "item_id": item_column, "timestamp": timestamp_column}
    if session_column is not None:
        names["session_id"] = session_column
    require_columns(table, [*names.values(), *(feedback_columns or ())], "interactions")
    if feedback_columns is None:
        feedback_columns = [column for column in table.columns if column not in names.values()]
    taken = [column for column in feedback_columns if column in names]
    if taken:
        raise DataError(
            f"interactions: column {taken[0]!r} conflicts with the {taken[0]} read from {names[taken[0]]!r}. Drop or rename "
            "it, or list the columns to keep in feedback_columns."
        )

    repeated = _comparable(table).duplicated().to_numpy()
    if repeated.any():
        warnings.warn(
            f"interactions: dropped {repeated.sum():,} of {len(table):,} rows as exact duplicates "
            f"(first: row {int(repeated.argmax())})."
        )
    columns: dict[str, Any] = {}
    for name, column in names.items():
        read = _instants if name == "timestamp" else _ids
        columns[name] = read(source, column_of(table, column), column)
    columns |= {column: table[column] for column in feedback_columns}
    result = pd.DataFrame(columns).loc[~repeated]
    users = pd.factorize(result["user_id"], sort=True)[0]
    order = np.lexsort((result["timestamp"].to_numpy(), users))
    result = result.iloc[order].reset_index(drop=True)
    unit = 1_000_000 if pd.api.types.is_datetime64_any_dtype(table[timestamp_column]) else 1
    result["timestamp"] = (result["timestamp"] // unit).astype(np.int64)
    return result


def _ids(source: TableSource, series: pd.Series, column: str) -> np.ndarray:
    """(N,) ids; text files carry no column types, so integers are detected."""
    from_text = isinstance(source, str | Path) and Path(source).suffix.lower() in (".csv", ".tsv")
    return canonical_ids(integers_from_text(series) if from_text else series, column)


def _comparable(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with lists and arrays converted to strings, since `duplicated` cannot hash them."""
    unhashable = [
        column
        for column in table.columns
        if table[column].dtype == object and pd.api.types.infer_dtype(table[column], skipna=True).startswith("mixed")
    ]
    written = table.copy(deep=False)
    for column in unhashable:
        written[column] = table[column].map(lambda v: repr(v.tolist() if isinstance(v, np.ndarray) else v))
    return written


def _instants(source: TableSource, series: pd.Series, column: str) -> np.ndarray:
    """(N,) numbers to sort by: int64 or float64 as given, microseconds since 1970 UTC for datetimes."""
    fix = "Use numbers (seconds since 1970) or pandas.to_datetime(column)."
    if pd.api.types.is_bool_dtype(series.dtype):
        raise DataError(f"column {column!r}: timestamps are booleans. Is this the right column? {fix}")
    if pd.api.types.is_datetime64_any_dtype(series.dtype):
        bad = series.isna().to_numpy()
        zone = getattr(series.dtype, "tz", None)
        values = (series if zone is None else series.dt.tz_convert(None)).to_numpy("datetime64[us]").astype(np.int64)
    else:
        parsed: Any = to_numbers(series)
        numbers = parsed.to_numpy(dtype=np.float64, na_value=np.nan)
        bad = ~(np.abs(numbers) < 2.0**63)
        exact = not bad.any() and pd.api.types.is_integer_dtype(parsed.dtype)
        values = parsed.to_numpy(dtype=np.int64) if exact else numbers
    if bad.any():
        raise DataError(
            f"column {column!r}: {bad.sum():,} of {len(series):,} timestamps are neither finite numbers nor datetimes "
            f"(first: {first(series, bad)}). {fix}"
        )
    return values


@dataclass(frozen=True, eq=False)
class ItemTable:
    """
    Items, one row each.

    Args:
        item_ids: (N,) distinct ids, int64 or object array of `str`.
        frame: (N rows) `item_id` and the text columns.
        embeddings: (N, d) float32 aligned with `item_ids`, or None.

    Example:
        >>> items = read_items(pd.DataFrame({"item_id": ["a", "b"], "title": ["Alien", "Brazil"]}))
        >>> len(items), items.select(["b"]).frame["title"].tolist()
        (2, ['Brazil'])
    """

    item_ids: np.ndarray
    frame: pd.DataFrame
    embeddings: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.item_ids)

    def select(self, item_ids: Sequence | np.ndarray) -> ItemTable:
        """
        The rows of the given items, in their order.

        Raises:
            DataError: some items have no row (with their number and the first three).

        Example:
            >>> items = read_items(pd.DataFrame({"item_id": [1, 2], "title": ["Alien", "Brazil"]}))
            >>> items.select([2, 1]).item_ids.tolist()
            [2, 1]
        """
        wanted = canonical_ids(pd.Series(item_ids), "item_id") if len(item_ids) else self.item_ids[:0]
        rows = pd.Index(self.item_ids).get_indexer(pd.Index(wanted))
        missing = wanted[rows < 0]
        if len(missing):
            types = {"O": "strings", "i": "integers"}
            fix = "Add their rows, or drop their interactions."
            if wanted.dtype != self.item_ids.dtype:
                fix = (
                    f"The interactions' ids are {types[wanted.dtype.kind]}, the item table's {types[self.item_ids.dtype.kind]}: "
                    "convert one of them."
                )
            raise DataError(
                f"items: {len(missing):,} of {len(wanted):,} interacted items have no row in the item table "
                f"(first: {', '.join(map(repr, missing[:3].tolist()))}). {fix}"
            )
        embeddings = None if self.embeddings is None else self.embeddings[rows]
        return ItemTable(self.item_ids[rows], self.frame.iloc[rows].reset_index(drop=True), embeddings)


@names_source
def read_items(
    source: TableSource,
    *,
    item_column: str = "item_id",
    text_columns: Sequence[str] | None = None,
    embedding_column: str | None = None,
    embeddings: np.ndarray | str | Path | None = None,
) -> ItemTable:
    """
    Reads the item table, in the row order of the source.

    Args:
        source: path of a .csv, .tsv, .parquet, .jsonl or RecBole .inter or .item file, a DataFrame, or a `datasets.Dataset`.
        item_column: column of item ids; ids are kept unchanged (see `read_interactions`).
        text_columns: further columns to keep (default: all other columns).
        embedding_column: a column of lists of equal length, one embedding per row.
        embeddings: (N, d) array aligned with the source's rows, or the path of a .npy file with one (float32 stays memory-mapped).

    Raises:
        DataError: unreadable or empty source, missing columns, null, mixed or duplicate ids, embeddings with a wrong number of rows, of
            unequal lengths, not 2-D, not numeric or not finite.

    Example:
        >>> items = read_items(pd.DataFrame({"item_id": [7, 8], "title": ["Alien", "Brazil"], "e": [[0.0, 1.0], [1.0, 0.0]]}),
        ...                    embedding_column="e")
        >>> items.item_ids.tolist(), list(items.frame), items.embeddings.shape
        ([7, 8], ['item_id', 'title'], (2, 2))
    """
    if embedding_column is not None and embeddings is not None:
        raise DataError("items: embedding_column and embeddings are both given. Pass only one of them.")
    table = load_table(source, (item_column, *(text_columns or ())))
    embedding_columns = [] if embedding_column is None else [embedding_column]
    require_columns(table, [item_column, *(text_columns or ()), *embedding_columns], "items")
    ids = _ids(source, column_of(table, item_column), item_column)
    repeated = pd.Series(ids).duplicated().to_numpy()
    if repeated.any():
        raise DataError(
            f"column {item_column!r}: {repeated.sum():,} of {len(ids):,} rows duplicate an earlier item id (first: "
            f"{first(ids, repeated)}). Keep one row per item."
        )
    if text_columns is None:
        text_columns = [column for column in table.columns if column not in (item_column, embedding_column)]
    if "item_id" in text_columns and item_column != "item_id":
        raise DataError(
            f"items: column 'item_id' conflicts with the item_id read from {item_column!r}. Drop or rename it, or list the "
            "columns to keep in text_columns."
        )
    frame = pd.DataFrame({"item_id": ids} | {column: table[column] for column in text_columns})
    if embedding_column is not None:
        embeddings = _stack(column_of(table, embedding_column), embedding_column, ids)
    matrix = None if embeddings is None else check_embeddings(embeddings, ids)
    return ItemTable(ids, frame, matrix)


def _stack(series: pd.Series, column: str, ids: np.ndarray) -> np.ndarray:
    lengths = series.map(lambda row: len(row) if isinstance(row, list | tuple | np.ndarray) else -1).to_numpy()
    bad = lengths != lengths[0] if lengths[0] > 0 else lengths <= 0
    if bad.any():
        row = int(bad.argmax())
        found = "not a list" if lengths[row] < 0 else f"{lengths[row]} numbers"
        expected = f"{lengths[0]} as in the first row" if lengths[0] > 0 else "one number or more"
        raise DataError(
            f"column {column!r}: {bad.sum():,} of {len(series):,} embeddings have a wrong length (first: item "
            f"{ids[row : row + 1].tolist()[0]!r}: {found}, expected {expected}). Every item needs one vector of the same length."
        )
    try:
        return np.stack([np.asarray(row, dtype=np.float32) for row in series])
    except (TypeError, ValueError) as error:
        raise DataError(f"column {column!r}: embeddings are not lists of numbers ({error}). Convert them.") from error


def check_embeddings(embeddings: np.ndarray | str | Path, item_ids: np.ndarray) -> np.ndarray:
    """
    Validates embeddings: (N, d) float32, one finite row per item. A float32 .npy file stays memory-mapped.

    Raises:
        DataError: unreadable file, not 2-D, not numeric, not one row per item, NaN or infinity.

    Example:
        >>> check_embeddings(np.ones((2, 3), dtype=np.float16), np.array([7, 8])).dtype
        dtype('float32')
    """
    where = f"embeddings {embeddings}" if isinstance(embeddings, str | Path) else "embeddings"
    if isinstance(embeddings, str | Path):
        try:
            embeddings = map_npy(embeddings)
        except ValueError as error:
            raise DataError(f"embeddings: {error}") from error
        except OSError as error:
            raise DataError(f"{where}: cannot be read as .npy: {error}") from error
    matrix = np.asanyarray(embeddings)
    if matrix.ndim != 2 or not matrix.size or matrix.dtype.kind not in "fiu":
        raise DataError(
            f"{where}: expected an (items, d) array of real numbers, got shape {matrix.shape} of {matrix.dtype!s:.80}."
        )
    if len(matrix) != len(item_ids):
        raise DataError(
            f"{where}: {len(matrix):,} rows for {len(item_ids):,} items. Row i must hold the embedding of row i of the item table."
        )
    matrix = matrix.astype(np.float32, copy=False)
    bad = np.concatenate([~np.isfinite(matrix[i : i + _CHUNK]).all(axis=1) for i in range(0, len(matrix), _CHUNK)])
    if bad.any():
        raise DataError(
            f"{where}: {bad.sum():,} of {len(matrix):,} rows contain NaN or infinity (first: item "
            f"{item_ids[bad][:1].tolist()[0]!r}). Embed these items again or drop them."
        )
    return matrix
