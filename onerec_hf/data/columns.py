"""The columns of a table: the rules that ids and numbers obey, and errors that name the column, the rows and the cure."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import pandas as pd

from onerec_hf.modeling.files import listed, short

P = ParamSpec("P")

T = TypeVar("T")

# What counts as missing in a text file, ids excepted: "NA" and "null" are ids somebody has.
MISSING_TEXT = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]

_MOST_COLUMNS = 5_000

_LONGEST_MESSAGE = 1_500  # characters

_CANONICAL_INTEGER = r"0|-?[1-9][0-9]*"


class DataError(ValueError):
    """
    The user's data cannot be used: the message says what is wrong, where (column, row count, first example) and how to mend it.

    Example:
        >>> issubclass(DataError, ValueError)
        True
    """


@contextmanager
def about(source: Any) -> Iterator[None]:
    """
    Errors inside begin with the file that they are about, where `source` is one: a command may read several, with equal columns.

    Example:
        >>> with about("clicks.csv"):
        ...     raise DataError("column 'item_id': 1 of 7 ids are null.")
        Traceback (most recent call last):
        ...
        onerec_hf.data.columns.DataError: clicks.csv: column 'item_id': 1 of 7 ids are null.
    """
    try:
        yield
    except DataError as error:
        named = not isinstance(source, str | Path) or str(source) in str(error)
        if named and len(str(error)) <= _LONGEST_MESSAGE:
            raise
        raise DataError(short(error if named else f"{source}: {error}", _LONGEST_MESSAGE)) from error


def names_source(read: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """A function whose first argument is a table's source, its errors beginning with that, see `about`."""

    @functools.wraps(read)
    def named(source: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        with about(source):
            return read(source, *args, **kwargs)

    return named


def to_numbers(series: pd.Series) -> pd.Series:
    """
    `pandas.to_numeric(series, errors="coerce")`, also where a whole number has more digits than a float can hold, over which pandas raises.

    Example:
        >>> to_numbers(pd.Series(["2", "9" * 400, "x"])).tolist()
        [2.0, inf, nan]
    """
    try:
        numbers: Any = pd.to_numeric(series, errors="coerce")
        return numbers
    except OverflowError:
        return series.map(_as_float).astype(float)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
    except OverflowError:  # an integer
        return float("inf") if value > 0 else float("-inf")


def check_width(columns: int, where: Any) -> None:
    """
    Refuses a table of more columns than one of interactions or items can have.

    Raises:
        DataError: there are more than 5,000.

    Example:
        >>> check_width(8, "clicks.csv")
    """
    if columns > _MOST_COLUMNS:
        raise DataError(f"{where}: {columns:,} columns. Is the separator right? At most {_MOST_COLUMNS:,} are read.")


def require_columns(table: pd.DataFrame, columns: list[str], what: str) -> None:
    """
    Raises a DataError that lists the columns there are if one of `columns` is missing.

    Example:
        >>> require_columns(pd.DataFrame({"user": [1]}), ["user_id"], "interactions")
        Traceback (most recent call last):
        ...
        onerec_hf.data.columns.DataError: interactions: no column 'user_id' among: user. Name the right one, or rename it.
    """
    missing = [column for column in columns if column not in table.columns]
    if missing:
        names = ", ".join(map(repr, missing))
        raise DataError(f"{what}: no column {names} among: {listed(table.columns)}. Name the right one, or rename it.")


def column_of(table: pd.DataFrame, column: str) -> pd.Series:
    """
    `table[column]`, of which pandas' own annotations do not say that it is a Series.

    Example:
        >>> column_of(pd.DataFrame({"item_id": [7]}), "item_id").tolist()
        [7]
    """
    series = table[column]
    assert isinstance(series, pd.Series)
    return series


def integers_from_text(series: pd.Series) -> pd.Series:
    """
    A text file's id column as integers when every value is a canonical integer ("123"), else unchanged ("00123", "+1", "12a").

    Example:
        >>> integers_from_text(pd.Series(["7", "-12"])).tolist(), integers_from_text(pd.Series(["7", "012"])).tolist()
        ([7, -12], ['7', '012'])
    """
    if series.isna().any() or not series.str.fullmatch(_CANONICAL_INTEGER).all():
        return series
    try:
        return series.astype(np.int64)
    except (ValueError, OverflowError):  # longer than 64 bits: an id all the same, as text
        return series


def canonical_ids(series: pd.Series, column: str) -> np.ndarray:
    """
    The ids of a column, exactly as they are.

    Args:
        series: (N,) integers (any width, nullable too), strings, categories of either, or floats without nulls that are all integral.
        column: the column's name, for messages.

    Returns:
        (N,) int64, or object array of `str`.

    Raises:
        DataError: nulls, a mix of integers and strings, fractional or inexact floats, booleans, other types, beyond 64 bits.

    Example:
        >>> canonical_ids(pd.Series(["00123", "é"]), "item_id").tolist(), canonical_ids(pd.Series([3.0, 4.0]), "item_id").tolist()
        (['00123', 'é'], [3, 4])
    """
    total = len(series)
    null = series.isna().to_numpy()
    if null.any():
        raise DataError(
            f"column {column!r}: {null.sum():,} of {total:,} ids are null (first: row {int(null.argmax())}, counting from 0). "
            "Drop these rows or give them ids."
        )
    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(series.cat.categories.dtype)
    kind = pd.api.types.infer_dtype(series, skipna=False)
    if kind == "string":
        return series.to_numpy(dtype=object)
    if kind == "integer":
        try:
            values = [int(v) for v in series] if series.dtype == object else series.to_numpy()
            if isinstance(values, np.ndarray) and values.dtype == np.uint64 and values.max() > np.iinfo(np.int64).max:
                raise OverflowError
            return np.asarray(values, dtype=np.int64)
        except OverflowError:
            raise DataError(
                f"column {column!r}: integer ids beyond 64 bits, e.g. {max(series, key=abs)}. Make them strings."
            ) from None
    if kind in ("floating", "mixed-integer-float"):
        values = series.to_numpy(dtype=np.float64)
        exact_below = 2**24 if series.dtype == np.float32 else 2**53
        bad = ~((np.floor(values) == values) & (np.abs(values) < exact_below))
        if bad.any():
            raise DataError(
                f"column {column!r}: ids are floats, and {bad.sum():,} of {total:,} are no exact integers (first: row "
                f"{int(bad.argmax())}, {values[bad.argmax()].item()!r}). Read the column as integers or strings."
            )
        return values.astype(np.int64)
    if kind == "boolean":
        raise DataError(f"column {column!r}: ids are booleans. Is this the right column?")
    types = series.map(lambda value: type(value).__name__)
    names = ", ".join(f"{count:,} {name}" for name, count in types.value_counts().items())
    if types.nunique() > 1:
        minority = int(np.argmax(types.to_numpy() == types.value_counts().index[-1]))
        raise DataError(
            f"column {column!r}: ids of mixed types: {names} (first of the rarest: row {minority}, {series.iloc[minority]!r}). "
            "Convert the column to one type, e.g. .astype(str)."
        )
    raise DataError(f"column {column!r}: ids must be integers or strings, not {names} (dtype {series.dtype}).")


def first(values: Any, mask: np.ndarray) -> str:
    """
    `row N, value`: where a mask is true first, for messages.

    Example:
        >>> first(pd.Series(["a", "b"]), np.array([False, True]))
        "row 1, 'b'"
    """
    row = int(np.argmax(mask))
    value = values.iloc[row] if isinstance(values, pd.Series) else values[row]
    return f"row {row}, {value.item() if isinstance(value, np.generic) else value!r}"
