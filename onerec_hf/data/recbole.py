"""RecBole datasets (NAME.inter and NAME.item), read and written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from onerec_hf.data.columns import MISSING_TEXT, DataError, canonical_ids, column_of, require_columns
from onerec_hf.data.sources import RecommendationData, load_files
from onerec_hf.modeling.files import replacing

# RecBole reads with pandas' defaults: these fields count as missing, and a leading quote merges a field with the following ones.
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
_UNSAFE_FIELD = re.compile(r'^"|[\t\r\n\0]')


def read_recbole(inter_path: str | Path, item_path: str | Path | None = None, **arguments: Any) -> RecommendationData:
    """
    Reads a RecBole dataset.

    `token` columns follow the rules for ids in a CSV file: integers if every value is a canonical integer ("12", not "012"), else text.
    `token_seq` columns become text with one blank between tokens, `float_seq` columns arrays. Quotes have no special meaning. The items'
    `text` joins all text columns, or those in `text_columns`.

    Args:
        inter_path: the .inter file, or the folder of a RecBole dataset: "dataset/ml-100k" with ml-100k.inter and optionally ml-100k.item.
        item_path: the .item file (default for a folder: the one in it).
        arguments: further arguments of [`load_files`], such as `user_column`, `timestamp_column` (RecBole's USER_ID_FIELD, TIME_FIELD),
            `text_columns`, `embedding_column` (a `float_seq`) or `positive`.

    Raises:
        DataError: missing file, a missing or unknown type in the header, rows with a wrong number of fields, invalid floats, and the errors
            of `load_files` about columns and ids.

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


def write_recbole(data: RecommendationData | pd.DataFrame, folder: str | Path, name: str) -> None:
    """
    Writes NAME.inter and, if there are items, NAME.item. Each file is written under a temporary name and renamed. RecBole's `data_path` is
    the parent folder: write to "dataset/mine" with the name "mine".

    Ids become `token`, numbers `float`, text `token_seq` (`token` if no value contains a blank), lists of numbers `float_seq`. Item
    embeddings are not written. Whitespace in text is reduced to single blanks.

    Args:
        data: a dataset, or interactions as returned by `read_interactions`.
        folder: created if missing.
        name: the dataset's name.

    Raises:
        DataError: missing columns, no rows, ids that RecBole misreads or treats as missing, columns without a matching type, invalid column
            names.

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


def _format(table: pd.DataFrame, id_columns: tuple[str, ...], what: str) -> dict[str, list[str]]:
    """Maps each header field (name:type) to the column's fields."""
    if not len(table):
        raise DataError(f"{what}: the table has no rows.")
    columns = {}
    for column in table.columns:
        if not isinstance(column, str) or not column or ":" in column or _UNSAFE_FIELD.search(column):
            raise DataError(
                f"{what}: {column!r} is not a valid column name in an atomic file (no colons, tabs or line breaks, no leading quote). Rename it."
            )
        series = column_of(table, column)
        kind, fields = _ids(series, column) if column in id_columns else _features(series, column)
        columns[f"{column}:{kind}"] = fields
    return columns


def _ids(series: pd.Series, column: str) -> tuple[str, list[str]]:
    fields = [str(value) for value in canonical_ids(series, column).tolist()]
    bad = [field for field in fields if field in _MISSING_IN_RECBOLE or _UNSAFE_FIELD.search(field)]
    if bad:
        raise DataError(
            f"column {column!r}: {len(bad):,} of {len(fields):,} ids would be misread by RecBole (first: {bad[0]!r}): tabs, "
            "line breaks, a leading quote, or a marker for missing values. Rename these ids."
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
        f"column {column!r}: its values match no type of an atomic file (dtype {series.dtype}). Use only numbers, only text, or only "
        "lists of one of these, or drop the column."
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
    return (
        f" {text}" if text.startswith('"') else text
    )  # RecBole treats a leading quote as the start of a quoted field
