"""RecBole's atomic files: interactions in NAME.inter and items in NAME.item, tab-separated, each column with its type in the header."""

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
