"""Brings the columns of pandas, pyarrow and polars tables to one set of types, so that every reader reads them alike."""

from __future__ import annotations

import contextlib
import decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from onerec_hf.data.columns import DataError, column_of

if TYPE_CHECKING:
    import pyarrow as pa


def plain_columns(table: pd.DataFrame) -> pd.DataFrame:
    """
    The table with columns of text (objects), integers, floats, booleans, datetimes or nested values: categories and dictionaries become their
    values, Arrow-backed columns NumPy's, decimals integers or floats, dates and periods datetimes, bytes of UTF-8 text. No value changes.

    Example:
        >>> import datetime
        >>> table = pd.DataFrame({"a": pd.Categorical(["x", "y"]), "b": [datetime.date(2020, 1, 1), None], "c": [b"x", b"y"]})
        >>> plain_columns(table).dtypes.astype(str).tolist()
        ['object', 'datetime64[us]', 'object']
    """
    return pd.DataFrame({name: plain_column(column_of(table, name)) for name in table.columns}, index=table.index)


def plain_column(series: pd.Series) -> pd.Series:
    """
    One column of `plain_columns`.

    Example:
        >>> from decimal import Decimal
        >>> plain_column(pd.Series([Decimal("7"), Decimal("8")])).tolist(), plain_column(pd.Series([Decimal("4.5")])).tolist()
        ([7, 8], [4.5])
    """
    kind = series.dtype
    if isinstance(kind, pd.ArrowDtype):
        import pyarrow as pa

        return arrow_column(pa.chunked_array(pa.array(series)), series.index)
    if isinstance(kind, pd.CategoricalDtype):
        return plain_column(series.astype(kind.categories.dtype))
    if isinstance(kind, pd.SparseDtype):
        return plain_column(series.astype(kind.subtype))
    if isinstance(kind, pd.Float32Dtype | pd.Float64Dtype):
        return pd.Series(series.to_numpy(dtype=kind.numpy_dtype, na_value=np.nan), index=series.index)
    if isinstance(kind, pd.PeriodDtype):
        return series.dt.to_timestamp()
    if isinstance(kind, pd.StringDtype):
        return series.astype(object).where(series.notna(), None)
    return _objects(series) if pd.api.types.is_object_dtype(kind) else series


def _objects(series: pd.Series) -> pd.Series:
    """A column of Python objects of one kind."""
    kind = pd.api.types.infer_dtype(series, skipna=True)
    if kind == "date":
        return pd.to_datetime(series).astype("datetime64[us]")
    if kind in ("datetime", "datetime64"):
        aware = [value.tzinfo is not None for value in series.dropna() if hasattr(value, "tzinfo")]
        return pd.to_datetime(series, utc=bool(aware) and all(aware))
    if kind == "decimal":
        return _decimals(series)
    if kind == "bytes":
        return _decoded(series)
    if kind in ("mixed", "unknown-array") and all(isinstance(value, decimal.Decimal) for value in series.dropna()):
        return _decimals(series)
    return series


def _decimals(series: pd.Series) -> pd.Series:
    known = series.dropna()
    if all(value.is_finite() and value == value.to_integral_value() for value in known):
        whole = series.map(lambda value: None if pd.isna(value) else int(value)).astype(object)
        try:
            return whole.astype("int64" if len(known) == len(series) else "Int64")
        except OverflowError:
            return whole
    return series.astype(float)


def _decoded(series: pd.Series) -> pd.Series:
    try:
        return series.map(lambda value: value.decode(), na_action="ignore").astype(object)
    except UnicodeDecodeError:
        return series


def holds_text(series: pd.Series) -> bool:
    """
    Whether a column holds text: strings, also in lists (genres, tags), in objects, or beside numbers.

    Example:
        >>> holds_text(pd.Series([["drama", "war"], None])), holds_text(pd.Series([[0.5, 1.0]])), holds_text(pd.Series([7, "x"]))
        (True, False, True)
    """
    return (
        any(_has_text(value) for value in series)
        if series.dtype == object
        else isinstance(series.dtype, pd.StringDtype)
    )


def _has_text(value: Any) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif isinstance(value, np.ndarray) and value.dtype != object:
        return value.dtype.kind == "U"
    elif not isinstance(value, list | tuple | set | np.ndarray):
        return isinstance(value, str)
    return any(map(_has_text, value))


def text_of(value: Any) -> str:
    """
    The text of one value: of lists and objects the parts, joined by commas. Empty for a missing one.

    Example:
        >>> text_of(["drama", "war"]), text_of({"en": "Heat", "fr": None}), text_of(None), text_of(1984)
        ('drama, war', 'Heat', '', '1984')
    """
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set | np.ndarray):
        return ", ".join(filter(None, map(text_of, value)))
    return "" if value is None or value is pd.NA or value is pd.NaT or value != value else str(value)


def table_from_arrow(table: pa.Table) -> pd.DataFrame:
    """
    An Arrow table as `plain_columns` has it. Integers with nulls stay integers (`Int64`).

    Example:
        >>> import pyarrow as pa
        >>> table_from_arrow(pa.table({"a": pa.array(["x", "y", "x"]).dictionary_encode(), "b": [1, None, 3]})).to_dict("list")
        {'a': ['x', 'y', 'x'], 'b': [1, None, 3]}
    """
    index = pd.RangeIndex(len(table))
    repeated = [name for name in table.column_names if table.column_names.count(name) > 1]
    if repeated:
        raise DataError(f"column {repeated[0]!r} occurs more than once. Rename or drop one of them.")
    columns = {
        name: arrow_column(column, index) for name, column in zip(table.column_names, table.columns, strict=True)
    }
    return pd.DataFrame(columns, index=index)


def arrow_column(column: pa.ChunkedArray, index: pd.Index) -> pd.Series:
    """
    An Arrow column as `plain_column` has it.

    Example:
        >>> import pyarrow as pa
        >>> arrow_column(pa.chunked_array([pa.array(["x"], pa.string_view())]), pd.RangeIndex(1)).tolist()
        ['x']
    """
    import pyarrow as pa

    kinds = pa.types
    column = _without_encoding(column)
    kind = column.type
    if kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_fixed_size_binary(kind):
        with contextlib.suppress(pa.ArrowInvalid):  # no text
            column = column.cast(pa.binary()).cast(pa.string())
    values: Any
    if kinds.is_integer(kind) and column.null_count:
        values = pd.array(column.to_pylist(), dtype="UInt64" if kind == pa.uint64() else "Int64")
    elif kinds.is_decimal(kind):
        return _decimals(pd.Series(column.to_pylist(), index=index, dtype=object))
    elif kinds.is_date(kind):
        values = column.cast(pa.timestamp("ms")).to_pandas()
    else:
        values = column.to_pandas()
    return plain_column(pd.Series(values).set_axis(index))


def _without_encoding(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column without dictionaries, runs, views and extension types."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == "arrow.uuid":
            return pa.chunked_array([[None if v is None else str(v) for v in column.to_pylist()]], type=pa.string())
        return _without_encoding(pa.chunked_array([chunk.storage for chunk in column.chunks], type=kind.storage_type))
    if pa.types.is_dictionary(kind):
        chunks = [
            pa.DictionaryArray.from_arrays(
                chunk.indices, _without_encoding(pa.chunked_array([chunk.dictionary])).combine_chunks()
            )
            for chunk in column.chunks
        ]
        decoded = [chunk.dictionary_decode() for chunk in chunks]
        return pa.chunked_array(decoded) if decoded else _without_encoding(pa.chunked_array([], type=kind.value_type))
    if pa.types.is_run_end_encoded(kind):
        chunks = [pc.call_function("run_end_decode", [chunk]) for chunk in column.chunks]
        return _without_encoding(pa.chunked_array(chunks, type=kind.value_type))
    if pa.types.is_string_view(kind) or pa.types.is_string(kind):
        return column.cast(pa.large_string())
    if pa.types.is_binary_view(kind):
        return column.cast(pa.large_binary())
    return column
