"""Raw logs of any size: finds files, reads them in batches, and validates every row by the rules of `read_interactions`."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onerec_hf.data.aliases import ALIASES, find_column, is_rarer, named_otherwise, usual_column
from onerec_hf.data.columns import DataError
from onerec_hf.data.compressed import table_name
from onerec_hf.data.duplicates import ROW_NUMBERS
from onerec_hf.data.feature_tables import AUTO, TIME
from onerec_hf.data.positives import PositiveFeedback
from onerec_hf.data.shards import expressions
from onerec_hf.data.shards.checks import Checks
from onerec_hf.data.shards.features import COLUMN, TextKinds
from onerec_hf.data.shards.numbering import DistinctValues, may_number
from onerec_hf.data.shards.scans import OWN, import_polars, scan, unreadable
from onerec_hf.data.tables import is_text
from onerec_hf.data.times import BAD, FRACTION, warn_narrow
from onerec_hf.modeling.features import POSITIVE

if TYPE_CHECKING:
    import polars as pl

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt", ".data", ".dat")
BATCH_ROWS = 1_000_000
# In a folder, a .txt or .json file may be notes or a description.
FOLDER_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson")
DEFAULTS = tuple(ALIASES)


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
    source = os.path.expanduser(source)
    text, kinds = str(source), ", ".join(SUFFIXES)
    if Path(source).is_file():
        found, kind = [Path(source)], "file"
    elif Path(source).is_dir():
        visible = (path for path in Path(source).rglob("*") if not path.name.startswith((".", "_")))
        found, kind = [path for path in visible if table_name(path).suffix in FOLDER_SUFFIXES], "folder"
    else:
        found, kind = [Path(path) for path in glob.glob(text, recursive=True) if Path(path).is_file()], "pattern"
    if not found:
        raise DataError(f"{text}: no such file, folder or pattern with log files ({kinds}). Check the path.")
    unread = [path for path in found if table_name(path).suffix not in SUFFIXES]
    if unread:
        raise DataError(f"{unread[0]}: unsupported suffix {table_name(unread[0]).suffix!r}. Supported: {kinds}.")
    there = sorted({table_name(path).suffix for path in found})
    if len(there) > 1:
        raise DataError(
            f"{text}: files of several formats ({', '.join(there)}) in one {kind}. Select one format with a pattern."
        )
    return sorted(found)


_FIXES = {
    "ids are null": "Drop these rows or give them ids.",
    "ids are not exact 64-bit integers": "Convert them to integers or strings.",
    BAD: "Use numbers (seconds since 1970), datetimes or ISO dates.",
    "values are not numbers": "Convert the column, or remove it from the positive rule.",
}


@dataclass
class Log:
    """
    A log stored in files of one format.

    Args:
        files: as returned by `find_log_files`.
        user_column, item_column, timestamp_column: column names, as in `read_interactions`.
        positive: rule for positive rows.
        first_row: number of the first row, if other files precede these.
        column_names: the columns of text files without a header.
        features: columns that are read too, ["auto"] for all others; None for none. Then all rows are read, with `positive`, if `everything`.
        everything: read the rows that are not positive.
        schema, numbering: types of the columns, and those that may differ in every row, where these files are a part of a log; see `fixed`.

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
    timestamp_column: str | None = "timestamp"
    positive: PositiveFeedback = field(default_factory=PositiveFeedback)
    first_row: int = 0
    column_names: Sequence[str] | None = None
    features: Sequence[str] | None = None
    everything: bool = False
    schema: pl.Schema | None = None
    numbering: Sequence[str] | None = None

    @property
    def is_text(self) -> bool:
        """Whether the format stores all values as text."""
        return is_text(self.files[0])

    def batches(self, checks: Checks, buckets: int = 1) -> Iterator[pl.DataFrame]:
        """
        The positive rows, in batches in any order. `checks` collects statistics and errors of all rows.

        Args:
            buckets: number of buckets that users are hashed into.

        Returns:
            frames of `user`, `item` (in their type; text in text formats), `time` (int64), `rest` (float64: fractions of times), `row`
            (uint64), `others` (uint64, a hash of all other columns) and `bucket` (uint32, by user); with `features` also `positive` (bool) and
            "feature NAME" of each. Where columns may differ in every row (`checks.numbering`): a hash of each (`value 0`, ...), and `alike`, of all
            other columns without them.

        Raises:
            DataError: unreadable files, or columns of unsupported types.
        """
        pl = import_polars()
        kept = ["user", "item", "time", "rest", "row", "others", "bucket"]
        conditions, numbering = self.positive.conditions, None
        try:
            for part in self.scan():
                if numbering is None:
                    numbering = self._may_number(part) if self.numbering is None else self.numbering
                    checks.numbering = {name: DistinctValues() for name in numbering}
                    kept += [*(["alike"] if numbering else []), *(f"value {place}" for place in range(len(numbering)))]
                query = self._query(part, buckets, numbering)
                for batch in query.collect_batches(chunk_size=BATCH_ROWS, maintain_order=False, engine="streaming"):
                    batch = self._check(pl, batch, checks)
                    holds = [f"holds {place}" for place in range(len(conditions))]
                    batch = batch.with_columns(positive=pl.any_horizontal(holds) if holds else pl.lit(True))
                    checks.positive += int(batch["positive"].sum())
                    if not self.everything:
                        batch = batch.filter("positive")
                    if self.features is None:
                        yield batch.select(kept)
                    else:
                        yield batch.select(*kept, "positive", *(n for n in batch.columns if n.startswith(COLUMN)))
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            raise unreadable(self.files, error) from error

    def scan(self) -> Iterator[pl.LazyFrame]:
        """All rows, as of [`scan`]."""
        return scan(self.files, self.first_row, self.column_names, self.schema)

    def fixed(self) -> Log:
        """
        The log with `schema` and `numbering`, which parts of it are read with, as of the whole.

        Raises:
            DataError: as [`batches`], before any row is read.
        """
        pl = import_polars()
        try:
            first = next(self.scan())
            numbering = self._may_number(first)
            self._query(first, 1, numbering)
            schema = pl.Schema({name: kind for name, kind in first.collect_schema().items() if name not in OWN})
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            raise unreadable(self.files, error) from error
        log = replace(self, schema=schema, numbering=numbering)
        log._narrow = self._narrow
        return log

    def count_rows(self) -> int:
        """
        The number of rows, lists not taken apart.

        Raises:
            DataError: unreadable files.
        """
        pl = import_polars()
        try:
            return sum(part.select(pl.len()).collect(engine="streaming").item() for part in self.scan())
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            raise unreadable(self.files, error) from error

    def _may_number(self, frame: pl.LazyFrame) -> list[str]:
        """The columns that may differ in every row; rows without times are no duplicates."""
        schema = frame.collect_schema()
        user, item, time = self._columns(schema)
        return [] if time is None else may_number(frame, (user, item, time), _others(schema, (user, item, time)))

    def _query(self, frame: pl.LazyFrame, buckets: int, numbering: Sequence[str]) -> pl.LazyFrame:
        """The columns of `batches`, and those that `_check` looks at."""
        pl = import_polars()
        schema = frame.collect_schema()
        user, item, time = self._columns(schema)
        text = None
        blank = pl.lit(False)
        if self.is_text and len(schema) > 2:
            blank = pl.all_horizontal(pl.col(name).is_null() for name in schema if name not in OWN)
        if isinstance(schema[item], pl.List | pl.Array):
            frame = one_item_per_row(frame, schema, item)
            schema, blank = frame.collect_schema(), pl.col(item).is_null()
        if time is None:
            at = pl.col("__row__").cast(pl.Int64)
            place = pl.col("__place__").cast(pl.Float64) if "__place__" in schema else pl.lit(0.0)
            times = (at, place, pl.lit(False))
        else:
            times = expressions.times(time, schema[time])
            if (text := expressions.as_text(pl.col(time), schema[time])) is not None:
                # Nearly all texts are integers; `_check` reads the others, digit by digit.
                times = (text.cast(pl.Int64, strict=False), pl.lit(0.0), pl.lit(False))
            if FRACTION in schema and time != FRACTION:  # `read_interactions` made the table
                times = (times[0], pl.col(FRACTION).cast(pl.Float64), times[2])
        # Duplicates agree in all columns but the number of the row.
        others = _others(schema, (user, item, *([] if time is None else [time])))
        alike = {name: expressions.compared(name, schema[name]) for name in others}
        columns = {
            "row": pl.col("__row__").cast(pl.UInt64),
            "user": expressions.ids(user, schema[user]),
            "item": expressions.ids(item, schema[item]),
            "time": times[0],
            "rest": times[1],
            "date": times[2],
            **({} if time is None or text is None else {"time text": text}),
            "others": _hash(alike.values()),
            "blank": blank,
            "user given": pl.col(user).is_not_null(),
            "item given": pl.col(item).is_not_null(),
        }
        if numbering:
            columns["alike"] = _hash(column for name, column in alike.items() if name not in numbering)
            columns |= {f"value {place}": alike[name].hash(seed=1) for place, name in enumerate(numbering)}
        for place, condition in enumerate(self.positive.conditions):
            name, kind = condition.column, schema[condition.column]
            columns[f"holds {place}"] = expressions.holds(condition, kind, self.is_text).fill_null(False)
            if isinstance(condition.value, float) and not condition.is_date:
                columns[f"feedback {place}"] = expressions.numbers(name, kind, self.is_text)
                if kind == pl.String:
                    columns[f"given {place}"] = expressions.without_missing(name, self.is_text).is_not_null()
        for name in self._features(others):
            columns[f"{COLUMN}{name}"] = expressions.without_missing(name, self.is_text and schema[name] == pl.String)
        self._narrow = (
            str(schema[time]).lower() if time is not None and schema[time] in (pl.Float16, pl.Float32) else ""
        )
        query = frame.select(**columns)
        return query.with_columns(bucket=(pl.col("user").hash(seed=0) % buckets).cast(pl.UInt32))

    def _features(self, others: Sequence[str]) -> list[str]:
        """
        The columns of features.

        Raises:
            DataError: a missing column.
        """
        named = list(self.features or ())
        if named == [AUTO]:
            return [name for name in others if name not in (*DEFAULTS, "session_id", TIME, POSITIVE, FRACTION)]
        wanted = [name for name in named if name != TIME]
        if missing := [name for name in wanted if name not in others]:
            raise DataError(
                f"{self.files[0]}: --interaction_features: no column {', '.join(map(repr, missing))} among: {', '.join(others)}. Name the right one, "
                "or rename it."
            )
        return wanted

    def _columns(self, schema: pl.Schema) -> tuple[str, str, str | None]:
        """
        The names of the user, item and time columns; no time where the rows are in its order.

        Raises:
            DataError: missing columns.
        """
        pl = import_polars()
        names = [name for name in schema if name not in OWN]
        user = find_column(names, self.user_column, "user_id")
        item = find_column(names, self.item_column, "item_id")
        time = None
        if self.timestamp_column not in (None, "none"):
            lists = [name for name in names if isinstance(schema[name], pl.List | pl.Array)]
            listed = item in lists
            candidates = [name for name in names if not (listed and is_rarer(name, "timestamp")) or name in lists]
            time = find_column(candidates, str(self.timestamp_column), "timestamp")
            time = None if listed and time not in names and self.timestamp_column == "timestamp" else time
        columns = {"user_id": user, "item_id": item, **({} if time is None else {"timestamp": time})}
        absent = [what for what, column in columns.items() if column not in names]
        if missing := [
            *(columns[what] for what in absent),
            *(each for each in self.positive.columns if each not in names),
        ]:
            cure = named_otherwise(absent, names) if absent else "Name the right one, or rename it."
            hint = (
                " If the file has no header, pass --column_names." if any(name.isdecimal() for name in names) else ""
            )
            raise DataError(
                f"{self.files[0]}: no column {', '.join(map(repr, missing))} among: {', '.join(names)}. {cure}{hint}"
            )
        return user, item, time

    def _check(self, pl, batch: pl.DataFrame, checks: Checks) -> pl.DataFrame:
        """Counts what is wrong; returns the rows that hold values."""
        checks.left_out += int(batch["blank"].sum())
        batch = batch.filter(~pl.col("blank"))
        if "time text" in batch.columns and batch["time"].null_count():
            whole, rest, dated = expressions.times("time text", pl.String())
            batch = batch.with_columns(time=whole, rest=rest, date=dated)
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
            count(str(self.timestamp_column), BAD, batch["time"].is_null())
        checks.dates += int(batch["date"].fill_null(False).sum())
        if len(batch):
            checks.latest = max(checks.latest, int(batch["time"].abs().max() or 0))  # pyright: ignore[reportArgumentType]
        for place, condition in enumerate(self.positive.conditions):
            if f"feedback {place}" not in batch.columns:
                continue
            values = batch[f"feedback {place}"]
            if f"given {place}" in batch.columns:
                count(condition.column, "values are not numbers", values.is_null() & batch[f"given {place}"])
            highest: Any = values.max()
            if highest is not None:
                checks.highest[condition.column] = max(highest, checks.highest.get(condition.column, float("-inf")))
        for name in (name for name in batch.columns if name.startswith(COLUMN) and self.is_text):
            checks.kinds.setdefault(name.removeprefix(COLUMN), TextKinds()).follow(batch[name])
        if any(checks.distinct.values()):
            whole = batch.select(pl.struct("user", "item", "time", "rest", "others").hash(seed=0)).to_series()
            for place, values in enumerate(checks.numbering.values()):
                values.add(batch[f"value {place}"], whole)
        for name in ("user", "item"):
            if not self.is_text:
                checks.integers[name] = checks.floats[name] = False
            elif batch.schema[name] == pl.String:
                _follow(batch[name], name, checks)
        return batch

    def require_good(self, checks: Checks) -> None:
        """
        Raises:
            DataError: invalid rows (number, first row, fix), an empty log, or no positive row.

        Warns:
            UserWarning: rows without values or items were left out (with their number); times in a type that is too narrow for them.
        """
        if not checks.rows:
            raise DataError(f"{self.files[0]}: the log has no rows. Check the path.")
        for (column, what), (count, first) in checks.bad.items():
            raise DataError(
                f"column {column!r}: {count:,} of {checks.rows:,} {what} (first: row {first}, {self._value(column, first)!r}, counting from 0 over "
                f"all files). {_FIXES[what]}"
            )
        if 0 < checks.dates < checks.rows:
            raise DataError(
                f"column {self.timestamp_column!r}: {checks.rows - checks.dates:,} of {checks.rows:,} timestamps are numbers and the others dates. "
                "Write all of them alike."
            )
        if checks.left_out:
            warnings.warn(
                f"{self.files[0]}: left out {checks.left_out:,} rows without values or items; {checks.rows:,} are read."
            )
        if self._narrow:
            warn_narrow(str(self.timestamp_column), self._narrow, checks.latest)
        if not checks.positive:
            seen = ", ".join(f"{name} at most {value:g}" for name, value in checks.highest.items()) or "other values"
            raise DataError(
                f"positive feedback: none of {checks.rows:,} rows has {self.positive} (found: {seen}). Change the rule."
            )

    def _value(self, column: str, row: int) -> Any:
        """A value of the log, for messages."""
        pl = import_polars()
        for part in self.scan():
            names = part.collect_schema().names()
            default = next((n for n in DEFAULTS if getattr(self, f"{n.removesuffix('_id')}_column") == column), column)
            found = part.filter(pl.col("__row__") == row).select(usual_column(names, column, default)).collect()
            if len(found):
                return found.item()
        return None


def _others(schema: pl.Schema, named: Sequence[str]) -> list[str]:
    """The columns beside those that are named: of feedback, say, but not the numbers of rows that pandas writes."""
    return [name for name in schema if name not in (*OWN, *named) and not ROW_NUMBERS.fullmatch(name)]


def _hash(columns: Iterable[pl.Expr]) -> pl.Expr:
    pl = import_polars()
    columns = list(columns)
    return pl.struct(columns).hash(seed=0) if columns else pl.lit(0, dtype=pl.UInt64)


def _follow(values: pl.Series, name: str, checks: Checks) -> None:
    """Whether ids that are text are canonical integers: "7", not "07" or "+7"; or all of them "7.0"."""
    pl = import_polars()
    for state, suffix in ((checks.integers, ""), (checks.floats, ".0")):
        if state[name]:
            digits = values.str.strip_suffix(suffix) if suffix else values
            parsed = digits.cast(pl.Int64, strict=False)
            same = (parsed.cast(pl.String) + suffix) == values
            state[name] = parsed.null_count() == values.null_count() and bool(same.all())


def one_item_per_row(frame: pl.LazyFrame, schema: pl.Schema, item: str) -> pl.LazyFrame:
    """A row per item of the lists in a column, with their `__place__`; other lists go with the items. Empty lists give a null item."""
    pl = import_polars()
    along = [name for name, kind in schema.items() if isinstance(kind, pl.List | pl.Array)]
    lists = [pl.col(name).arr.to_list() for name in along if isinstance(schema[name], pl.Array)]
    places = pl.int_ranges(pl.col(item).list.len()).alias("__place__")
    return frame.with_columns(lists).with_columns(places).explode([*along, "__place__"])
