"""Opens log files of every format with polars, lazily where polars reads them as `read_interactions` does, else in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onerec_hf.data.columns import DataError, save_as_utf8
from onerec_hf.data.compressed import stream_table, table_name
from onerec_hf.data.text_files import SEPARATORS, Layout, first_line, has_header, layout
from onerec_hf.modeling.files import short

if TYPE_CHECKING:
    import polars as pl

# Columns that are made here: the number of a row, and the place of an item in a row's list.
OWN = ("__row__", "__place__")
# Number of JSON lines used to infer column types.
_JSON_LINES = 100_000
_CHUNK_ROWS = 500_000


def import_polars():
    """
    Imports polars (extra `prepare`).

    Raises:
        ImportError: polars is not installed.
    """
    try:
        import polars
    except ImportError:
        raise ImportError(
            'preparing large logs needs polars, which is not installed. Run: pip install "onerec-hf[prepare]"'
        ) from None
    return polars


def scan(
    files: Sequence[Path], first_row: int = 0, names: Sequence[str] | None = None, schema: pl.Schema | None = None
) -> Iterator[pl.LazyFrame]:
    """
    All rows of files of one format, with their number in `__row__`; all values of a text format as text.

    Args:
        first_row: number of the first row.
        names: the columns of text files without a header.
        schema: types of the columns, where the first of these files does not decide on them: Parquet and JSON lines.

    Raises:
        DataError: unreadable files.

    Example:
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "log.csv")
        ...     _ = path.write_text("user_id,item_id\\n1,a\\n")
        ...     [part.collect().rows() for part in scan([path])]
        [[(0, '1', 'a')]]
    """
    pl = import_polars()
    suffix = table_name(files[0]).suffix
    number: dict[str, Any] = {"row_index_name": "__row__", "row_index_offset": first_row}
    paths = list(files)
    try:
        if suffix == ".parquet":
            if any(map(_is_odd, paths)):
                yield from _numbered(_parquet_chunks(paths), first_row)
                return
            upcast = pl.ScanCastOptions(integer_cast="upcast", float_cast="upcast")
            yield pl.scan_parquet(
                paths, cast_options=upcast, extra_columns="ignore", glob=False, schema=schema, **number
            )
        elif suffix == ".json" or (suffix in (".jsonl", ".ndjson") and _any_bz2(paths)):
            yield from _numbered((_whole(path) for path in paths), first_row)
        elif suffix in (".jsonl", ".ndjson"):
            yield pl.scan_ndjson(paths, infer_schema_length=_JSON_LINES, schema=schema, **number)
        elif suffix == ".txt" and names is None and not has_header(_first_line(paths[0])):
            if _any_bz2(paths):
                yield from _numbered((_whole(path) for path in paths), first_row)
            else:
                yield _lines_per_user(paths, number)
        else:
            yield from _delimited(paths, suffix, names, number)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, UnicodeDecodeError) as error:
        raise unreadable(files, error) from error


def unreadable(files: Sequence[Path], error: BaseException) -> DataError:
    """The error for files that polars or the system cannot read."""
    kind, many = table_name(files[0]).suffix[1:], f" and {len(files) - 1:,} more" if len(files) > 1 else ""
    fix = f" {save_as_utf8(files[0])}" if "utf-8" in str(error).lower() or "utf8" in str(error).lower() else ""
    return DataError(f"{files[0]}{many}: cannot be read as {kind}: {short(error, 500)}{fix}")


def _any_bz2(paths: list[Path]) -> bool:
    """Whether one of the files has a compression that polars does not read."""
    return any(table_name(path).compression == "bz2" for path in paths)


def _first_line(path: Path) -> str:
    with stream_table(path) as file:
        return first_line(file)


def _numbered(frames: Iterator[pl.DataFrame], first_row: int) -> Iterator[pl.LazyFrame]:
    for frame in frames:
        yield frame.lazy().with_row_index("__row__", first_row)
        first_row += len(frame)


def _is_odd(path: Path) -> bool:
    """Whether a Parquet file holds types that polars does not read, or reads as others: views of lists, UUIDs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError):
        return False  # polars says what is wrong
    kinds = pa.types
    return any(
        kinds.is_list_view(kind) or kinds.is_large_list_view(kind) or isinstance(kind, pa.BaseExtensionType)
        for kind in schema.types
    )


def _parquet_chunks(paths: list[Path]) -> Iterator[pl.DataFrame]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from onerec_hf.data.types import table_from_arrow

    for path in paths:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_CHUNK_ROWS):
                yield import_polars().from_pandas(table_from_arrow(pa.Table.from_batches([batch])))


def _whole(path: Path) -> pl.DataFrame:
    """A file that is read whole: one JSON value, or a compression that polars does not have."""
    from onerec_hf.data.tables import load_table

    return import_polars().from_pandas(load_table(path))


def _lines_per_user(paths: list[Path], number: dict[str, Any]) -> pl.LazyFrame:
    pl = import_polars()
    lines = pl.scan_csv(
        paths,
        separator="\x1f",
        quote_char=None,
        has_header=False,
        infer_schema=False,
        glob=False,
        new_columns=["line"],
        **number,
    )
    words = pl.col("line").str.replace_all(r"[,\s]+", " ").str.strip_chars().str.split(" ")
    named = lines.filter(pl.col("line").str.strip_chars() != "").with_columns(words.alias("words"))
    return named.select("__row__", user_id=pl.col("words").list.first(), item_id=pl.col("words").list.slice(1))


def _delimited(
    paths: list[Path], suffix: str, names: Sequence[str] | None, number: dict[str, Any]
) -> Iterator[pl.LazyFrame]:
    pl = import_polars()
    forms = [layout(lambda path=path: stream_table(path), suffix, names, path) for path in paths]
    first = forms[0]
    for path, form in zip(paths, forms, strict=True):
        if (form.separator, form.columns) != (first.separator, first.columns) and form.columns:
            raise DataError(
                f"{path}: its columns are {short(form.columns, 200)}, those of {paths[0]} {short(first.columns, 200)}. Prepare them apart, or "
                "write them alike."
            )
    hows = {form.quoting for form in forms} - {"absent"}
    # polars takes a quote inside of a field for the beginning of a quoted one.
    lazy = len(first.separator) == 1 and not _any_bz2(paths)
    if lazy and (hows <= {"off"} or hows == {"fields"}):
        frame = pl.scan_csv(
            paths,
            separator=first.separator,
            quote_char=None,
            has_header=names is None,
            infer_schema=False,
            glob=False,
            with_column_names=lambda _: first.columns,
            **number,
        )
        yield frame.with_columns(map(_unquoted, first.columns)) if hows == {"fields"} else frame
        return
    yield from _numbered(_chunks(paths, forms, names), number["row_index_offset"])


def _unquoted(name: str) -> pl.Expr:
    """A column without the quotes that enclose its fields."""
    pl = import_polars()
    column = pl.col(name)
    inner = column.str.slice(1, column.str.len_chars() - 2).str.replace_all('""', '"', literal=True)
    quoted = column.str.starts_with('"')
    return pl.when(quoted & (inner == "")).then(None).when(quoted).then(inner).otherwise(column).alias(name)


def _chunks(paths: list[Path], forms: list[Layout], names: Sequence[str] | None) -> Iterator[pl.DataFrame]:
    """Text files as pandas reads them, all values as text."""
    import warnings

    import pandas as pd

    for path, form in zip(paths, forms, strict=True):
        try:
            with stream_table(path) as file, warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)
                options = {"dtype": str, "na_values": [""], "chunksize": _CHUNK_ROWS}
                for chunk in pd.read_csv(file, **form.pandas_options(names), **options):
                    yield import_polars().from_pandas(
                        chunk, schema_overrides=dict.fromkeys(form.columns, import_polars().String)
                    )
        except (ValueError, pd.errors.ParserWarning) as error:
            raise unreadable([path], error) from error


__all__ = ["OWN", "SEPARATORS", "import_polars", "scan", "unreadable"]
