"""Reads interactions and items from files, DataFrames and datasets, and validates ids, timestamps and embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from onerec_hf.data.aliases import find_column, is_rarer, named_otherwise
from onerec_hf.data.columns import (
    DataError,
    canonical_ids,
    column_of,
    first,
    integers_from_text,
    names_source,
    require_columns,
)
from onerec_hf.data.duplicates import repeated_rows
from onerec_hf.data.lists import is_listed, one_item_per_row
from onerec_hf.data.positives import numeric_column
from onerec_hf.data.tables import is_text, load_table
from onerec_hf.data.times import FRACTION, TIMED, Instants, instants
from onerec_hf.modeling.files import listed, map_npy

if TYPE_CHECKING:
    from onerec_hf.data.tables import TableSource

_CHUNK = 65_536


@names_source
def read_interactions(
    source: TableSource,
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
    timestamp_column: str | None = "timestamp",
    feedback_columns: Sequence[str] | None = None,
    session_column: str | None = None,
    column_names: Sequence[str] | None = None,
) -> pd.DataFrame:
    """
    Reads interactions, one row each, sorted by user and time (stable: rows with equal timestamps keep their order).

    Ids are kept unchanged. In a text file an id column becomes integers only if every value is a canonical integer: a single "00123"
    keeps the whole column as text. A table may also hold one row per user, with a list of items, oldest first; lists of the same length in
    other columns belong to the items.

    Args:
        source: path of a .csv, .tsv, .parquet, .jsonl, .ndjson or .json file, a RecBole .inter or .item file, or a .txt file with a user and
            its items in each line; text and JSON also with .gz, .zst or .bz2. Or a pandas or polars DataFrame, a `pyarrow.Table`, or a
            `datasets.Dataset`.
        user_column, item_column, timestamp_column: column names in the source. In place of a default name that is absent, one of the usual
            other names is taken ("userId", "movieId", "asin", "time", ...). Without times pass None (or "none"): the rows of a user are in
            the order of time, and `timestamp` is their place.
        feedback_columns: further columns to keep (default: all other columns).
        session_column: column of session ids (default: "session_id" if present).
        column_names: the columns of a text file without a header, in order.

    Returns:
        columns `user_id`, `item_id` (int64 or str), `timestamp` (int64, whole; datetimes become seconds since 1970 UTC), `session_id` if
        present, then the feedback columns; and where times have fractions, these in `timestamp_fraction` (float64 in [0, 1)).

    Raises:
        DataError: unreadable or empty source, missing columns, null or mixed ids, timestamps that are not finite numbers or datetimes.

    Warns:
        UserWarning: exact duplicate rows were dropped (with their number); rows that differ in a column of distinct values only were kept;
            a column was found by another name; times in a type that is too narrow for them.

    Example:
        >>> rows = pd.DataFrame({"user": ["b", "a", "a"], "movie": ["07", "7", "8"], "t": [3, 2, 1], "rating": [5.0, 3.0, 4.0]})
        >>> read_interactions(rows, user_column="user", item_column="movie", timestamp_column="t")
          user_id item_id  timestamp  rating
        0       a       8          1     4.0
        1       a       7          2     3.0
        2       b      07          3     5.0
    """
    table = load_table(source, (user_column, item_column, session_column or "session_id"), column_names)
    if session_column is None and "session_id" in table.columns:
        session_column = "session_id"
    names = {
        "user_id": find_column(table.columns, user_column, "user_id"),
        "item_id": find_column(table.columns, item_column, "item_id"),
    }
    if session_column is not None:
        names["session_id"] = session_column
    lists = names["item_id"] in table.columns and is_listed(column_of(table, names["item_id"]))
    if timestamp_column not in (None, "none"):
        # Beside a list of items a single date is when the row was written.
        candidates = [
            name
            for name in table.columns
            if not (lists and is_rarer(name, "timestamp")) or is_listed(column_of(table, name))
        ]
        found = find_column(candidates, str(timestamp_column), "timestamp")
        if found in table.columns or timestamp_column != "timestamp" or not lists:
            names["timestamp"] = found
    _require(table, names, feedback_columns)
    if lists:
        table = one_item_per_row(table, names["item_id"])
    timed = "timestamp" in names
    cut_before = FRACTION in table.columns and FRACTION not in names.values()
    if feedback_columns is None:
        feedback_columns = [column for column in table.columns if column not in (*names.values(), FRACTION)]
    taken = [column for column in feedback_columns if column in (*names, "timestamp")]
    if taken:
        raise DataError(
            f"interactions: column {taken[0]!r} conflicts with the {taken[0]} read from {names.get(taken[0])!r}. Drop or rename "
            "it, or list the columns to keep in feedback_columns."
        )
    columns: dict[str, Any] = {
        name: ids_of(source, column_of(table, column), column) for name, column in names.items() if name != "timestamp"
    }
    if timed:
        times = _instants(source, column_of(table, names["timestamp"]), names["timestamp"], column_names)
        if cut_before and times.rest is None:  # the table was made here
            times = Instants(times.whole, numeric_column(table, FRACTION))
        repeated = repeated_rows(table, columns, times, names)
    else:
        times, repeated = Instants(np.arange(len(table)), None), np.zeros(len(table), dtype=bool)
    ids = {name: columns[name] for name in ("user_id", "item_id")}
    result = pd.DataFrame(
        ids
        | {"timestamp": times.whole}
        | {name: column for name, column in columns.items() if name not in ids}
        | {column: table[column] for column in feedback_columns}
        | ({} if times.rest is None else {FRACTION: times.rest})
    )
    users = pd.factorize(result["user_id"], sort=True)[0]
    order = np.lexsort((*(() if times.rest is None else (times.rest,)), times.whole, users))
    result = result.iloc[order[~repeated[order]]].reset_index(drop=True)
    if not timed:
        result["timestamp"] = result.groupby("user_id").cumcount()
        result.attrs[TIMED] = False
    return result


def _require(table: pd.DataFrame, names: dict[str, str], feedback_columns: Sequence[str] | None) -> None:
    """
    Raises:
        DataError: missing columns.
    """
    absent = [what for what, column in names.items() if column not in table.columns]
    if not absent:
        return require_columns(table, list(feedback_columns or ()), "interactions")
    hint = ""
    if any(str(name).isdecimal() for name in table.columns):
        hint = " If the file has no header, pass --column_names."
    raise DataError(
        f"interactions: no column {', '.join(repr(names[what]) for what in absent)} among: {listed(table.columns)}. {named_otherwise(absent, table.columns)}{hint}"
    )


def ids_of(source: TableSource, series: pd.Series, column: str) -> np.ndarray:
    """(N,) ids; text files carry no column types, so integers are detected."""
    text = is_text(source) and pd.api.types.infer_dtype(series, skipna=True) == "string"
    return canonical_ids(integers_from_text(series) if text else series, column)


def _instants(source: TableSource, series: pd.Series, column: str, names: Sequence[str] | None) -> Instants:
    """The times; a text file whose times are not integers is read again, since pandas made floats of them, which hold 15 digits."""
    if is_text(source) and series.dtype == np.float64 and series.notna().all():
        series = column_of(load_table(source, (column,), names), column)
    return instants(series, column)


def ids_as(what: str, ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """
    The ids of a table in the type of those of the interactions: integers become text, text becomes integers if each is a canonical one.

    Args:
        what: "items" or "users", for the warning.

    Returns:
        `ids` itself where they are of that type, or cannot be.

    Warns:
        UserWarning: the ids were converted.

    Example:
        >>> ids_as("items", np.array([1, 2]), np.array([3])).tolist()
        [1, 2]
    """
    if wanted.dtype == ids.dtype or not len(wanted):
        return ids
    if wanted.dtype == object:
        found: Any = np.array(list(map(str, ids.tolist())), dtype=object)
    else:
        found = integers_from_text(pd.Series(ids, dtype=object)).to_numpy()
        if found.dtype == object:
            return ids
    types = {"O": "text", "i": "integers"}
    warnings.warn(
        f"{what}: their ids are {types[ids.dtype.kind]} and those of the interactions {types[wanted.dtype.kind]}; they are matched as "
        f"{types[found.dtype.kind]}."
    )
    return found


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

    def rows_of(self, item_ids: np.ndarray) -> np.ndarray:
        """
        The rows of items; -1 where there is none.

        Example:
            >>> read_items(pd.DataFrame({"item_id": [1, 2]})).rows_of(np.array([2, 3])).tolist()
            [1, -1]
        """
        return pd.Index(self.item_ids).get_indexer(pd.Index(item_ids))

    def with_ids_like(self, item_ids: np.ndarray) -> ItemTable:
        """
        The table with ids of the other type, where its own differ from `item_ids` in type only: "7" and 7. Integers always become text; text
        becomes integers if each is a canonical one ("7", not "07").

        Warns:
            UserWarning: the ids were converted.

        Example:
            >>> items = read_items(pd.DataFrame({"item_id": [1, 2]}))
            >>> items.with_ids_like(np.array(["2"], dtype=object)).item_ids.tolist()  # doctest: +SKIP
            ['1', '2']
        """
        ids = ids_as("items", self.item_ids, item_ids)
        return self if ids is self.item_ids else ItemTable(ids, self.frame.assign(item_id=ids), self.embeddings)

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
        rows = self.rows_of(wanted)
        missing = wanted[rows < 0]
        if len(missing):
            types = {"O": "strings", "i": "integers"}
            fix = "Add their rows, or drop their interactions (--missing_items drop)."
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
    column_names: Sequence[str] | None = None,
) -> ItemTable:
    """
    Reads the item table, in the row order of the source.

    Args:
        source: a table, as `read_interactions` takes it.
        item_column: column of item ids; ids are kept unchanged, and other usual names of a default are found (see `read_interactions`).
        text_columns: further columns to keep (default: all other columns).
        embedding_column: a column of lists of equal length, one embedding per row.
        embeddings: (N, d) array aligned with the source's rows, or the path of a .npy file with one (float32 stays memory-mapped).
        column_names: the columns of a text file without a header, in order.

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
    table = load_table(source, (item_column, *(text_columns or ())), column_names)
    item_column = find_column(table.columns, item_column, "item_id")
    embedding_columns = [] if embedding_column is None else [embedding_column]
    require_columns(table, [item_column, *(text_columns or ()), *embedding_columns], "items")
    ids = ids_of(source, column_of(table, item_column), item_column)
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
