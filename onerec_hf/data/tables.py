"""Loads a table from a path, a DataFrame, an Arrow table or a Dataset."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from onerec_hf.data.atomic import read_atomic
from onerec_hf.data.columns import DataError, check_width, save_as_utf8
from onerec_hf.data.compressed import COMPRESSIONS, table_name
from onerec_hf.data.parquet import read_parquet
from onerec_hf.data.text_files import read_delimited, read_json, read_lines_per_user
from onerec_hf.data.types import plain_columns, table_from_arrow
from onerec_hf.modeling.files import UNEXPECTED, short

if TYPE_CHECKING:
    import datasets
    import polars
    import pyarrow

    TableSource = str | Path | pd.DataFrame | datasets.Dataset | polars.DataFrame | polars.LazyFrame | pyarrow.Table


_DELIMITED = (".csv", ".tsv", ".data", ".dat", ".txt")
_ATOMIC = (".inter", ".item")
_JSON = (".jsonl", ".ndjson", ".json")
SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".json", ".txt", ".data", ".dat", ".inter", ".item")
_COMPRESSED = _DELIMITED + _JSON


def is_text(source: Any) -> bool:
    """
    Whether a source is a file that stores values as text, without types: integers are detected there.

    Example:
        >>> is_text("clicks.csv.gz"), is_text("clicks.jsonl")
        (True, False)
    """
    return isinstance(source, str | Path) and table_name(source).suffix in (*_DELIMITED, *_ATOMIC)


def load_table(
    source: TableSource, text_columns: tuple[str | None, ...] = (), names: Sequence[str] | None = None
) -> pd.DataFrame:
    """
    Loads a table, with rows numbered from 0 and columns as `plain_columns` has them.

    Args:
        source: path of a file with one of `SUFFIXES` (text and JSON also with .gz, .zst or .bz2), a pandas or polars DataFrame, a
            `pyarrow.Table`, or a `datasets.Dataset`.
        text_columns: columns of a text file to read as text (ids: no conversion to numbers, and only the empty field is missing). Pass
            such a column through `integers_from_text` before `canonical_ids`.
        names: the columns of a text file without a header.

    Raises:
        DataError: missing file, folder, unsupported suffix, unreadable or empty table, duplicate column name.

    Example:
        >>> load_table(pd.DataFrame({"item_id": [7, 8]}, index=[5, 5])).index.tolist()
        [0, 1]
    """
    if names is not None and not (is_text(source) and table_name(source).suffix in _DELIMITED):  # pyright: ignore[reportArgumentType]
        raise DataError(f"column names are for text files without a header ({', '.join(_DELIMITED)}). Leave them out.")
    if isinstance(source, str | Path):
        table, where = _load_file(Path(source).expanduser(), text_columns, names), str(source)
    else:
        table, where = _in_memory(source)
    check_width(len(table.columns), where)
    repeated = table.columns[table.columns.duplicated()]
    if len(repeated):
        raise DataError(f"{where}: column {repeated[0]!r} occurs more than once. Rename or drop one of them.")
    if not len(table):
        raise DataError(f"{where}: the table has no rows.")
    return table if isinstance(source, str | Path) else plain_columns(table)


def _in_memory(source: Any) -> tuple[pd.DataFrame, str]:
    if isinstance(source, pd.DataFrame):
        # As in a file, a named index is a column.
        named = [name for name in source.index.names if name is not None and name not in source.columns]
        levels = {name: source.index.get_level_values(name) for name in named}
        table = source.reset_index(drop=True)
        for name, level in levels.items():
            table[name] = level
        return table, "the DataFrame"
    polars, pyarrow, datasets = (sys.modules.get(name) for name in ("polars", "pyarrow", "datasets"))
    if polars is not None and isinstance(source, polars.DataFrame | polars.LazyFrame):
        try:
            frame = source.collect() if isinstance(source, polars.LazyFrame) else source
            return table_from_arrow(frame.to_arrow()), "the DataFrame"
        except polars.exceptions.PolarsError as error:
            raise DataError(f"the polars frame cannot be read: {short(error, 500)}") from error
    if pyarrow is not None and isinstance(source, pyarrow.Table):
        return table_from_arrow(source), "the Arrow table"
    if datasets is not None and isinstance(source, datasets.Dataset):
        return table_from_arrow(source.with_format("arrow")[:]), "the Dataset"
    raise DataError(
        f"cannot read a table from {type(source).__name__}: pass a path ({', '.join(SUFFIXES)}), a pandas or polars DataFrame, a "
        "pyarrow.Table or one split of a datasets.Dataset (of a DatasetDict, choose one: dataset['train'])."
    )


def _load_file(path: Path, text_columns: tuple[str | None, ...], names: Sequence[str] | None) -> pd.DataFrame:
    if path.is_dir():
        raise DataError(f"{path} is a folder: pass one file ({', '.join(SUFFIXES)}), or a DataFrame of all of them.")
    kind = table_name(path)
    if kind.suffix not in SUFFIXES:
        raise DataError(f"{path}: unsupported suffix {kind.suffix!r}. Supported: {', '.join(SUFFIXES)}.")
    if kind.compression and kind.suffix not in _COMPRESSED:
        raise DataError(f"{path}: {kind.suffix} files are read without {path.suffix}. Decompress it.")
    if not path.is_file():
        raise DataError(f"{path}: no such file. Check the path.")
    if kind.suffix in _ATOMIC:
        return plain_columns(read_atomic(path, text_columns))
    try:
        if kind.suffix == ".parquet":
            return read_parquet(path)
        if kind.suffix in _JSON:
            return plain_columns(read_json(path))
        if kind.suffix == ".txt" and names is None and (table := read_lines_per_user(path)) is not None:
            return table
        return read_delimited(path, text_columns, names)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid UTF-8 ({error}). {save_as_utf8(path)}") from error
    except (*UNEXPECTED, OSError, csv.Error, pd.errors.ParserWarning) as error:
        raise DataError(f"{path}: cannot be read as {kind.suffix[1:]}: {short(error, 500)}") from error


__all__ = ["COMPRESSIONS", "SUFFIXES", "TableSource", "is_text", "load_table"]
