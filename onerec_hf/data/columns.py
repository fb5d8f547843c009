"""Validation of table columns (ids, numbers), with errors that name the column, the rows and the fix."""

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

# Missing values in a text file. They do not apply to ids: "NA" and "null" are valid ids.
MISSING_TEXT = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]
_MAX_COLUMNS = 5_000
_MAX_MESSAGE = 1_500  # characters
_CANONICAL_INTEGER = r"0|-?[1-9][0-9]*"
_INTEGRAL_FLOAT = rf"(?:{_CANONICAL_INTEGER})\.0"


class DataError(ValueError):
    """
    Invalid user data. The message says what is wrong, where (column, row count, first example) and how to fix it.

    Example:
        >>> issubclass(DataError, ValueError)
        True
    """


_BEGINNINGS = {
    b"\x1f\x8b": "It is compressed by gzip: let its name end in .gz.",
    b"\x28\xb5\x2f\xfd": "It is compressed by zstd: let its name end in .zst.",
    b"BZh": "It is compressed by bzip2: let its name end in .bz2.",
    b"PK": "It is a zip archive or an Excel workbook: extract it, or save it as CSV in UTF-8.",
    b"\xff\xfe": "It is UTF-16: iconv -f UTF-16 -t UTF-8.",
    b"\xfe\xff": "It is UTF-16: iconv -f UTF-16 -t UTF-8.",
    b"PAR1": "It is Parquet: let its name end in .parquet.",
}


def save_as_utf8(path: Any) -> str:
    """
    What to do with a text file that is not UTF-8, by its first bytes.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        ...     _ = file.write("用户".encode("gbk")), file.flush()
        ...     save_as_utf8(file.name)
        'Save it as UTF-8, e.g. iconv -f GBK -t UTF-8 with the encoding that it has.'
    """
    with open(path, "rb") as file:
        begin = b"" if str(path).lower().endswith((".gz", ".zst", ".bz2")) else file.read(4)
    cures = (cure for mark, cure in _BEGINNINGS.items() if begin.startswith(mark))
    return next(cures, "Save it as UTF-8, e.g. iconv -f GBK -t UTF-8 with the encoding that it has.")


@contextmanager
def about(source: Any) -> Iterator[None]:
    """
    Prefixes DataErrors with the path of the file they concern, if `source` is a path. A command may read several files with equal columns.

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
        if named and len(str(error)) <= _MAX_MESSAGE:
            raise
        raise DataError(short(error if named else f"{source}: {error}", _MAX_MESSAGE)) from error


def names_source(read: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Decorator for functions whose first argument is a table source: their errors start with it, see `about`."""

    @functools.wraps(read)
    def named(source: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        with about(source):
            return read(source, *args, **kwargs)

    return named


def to_numbers(series: pd.Series) -> pd.Series:
    """
    `pandas.to_numeric(series, errors="coerce")` that also accepts integers beyond the range of float, where pandas raises.

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
    Rejects tables with more columns than interactions or items can plausibly have.

    Raises:
        DataError: more than 5,000 columns.

    Example:
        >>> check_width(8, "clicks.csv")
    """
    if columns > _MAX_COLUMNS:
        raise DataError(f"{where}: {columns:,} columns, at most {_MAX_COLUMNS:,} are supported. Check the separator.")


def require_columns(table: pd.DataFrame, columns: list[str], what: str) -> None:
    """
    Raises a DataError that lists the available columns if one of `columns` is missing.

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
    `table[column]`, typed as a Series (pandas' annotations are less precise).

    Example:
        >>> column_of(pd.DataFrame({"item_id": [7]}), "item_id").tolist()
        [7]
    """
    series = table[column]
    assert isinstance(series, pd.Series)
    return series


def integers_from_text(series: pd.Series) -> pd.Series:
    """
    Converts an id column of a text file to integers if every value is a canonical integer ("123"), or every one such an integer as a float
    ("123.0"); otherwise ("00123", "+1", "12a") it is unchanged.

    Example:
        >>> integers_from_text(pd.Series(["7", "-12"])).tolist(), integers_from_text(pd.Series(["7", "012"])).tolist()
        ([7, -12], ['7', '012'])
    """
    if series.isna().any():
        return series
    if series.str.fullmatch(_INTEGRAL_FLOAT).all():
        series = series.str.removesuffix(".0")
    elif not series.str.fullmatch(_CANONICAL_INTEGER).all():
        return series
    try:
        return series.astype(np.int64)
    except (ValueError, OverflowError):  # more than 64 bits: keep the ids as text
        return series


def canonical_ids(series: pd.Series, column: str) -> np.ndarray:
    """
    The ids of a column, unchanged.

    Args:
        series: (N,) integers (any width, also nullable), strings, categoricals of either, or integral floats without nulls.
        column: the column's name, for messages.

    Returns:
        (N,) int64, or object array of `str`.

    Raises:
        DataError: nulls, mixed integers and strings, fractional or inexact floats, booleans, other types, integers beyond 64 bits.

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
                f"column {column!r}: integer ids exceed 64 bits, e.g. {max(series, key=abs)}. Convert them to strings."
            ) from None
    if kind in ("floating", "mixed-integer-float"):
        values = series.to_numpy(dtype=np.float64)
        exact_below = 2**24 if series.dtype == np.float32 else 2**53
        bad = ~((np.floor(values) == values) & (np.abs(values) < exact_below))
        if bad.any():
            raise DataError(
                f"column {column!r}: ids are floats, and {bad.sum():,} of {total:,} are not exact integers (first: row "
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
    `row N, value` of the first row where the mask is true, for messages.

    Example:
        >>> first(pd.Series(["a", "b"]), np.array([False, True]))
        "row 1, 'b'"
    """
    row = int(np.argmax(mask))
    value = values.iloc[row] if isinstance(values, pd.Series) else values[row]
    return f"row {row}, {value.item() if isinstance(value, np.generic) else value!r}"
