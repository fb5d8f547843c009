"""Raw logs of any size: finds files, reads them in batches, and validates every row by the rules of `read_interactions`."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onerec_hf.data.columns import MISSING_TEXT, DataError
from onerec_hf.data.positives import PositiveFeedback

if TYPE_CHECKING:
    import polars as pl

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
BATCH_ROWS = 1_000_000
# Number of JSON lines used to infer column types.
_JSON_LINES = 100_000


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


def find_log_files(source: str | Path) -> list[Path]:
    """
    The files of a path, a folder (recursive, files of one format) or a glob pattern, sorted by name. Rows are numbered in this order.

    Raises:
        DataError: no file, an unsupported suffix, or mixed formats.

    Example:
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("b.csv", "a.csv", "notes.txt"):
        ...         open(os.path.join(folder, name), "w").close()
        ...     [path.name for path in find_log_files(folder)]
        ['a.csv', 'b.csv']
    """
    text, kinds = str(source), ", ".join(SUFFIXES)
    if Path(source).is_file():
        found, kind = [Path(source)], "file"
    elif Path(source).is_dir():
        visible = (path for path in Path(source).rglob("*") if not path.name.startswith((".", "_")))
        found, kind = [path for path in visible if path.suffix.lower() in SUFFIXES], "folder"
    else:
        found, kind = [Path(path) for path in glob.glob(text, recursive=True) if Path(path).is_file()], "pattern"
    if not found:
        raise DataError(f"{text}: no such file, folder or pattern with log files ({kinds}). Check the path.")
    unread = [path for path in found if path.suffix.lower() not in SUFFIXES]
    if unread:
        raise DataError(f"{unread[0]}: unsupported suffix {unread[0].suffix!r}. Supported: {kinds}.")
    there = sorted({path.suffix.lower() for path in found})
    if len(there) > 1:
        raise DataError(
            f"{text}: files of several formats ({', '.join(there)}) in one {kind}. Select one format with a pattern."
        )
    return sorted(found)


@dataclass
class Checks:
    """
    Statistics and errors of the rows read so far.

    Args:
        rows: number of rows.
        positive: number of positive rows.
        integers: for "user", "item" and "time", whether all values that are text are integers.
        highest: the largest value of each feedback column.
        bad: (column, problem) -> number of rows, first row.
    """

    rows: int = 0
    positive: int = 0
    integers: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(("user", "item", "time"), True))
    highest: dict[str, float] = field(default_factory=dict)
    bad: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def count_bad(self, column: str, what: str, count: int, first: int) -> None:
        """Records `count` invalid rows, the first of them `first`."""
        before, earliest = self.bad.get((column, what), (0, first))
        self.bad[column, what] = before + count, min(earliest, first)


_FIXES = {
    "ids are null": "Drop these rows or give them ids.",
    "ids are not exact 64-bit integers": "Convert them to integers or strings.",
    "timestamps are neither finite numbers nor datetimes": "Use numbers (seconds since 1970) or datetimes.",
    "values are not numbers": "Convert the column, or remove it from the positive rule.",
}


@dataclass
class Log:
    """
    A log stored in files of one format.

    Args:
        files: as returned by `find_log_files`.
        user_column, item_column, timestamp_column: column names.
        positive: rule for positive rows.
        first_row: number of the first row, if other files precede these.

    Example:
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "log.csv")
        ...     with open(path, "w") as file:
        ...         _ = file.write("user_id,item_id,timestamp,like\\n1,a7,10,1\\n1,b9,20,0\\n")
        ...     log, checks = Log(find_log_files(path), positive=PositiveFeedback({"like": 1})), Checks()
        ...     [batch["item"].to_list() for batch in log.batches(checks)], checks.rows, checks.integers["user"]
        ([['a7']], 2, True)
    """

    files: Sequence[Path]
    user_column: str = "user_id"
    item_column: str = "item_id"
    timestamp_column: str = "timestamp"
    positive: PositiveFeedback = field(default_factory=PositiveFeedback)
    first_row: int = 0

    @property
    def is_text(self) -> bool:
        """Whether the format stores all values as text (.csv, .tsv)."""
        return self.files[0].suffix.lower() in (".csv", ".tsv")

    def scan(self) -> pl.LazyFrame:
        """
        All rows, with their number in `__row__`.

        Raises:
            DataError: unreadable file or missing column.
        """
        pl = import_polars()
        paths, suffix = list(self.files), self.files[0].suffix.lower()
        number: dict[str, Any] = {"row_index_name": "__row__", "row_index_offset": self.first_row}
        try:
            if suffix == ".parquet":
                upcast = pl.ScanCastOptions(integer_cast="upcast", float_cast="upcast")
                frame = pl.scan_parquet(paths, cast_options=upcast, extra_columns="ignore", glob=False, **number)
            elif suffix == ".jsonl":
                frame = pl.scan_ndjson(paths, infer_schema_length=_JSON_LINES, **number)
            else:
                separator = "\t" if suffix == ".tsv" else ","
                frame = pl.scan_csv(paths, separator=separator, infer_schema=False, glob=False, **number)
            names = frame.collect_schema().names()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise self._unreadable(error) from error
        wanted = [self.user_column, self.item_column, self.timestamp_column, *self.positive.any_of]
        missing = [name for name in wanted if name not in names]
        if missing:
            there = ", ".join(name for name in names if name != "__row__")
            raise DataError(
                f"{self.files[0]}: no column {', '.join(map(repr, missing))} among: {there}. Name the right one, or rename it."
            )
        return frame

    def batches(self, checks: Checks, buckets: int = 1) -> Iterator[pl.DataFrame]:
        """
        The positive rows, in batches in any order. `checks` collects statistics and errors of all rows.

        Args:
            buckets: number of buckets that users are hashed into.

        Returns:
            frames of `user`, `item`, `time` (in their type; text in text formats), `row` (uint64), `rest` (uint64, a hash of
            all other columns) and `bucket` (uint32, by user).

        Raises:
            DataError: unreadable files, or columns of unsupported types.
        """
        pl = import_polars()
        frame = self.scan()
        schema = frame.collect_schema()
        columns = {
            "user": self._id(pl, schema, self.user_column),
            "item": self._id(pl, schema, self.item_column),
            "time": self._time(pl, schema),
        }
        # Duplicates agree in all columns. Datetimes are hashed too, since they may be finer than the microseconds used for sorting.
        alone = [self.user_column, self.item_column]
        alone += [] if isinstance(schema[self.timestamp_column], pl.Datetime) else [self.timestamp_column]
        others = [name for name in schema.names() if name not in ("__row__", *alone)]
        rest = pl.struct(others).hash(seed=0) if others else pl.lit(0, dtype=pl.UInt64)
        feedback = {f"feedback {name}": self._feedback(pl, schema, name) for name in self.positive.any_of}
        given = {"user given": pl.col(self.user_column), "item given": pl.col(self.item_column)}
        given |= {f"given {name}": self._without_missing(pl, name) for name in self.positive.any_of}
        given = {name: column.is_not_null() for name, column in given.items()}
        query = frame.select(row=pl.col("__row__").cast(pl.UInt64), rest=rest, **columns, **feedback, **given)
        query = query.with_columns(bucket=(pl.col("user").hash(seed=0) % buckets).cast(pl.UInt32))
        rules = [pl.col(f"feedback {name}") >= value for name, value in self.positive.any_of.items()]
        kept = ["user", "item", "time", "row", "rest", "bucket"]
        try:
            for batch in query.collect_batches(chunk_size=BATCH_ROWS, maintain_order=False, engine="streaming"):
                self._check(pl, batch, checks)
                if rules:
                    batch = batch.filter(pl.any_horizontal(rules))
                checks.positive += len(batch)
                yield batch.select(kept)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        kind, many = self.files[0].suffix[1:], f" and {len(self.files) - 1:,} more" if len(self.files) > 1 else ""
        return DataError(f"{self.files[0]}{many}: cannot be read as {kind}: {error}")

    def _id(self, pl, schema, name: str):
        """Integers as int64, else text; invalid values become null."""
        column, kind = pl.col(name), schema[name]
        if kind.is_integer():
            return column.cast(pl.Int64, strict=False)
        if kind in (pl.Float32, pl.Float64):
            exact = (column.floor() == column) & (column.abs() < (2**24 if kind == pl.Float32 else 2**53))
            return pl.when(exact).then(column).otherwise(None).cast(pl.Int64)
        if kind in (pl.String, pl.Categorical, pl.Enum):
            return column.cast(pl.String)
        raise DataError(
            f"column {name!r}: ids must be integers or strings, not {kind}. Is this the right column, and are all ids of one type?"
        )

    def _time(self, pl, schema):
        """Sort key; values that are not finite become null."""
        column, kind = pl.col(self.timestamp_column), schema[self.timestamp_column]
        if kind == pl.String:
            numbers = column.cast(pl.Float64, strict=False)
            return pl.when(numbers.abs() < 2.0**63).then(column).otherwise(None)
        if kind.is_integer():
            return column.cast(pl.Int64, strict=False)
        if kind.is_float():
            numbers = column.cast(pl.Float64)
            return pl.when(numbers.abs() < 2.0**63).then(numbers).otherwise(None)
        if isinstance(kind, pl.Datetime):
            return column.dt.epoch("us")
        raise DataError(
            f"column {self.timestamp_column!r}: timestamps must be numbers or datetimes, not {kind}. Is this the right column?"
        )

    def _without_missing(self, pl, name: str):
        """A feedback column with the missing-value markers of text files replaced by null."""
        column = pl.col(name)
        return pl.when(column.is_in(MISSING_TEXT)).then(None).otherwise(column) if self.is_text else column

    def _feedback(self, pl, schema, name: str):
        """(N,) float64; null if not a number."""
        kind = schema[name]
        if not (self.is_text or kind.is_numeric() or kind == pl.Boolean):
            raise DataError(
                f"column {name!r}: expected numbers, got {kind}. Convert it, or remove it from the positive rule."
            )
        column = self._without_missing(pl, name)
        if self.is_text:
            column = column.replace({"True": "1", "False": "0", "true": "1", "false": "0"})
        return column.cast(pl.Float64, strict=False).fill_nan(None)  # polars orders NaN above all numbers

    def _check(self, pl, batch: pl.DataFrame, checks: Checks) -> None:
        checks.rows += len(batch)

        def count(column: str, what: str, bad) -> None:
            if number := int(bad.sum()):
                first: Any = batch["row"].filter(bad).min()
                checks.count_bad(column, what, number, first)

        for name, column in (("user", self.user_column), ("item", self.item_column)):
            if batch[name].null_count():
                given = batch[f"{name} given"]
                count(column, "ids are null", ~given)
                count(column, "ids are not exact 64-bit integers", batch[name].is_null() & given)
        if batch["time"].null_count():
            count(
                self.timestamp_column, "timestamps are neither finite numbers nor datetimes", batch["time"].is_null()
            )
        for name in self.positive.any_of:
            values = batch[f"feedback {name}"]
            if self.is_text:
                count(name, "values are not numbers", values.is_null() & batch[f"given {name}"])
            highest: Any = values.max()
            if highest is not None:
                checks.highest[name] = max(highest, checks.highest.get(name, float("-inf")))
        for name in ("user", "item", "time"):
            if batch.schema[name] == pl.String and checks.integers[name]:
                # Canonical integers only: "7", not "07" or "+7".
                parsed = batch[name].cast(pl.Int64, strict=False)
                same = parsed.cast(pl.String) == batch[name] if name != "time" else parsed.is_not_null()
                checks.integers[name] = parsed.null_count() == batch[name].null_count() and bool(same.all())

    def require_good(self, checks: Checks) -> None:
        """
        Raises:
            DataError: invalid rows (number, first row, fix), an empty log, or no positive row.
        """
        if not checks.rows:
            raise DataError(f"{self.files[0]}: the log has no rows. Check the path.")
        for (column, what), (count, first) in checks.bad.items():
            value = self.scan().filter(import_polars().col("__row__") == first).select(column).collect().item()
            raise DataError(
                f"column {column!r}: {count:,} of {checks.rows:,} {what} (first: row {first}, {value!r}, counting from 0 over all "
                f"files). {_FIXES[what]}"
            )
        if not checks.positive:
            seen = ", ".join(f"{name} at most {value:g}" for name, value in checks.highest.items())
            raise DataError(
                f"positive feedback: none of {checks.rows:,} rows has {self.positive} (found: {seen}). Lower a threshold."
            )
