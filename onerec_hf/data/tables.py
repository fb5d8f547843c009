"""Loads a table from a path, a DataFrame or a Dataset."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from onerec_hf.data.atomic import read_atomic
from onerec_hf.data.columns import MISSING_TEXT, DataError, check_width
from onerec_hf.data.parquet import read_parquet
from onerec_hf.modeling.files import UNEXPECTED, short

if TYPE_CHECKING:
    import datasets

    TableSource = str | Path | pd.DataFrame | datasets.Dataset


SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".inter", ".item")


def load_table(source: TableSource, text_columns: tuple[str | None, ...] = ()) -> pd.DataFrame:
    """
    Loads a table from a path, a DataFrame or a `datasets.Dataset`, with rows numbered from 0.

    Args:
        source: path of a .csv, .tsv, .parquet, .jsonl or RecBole .inter or .item file, a DataFrame, or a `datasets.Dataset`.
        text_columns: columns of a .csv/.tsv to read as text (ids: no conversion to numbers, and only the empty field is missing). Pass
            such a column through `integers_from_text` before `canonical_ids`.

    Raises:
        DataError: missing file, folder, unsupported suffix, unreadable or empty table, duplicate column name.

    Example:
        >>> load_table(pd.DataFrame({"item_id": [7, 8]}, index=[5, 5])).index.tolist()
        [0, 1]
    """
    if isinstance(source, pd.DataFrame):
        table, where = source.reset_index(drop=True), "the DataFrame"
    elif isinstance(source, str | Path):
        table, where = _load_file(Path(source), text_columns), str(source)
    elif "datasets" in sys.modules and isinstance(source, sys.modules["datasets"].Dataset):
        table, where = source.to_pandas(), "the Dataset"
        assert isinstance(table, pd.DataFrame)
    else:
        raise DataError(
            f"cannot read a table from {type(source).__name__}: pass a path ({', '.join(SUFFIXES)}), a pandas.DataFrame or one split "
            "of a datasets.Dataset (of a DatasetDict, choose one: dataset['train'])."
        )
    check_width(len(table.columns), where)
    repeated = table.columns[table.columns.duplicated()]
    if len(repeated):
        raise DataError(f"{where}: column {repeated[0]!r} occurs more than once. Rename or drop one of them.")
    if not len(table):
        raise DataError(f"{where}: the table has no rows.")
    return table


def _read_json_lines(path: Path) -> pd.DataFrame:
    """A JSON object per line. pandas' reader makes a date of any column called "timestamp", and its switch against that is deprecated."""
    with open(path, encoding="utf-8-sig") as file:
        rows = {number: json.loads(line) for number, line in enumerate(file, start=1) if line.strip()}
    for number, row in rows.items():
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
    return pd.DataFrame(list(rows.values()))


def _load_file(path: Path, text_columns: tuple[str | None, ...]) -> pd.DataFrame:
    if path.is_dir():
        raise DataError(f"{path} is a folder: pass one file ({', '.join(SUFFIXES)}), or a DataFrame of all of them.")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: unsupported suffix {path.suffix!r}. Supported: {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise DataError(f"{path}: no such file. Check the path.")
    if path.suffix.lower() in (".inter", ".item"):
        return read_atomic(path)
    try:
        if path.suffix.lower() == ".parquet":
            return read_parquet(path)
        if path.suffix.lower() == ".jsonl":
            return _read_json_lines(path)
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        columns = pd.read_csv(path, sep=separator, nrows=0, encoding="utf-8-sig", index_col=False).columns
        check_width(len(columns), path)
        text = {column for column in text_columns if column in columns}
        with warnings.catch_warnings():
            # Otherwise pandas drops surplus fields of a row, or shifts all columns by one.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(
                path,
                sep=separator,
                encoding="utf-8-sig",
                index_col=False,
                dtype=dict.fromkeys(text, str),
                keep_default_na=False,
                na_values={column: [""] if column in text else MISSING_TEXT for column in columns},
                low_memory=False,
            )
    except (*UNEXPECTED, OSError, pd.errors.ParserWarning) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix.lower()[1:]}: {short(error, 500)}") from error
