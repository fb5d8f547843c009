"""Reader for RecBole's atomic files: tab-separated tables whose header gives each column a type."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from onerec_hf.data.columns import (
    MISSING_TEXT,
    DataError,
    check_width,
    column_of,
    integers_from_text,
    save_as_utf8,
    to_numbers,
)

_TYPES = ("token", "token_seq", "float", "float_seq")


def read_atomic(path: str | Path, text_columns: Sequence[str | None] = ()) -> pd.DataFrame:
    """
    Reads one atomic file as a table and removes the types from the column names. `load_table` uses it for .inter and .item files.

    Args:
        path: the file.
        text_columns: columns of the type float to leave as text.

    Raises:
        DataError: a missing or unknown type in the header, rows with a wrong number of fields, values that are not numbers in a float column.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "tiny.item")
        ...     _ = path.write_text("item_id:token\\ttitle:token_seq\\tprice:float\\tv:float_seq\\n01\\tToy Story\\t5\\t0.5 1\\n")
        ...     read_atomic(path).to_dict("records")
        [{'item_id': '01', 'title': 'Toy Story', 'price': 5, 'v': array([0.5, 1. ])}]
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            types = _read_header(file.readline().rstrip("\n"), path)
            counts = [line.count("\t") + 1 if line != "\n" else 0 for line in file]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid UTF-8 ({error}). {save_as_utf8(path)}") from error
    while counts and not counts[-1]:  # trailing empty lines
        counts.pop()
    wrong = np.asarray(counts) != len(types)
    if wrong.any():
        line = int(wrong.argmax())
        raise DataError(
            f"{path}: {wrong.sum():,} of {len(wrong):,} lines do not have {len(types)} fields like the header (first: line "
            f"{line + 2} has {counts[line]}). Separate the fields by tabs, with none inside a field."
        )
    names = [name for name, _ in types]
    numbers = [name for name, kind in types if kind == "float" and name not in text_columns]
    table = pd.read_csv(
        path,
        sep="\t",
        header=0,
        names=names,
        index_col=False,
        encoding="utf-8-sig",
        quoting=csv.QUOTE_NONE,
        dtype={name: str for name in names if name not in numbers},
        keep_default_na=False,
        na_values={name: MISSING_TEXT if name in numbers else [""] for name in names},
        low_memory=False,
        nrows=len(counts),
        skip_blank_lines=False,  # True would strip blanks off the first field
    )
    readers = {"token": integers_from_text, "token_seq": _tokens, "float": _floats, "float_seq": _float_lists}
    columns = {}
    for name, kind in types:
        try:
            column = column_of(table, name)
            columns[name] = column if kind == "float" and name not in numbers else readers[kind](column)
        except DataError as error:
            raise DataError(f"{path}: column '{name}:{kind}': {error}") from None
    return pd.DataFrame(columns)


def _read_header(header: str, path: str | Path) -> list[tuple[str, str]]:
    if not header.strip():
        raise DataError(
            f"{path}: the header is empty. It must hold fields name:type, e.g. 'user_id:token', separated by tabs."
        )
    check_width(header.count("\t") + 1, path)
    types: list[tuple[str, str]] = []
    for number, field in enumerate(header.split("\t"), start=1):
        name, colon, kind = field.partition(":")
        if not name or not colon or ":" in kind:
            raise DataError(
                f"{path}: field {number} of the header, {field!r}, is not name:type. Give each a type ({', '.join(_TYPES)}), e.g. "
                "'user_id:token', and separate the fields by tabs."
            )
        if kind not in _TYPES:
            raise DataError(
                f"{path}: field {number} of the header, {field!r}, has the unknown type {kind!r}. Use one of {', '.join(_TYPES)}."
            )
        if name in dict(types):
            raise DataError(f"{path}: column {name!r} occurs more than once. Rename or drop one of them.")
        types.append((name, kind))
    return types


def _tokens(series: pd.Series) -> pd.Series:
    return series.map(lambda text: " ".join(text.split()), na_action="ignore")


def _floats(series: pd.Series) -> pd.Series:
    if pd.api.types.is_numeric_dtype(series.dtype) and not pd.api.types.is_bool_dtype(series.dtype):
        return series
    texts = series.astype(object)
    parsed: Any = to_numbers(texts)
    bad = texts.map(lambda value: isinstance(value, bool)) | parsed.isna()
    bad &= series.notna()
    if bad.any():
        raise _not_numbers(series, bad.to_numpy())
    return parsed.astype(np.float64)  # integers beyond 64 bits


def _float_lists(series: pd.Series) -> pd.Series:
    rows, bad = [], np.zeros(len(series), dtype=bool)
    for row, value in enumerate(series.astype(object).fillna("")):
        try:
            rows.append(np.array(value.split(), dtype=np.float64))
        except ValueError:
            bad[row] = True
    if bad.any():
        raise _not_numbers(series, bad)
    return pd.Series(rows, dtype=object)


def _not_numbers(series: pd.Series, bad: np.ndarray) -> DataError:
    row = int(bad.argmax())
    return DataError(
        f"{bad.sum():,} of {len(series):,} values are not numbers (first: line {row + 2}, {str(series.iloc[row])!r}). Fix them, or give "
        "the column the type token."
    )
