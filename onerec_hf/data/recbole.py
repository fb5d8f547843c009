"""RecBole's atomic files: interactions in NAME.inter and items in NAME.item, tab-separated, each column with its type in the header."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from onerec_hf.data.sources import RecommendationData, load_files
from onerec_hf.data.tables import (
    MISSING_TEXT,
    DataError,
    canonical_ids,
    check_width,
    column_of,
    integers_from_text,
    require_columns,
    to_numbers,
)
from onerec_hf.modeling.files import replacing

_TYPES = ("token", "token_seq", "float", "float_seq")
# RecBole reads with pandas' defaults: these fields are missing there, and a field that starts with a quote swallows what follows.
_MISSING_IN_RECBOLE = frozenset(
    [
        *MISSING_TEXT,
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "n/a",
    ]
)
_NO_FIELD = re.compile(r'^"|[\t\r\n\0]')


def read_recbole(inter_path: str | Path, item_path: str | Path | None = None, **arguments: Any) -> RecommendationData:
    """
    A RecBole data set.

    `token` columns are read as ids in a CSV are: integers where every value is a canonical integer ("12", not "012"), else the text that
    stands there. `token_seq` columns become text, the tokens with one blank between them, `float_seq` columns arrays. Quotes have no
    meaning. The items' `text` is made of every text column, or of `text_columns`.

    Args:
        inter_path: the .inter file, or RecBole's folder of the data set: "dataset/ml-100k" holds ml-100k.inter and perhaps ml-100k.item.
        item_path: the .item file; with a folder, the one that stands there.
        arguments: further ones of [`load_files`], such as `user_column`, `timestamp_column` (RecBole's USER_ID_FIELD, TIME_FIELD),
            `text_columns`, `embedding_column` (a `float_seq`) or `positive`.

    Raises:
        DataError: no such file, a header without types or with an unknown one, lines with another number of fields, floats that are none, and
            what `load_files` says of columns and ids.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "tiny.inter")
        ...     _ = path.write_text("user_id:token\\titem_id:token\\ttimestamp:float\\nu1\\t7\\t20\\nu1\\t8\\t10\\n")
        ...     data = read_recbole(path)
        >>> data.name, data.interactions["item_id"].tolist()
        ('tiny', [8, 7])
    """
    inter_path = Path(inter_path)
    if inter_path.is_dir():
        folder = inter_path
        inter_path = folder / f"{folder.resolve().name}.inter"
        if item_path is None and inter_path.with_suffix(".item").is_file():
            item_path = inter_path.with_suffix(".item")
    return load_files(inter_path, item_path, **arguments)


def read_atomic(path: str | Path) -> pd.DataFrame:
    """
    One atomic file as a table, without the types in the columns' names; `load_table` reads .inter and .item files by it.

    Raises:
        DataError: as `read_recbole`.

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
        raise DataError(f"{path}: is no UTF-8 text ({error}). Save it as UTF-8.") from error
    while counts and not counts[-1]:  # empty lines at the end
        counts.pop()
    wrong = np.asarray(counts) != len(types)
    if wrong.any():
        line = int(wrong.argmax())
        raise DataError(
            f"{path}: {wrong.sum():,} of {len(wrong):,} lines have another number of fields than the header's {len(types)} (first: line "
            f"{line + 2} has {counts[line]}). Separate the fields by tabs, with none inside a field."
        )
    names = [name for name, _ in types]
    numbers = [name for name, kind in types if kind == "float"]
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
        skip_blank_lines=False,  # it would strip blanks off the first field
    )
    readers = {"token": integers_from_text, "token_seq": _tokens, "float": _floats, "float_seq": _float_lists}
    columns = {}
    for name, kind in types:
        try:
            columns[name] = readers[kind](column_of(table, name))
        except DataError as error:
            raise DataError(f"{path}: column '{name}:{kind}': {error}") from None
    return pd.DataFrame(columns)


def write_recbole(data: RecommendationData | pd.DataFrame, folder: str | Path, name: str) -> None:
    """
    Writes NAME.inter and, where there are items, NAME.item, each to a temporary name first, then renamed. RecBole's `data_path` is a folder
    of such folders: write to "dataset/mine" under the name "mine".

    Ids become `token`, numbers `float`, texts `token_seq` (`token` where none holds a blank), lists of numbers `float_seq`; the items'
    embeddings stay out. Blanks and lines in texts become single blanks.

    Args:
        data: a data set, or interactions as `read_interactions` returns them.
        folder: made where it is not there.
        name: the data set's name.

    Raises:
        DataError: missing columns, no rows, ids that RecBole would misread or take as missing, columns that no type fits, a column's name
            that is none.

    Example:
        >>> import tempfile
        >>> rows = pd.DataFrame({"user_id": ["a"], "item_id": [7], "timestamp": [10], "rating": [4.5]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_recbole(rows, folder, "tiny")
        ...     print(Path(folder, "tiny.inter").read_text().expandtabs(18))
        user_id:token     item_id:token     timestamp:float   rating:float
        a                 7                 10                4.5
    """
    interactions = data.interactions if isinstance(data, RecommendationData) else data
    require_columns(interactions, ["user_id", "item_id", "timestamp"], "interactions")
    files = {".inter": _format(interactions, ("user_id", "item_id", "session_id"), "interactions")}
    if isinstance(data, RecommendationData) and data.items is not None:
        files[".item"] = _format(data.items.frame, ("item_id",), "items")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, columns in files.items():
        path = folder / f"{name}{suffix}"
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write("\t".join(columns) + "\n")
            file.writelines("\t".join(row) + "\n" for row in zip(*columns.values(), strict=True))


def _read_header(header: str, path: str | Path) -> list[tuple[str, str]]:
    if not header.strip():
        raise DataError(
            f"{path}: the header is empty. Its fields are name:type, e.g. 'user_id:token', separated by tabs."
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
            raise DataError(f"{path}: column {name!r} stands more than once. Rename or drop one of them.")
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
        raise _no_numbers(series, bad.to_numpy())
    return parsed.astype(np.float64)  # integers beyond 64 bits


def _float_lists(series: pd.Series) -> pd.Series:
    rows, bad = [], np.zeros(len(series), dtype=bool)
    for row, value in enumerate(series.astype(object).fillna("")):
        try:
            rows.append(np.array(value.split(), dtype=np.float64))
        except ValueError:
            bad[row] = True
    if bad.any():
        raise _no_numbers(series, bad)
    return pd.Series(rows, dtype=object)


def _no_numbers(series: pd.Series, bad: np.ndarray) -> DataError:
    row = int(bad.argmax())
    return DataError(
        f"{bad.sum():,} of {len(series):,} values are no numbers (first: line {row + 2}, {str(series.iloc[row])!r}). Repair them, or call "
        "the column a token."
    )


def _format(table: pd.DataFrame, id_columns: tuple[str, ...], what: str) -> dict[str, list[str]]:
    """Header field -> the column's fields."""
    if not len(table):
        raise DataError(f"{what}: the table has no rows.")
    columns = {}
    for column in table.columns:
        if not isinstance(column, str) or not column or ":" in column or _NO_FIELD.search(column):
            raise DataError(
                f"{what}: {column!r} cannot name a column of an atomic file (no colons, tabs or lines, no quote at the start). Rename it."
            )
        series = column_of(table, column)
        kind, fields = _ids(series, column) if column in id_columns else _features(series, column)
        columns[f"{column}:{kind}"] = fields
    return columns


def _ids(series: pd.Series, column: str) -> tuple[str, list[str]]:
    fields = [str(value) for value in canonical_ids(series, column).tolist()]
    bad = [field for field in fields if field in _MISSING_IN_RECBOLE or _NO_FIELD.search(field)]
    if bad:
        raise DataError(
            f"column {column!r}: {len(bad):,} of {len(fields):,} ids would not come through RecBole's reader (first: {bad[0]!r}): tabs, "
            "lines, a quote at the start, or a word for a missing value. Rename these ids."
        )
    return "token", fields


def _features(series: pd.Series, column: str) -> tuple[str, list[str]]:
    values = series.astype(object).where(series.notna(), None).tolist()
    kinds = {_kind_of(value) for value in values if value is not None}
    if kinds <= {"number"}:
        return "float", ["" if value is None else _number(value) for value in values]
    if kinds == {"text"}:
        texts = [[] if value is None else value.split() for value in values]
        plain = all(
            value is None or ([value] == words and value[0] != '"') for value, words in zip(values, texts, strict=True)
        )
        return "token" if plain else "token_seq", [_join(words) for words in texts]
    if kinds == {"list"}:
        elements = {_kind_of(element) for value in values if value is not None for element in value}
        if elements == {"number"}:
            return "float_seq", [" ".join(map(_number, () if value is None else value)) for value in values]
        if elements <= {"text"}:
            return "token_seq", [_join(" ".join(() if value is None else value).split()) for value in values]
    raise DataError(
        f"column {column!r}: no type of an atomic file fits its values (dtype {series.dtype}). They may be all numbers, all text, or all "
        "lists of one of these: convert or drop the column."
    )


def _kind_of(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple | np.ndarray):
        return "list"
    return "number" if isinstance(value, int | float | np.bool_ | np.integer | np.floating) else "other"


def _number(value: Any) -> str:
    """All digits of an integer, the shortest exact decimals of a float, 0 or 1 of a boolean."""
    return repr(float(value)) if isinstance(value, float | np.floating) else str(int(value))


def _join(words: Sequence[str]) -> str:
    text = " ".join(words)
    return f" {text}" if text.startswith('"') else text  # RecBole would take the quote for that of a field
