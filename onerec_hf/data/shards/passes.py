"""
The passes that turn a log into training examples, with memory that does not grow with the log.

Users are hashed into buckets. The first pass over the log writes each bucket's positive rows to a file, the second sorts each bucket and
counts its items, the third creates its examples. Memory holds one batch of the log, one bucket, and the interaction count of every item.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from onerec_hf.data.columns import DataError
from onerec_hf.data.duplicates import warn_hidden
from onerec_hf.data.feature_tables import about_features
from onerec_hf.data.shards.buckets import BucketExamples, ExampleSettings, tidy
from onerec_hf.data.shards.checks import Checks
from onerec_hf.data.shards.features import LogFeatures, typed
from onerec_hf.data.shards.logs import Log
from onerec_hf.data.shards.numbering import hidden_duplicates
from onerec_hf.data.shards.outputs import Writers
from onerec_hf.data.shards.scans import import_polars
from onerec_hf.data.splits import describe_leave_one_out
from onerec_hf.data.ties import Ties

if TYPE_CHECKING:
    import polars as pl

FEATURES_NAME = "features.json"
IPC = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclass
class Counts:
    """
    Row counts of each filter, in the order in which they apply.

    Args:
        rows: rows of the log.
        not_positive: rows dropped by the positive rule.
        repeated: exact duplicates dropped.
        rare_items: rows dropped because their item has fewer than `min_item_interactions` rows.
        kept, users, items: remaining rows, users and items.
        train, validation, test: number of examples.
        train_only_users: users with fewer than three items.
        tied: test targets that a tie in time decides.

    Example:
        >>> Counts(rows=10, kept=9).rare_items
        0
    """

    rows: int = 0
    not_positive: int = 0
    repeated: int = 0
    rare_items: int = 0
    kept: int = 0
    users: int = 0
    items: int = 0
    train: int = 0
    validation: int = 0
    test: int = 0
    train_only_users: int = 0
    tied: int = 0


@dataclass
class Run:
    """One run of `prepare_log`: three passes and their counts."""

    log: Log
    settings: ExampleSettings
    num_shards: int
    num_buckets: int
    seed: int
    features: LogFeatures | None = None
    counts: Counts = field(default_factory=Counts)
    shards: list[tuple[str, int]] = field(default_factory=list)
    id_types: tuple[str, str] = ("", "")
    ties: list[Ties] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        scratch = folder / "buckets"
        scratch.mkdir()
        checks = self._partition(scratch)
        items = self._order_and_count(scratch, checks)
        self._write_examples(scratch, folder, items)
        shutil.rmtree(scratch)

    def all_settings(self) -> dict[str, Any]:
        log = self.log
        return {
            "user_column": log.user_column,
            "item_column": log.item_column,
            "timestamp_column": log.timestamp_column,
            "column_names": None if log.column_names is None else list(log.column_names),
            "positive": dict(log.positive.any_of),
            **asdict(self.settings),
            "num_shards": self.num_shards,
            "num_buckets": self.num_buckets,
            "seed": self.seed,
            **({} if self.features is None else self.features.options()),
        }

    def protocol(self) -> str:
        settings, counts = self.settings, self.counts
        split = describe_leave_one_out(
            counts.test,
            counts.train_only_users,
            counts.train,
            settings.session_length,
            settings.max_history,
            settings.stride,
        )
        ties = str(Ties.sum(self.ties))
        features = (
            "" if self.features is None else about_features(self.features.schema, bool(self.features.everything))
        )
        return (
            f"Positive feedback: {self.log.positive}; items with fewer than {settings.min_item_interactions} positive interactions are "
            f"left out. {split}{ties and ' '}{ties}{features}"
        )

    def _partition(self, scratch: Path) -> Checks:
        """First pass: writes the positive rows, one file per bucket."""
        checks = Checks()
        writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        with contextlib.ExitStack() as open_files:
            for batch in self.log.batches(checks, buckets=self.num_buckets):
                for bucket, rows in by_bucket(batch):
                    if bucket not in writers:
                        sink = open_files.enter_context(pa.OSFile(str(scratch / f"{bucket}.raw"), "wb"))
                        writers[bucket] = open_files.enter_context(pa.ipc.new_stream(sink, rows.schema, options=IPC))
                    writers[bucket].write_table(rows)
        self.accept(checks)
        return checks

    def accept(self, checks: Checks) -> None:
        """Counts the rows of the log; raises as [`Log.require_good`]."""
        self.log.require_good(checks)
        self.counts.rows, self.counts.not_positive = checks.rows, checks.rows - checks.positive
        if self.features is not None and self.features.everything is None:
            self.features.everything = self.counts.not_positive > 0

    def _order_and_count(self, scratch: Path, checks: Checks) -> pl.DataFrame:
        """Second pass: sorts and deduplicates every bucket. Returns `item` and `interactions` of all items."""
        totals: list[pl.DataFrame] = []
        hidden = 0
        for bucket in range(self.num_buckets):
            path = scratch / f"{bucket}.raw"
            if not path.exists():
                continue
            rows = _read(path)
            path.unlink()
            ordered, repeated, more = self.ordered(rows, checks)
            self.counts.repeated += repeated
            hidden += more
            ordered.write_ipc(scratch / f"{bucket}.rows", compression="lz4")
            totals = added(totals, item_counts(positive_rows(ordered)))
        self.tell_hidden(hidden, checks)
        return summed(totals)

    def ordered(self, rows: pl.DataFrame, checks: Checks) -> tuple[pl.DataFrame, int, int]:
        """A bucket sorted and without duplicates, the number of its positive duplicates, and of those that a column hides."""
        pl = import_polars()
        ordered = tidy(rows, checks.as_integers)
        repeated = num_positive(rows) - num_positive(ordered)
        hidden = hidden_duplicates(rows, list(checks.distinct.values()))
        if self.features is not None:
            ordered = typed(ordered, checks.kinds)
            if self.log.timestamp_column in (None, "none"):  # places in the order of a user's rows
                ordered = ordered.with_columns(time=pl.int_range(pl.len()).over("user"))
        return ordered, repeated, hidden

    def tell_hidden(self, hidden: int, checks: Checks) -> None:
        """Warns of duplicates that columns hide."""
        warn_hidden(hidden, checks.positive, [name for name, apart in checks.distinct.items() if apart])

    def _write_examples(self, scratch: Path, folder: Path, items: pl.DataFrame) -> None:
        """Third pass: writes the examples."""
        frequent = self.frequent_items(items)
        if self.features is not None:
            self._learn(scratch, frequent)
        trained: list[pl.DataFrame] = []
        with Writers(folder, self.num_shards) as writers:
            for bucket in range(self.num_buckets):
                examples = self.examples(scratch / f"{bucket}.rows", frequent, bucket)
                (scratch / f"{bucket}.rows").unlink(missing_ok=True)
                if examples is None:
                    continue
                writers.write(examples, self.counts.train)
                self.count(bucket_counts(examples))
                trained = added(trained, train_counts(examples))
            self.check_examples()
        self.shards = list(zip(writers.names, writers.rows, strict=True))
        self.write_items(folder, frequent, summed(trained), writers.user_type)

    def frequent_items(self, items: pl.DataFrame) -> pl.DataFrame:
        """
        The items that are kept.

        Raises:
            DataError: none is.
        """
        pl, counts = import_polars(), self.counts
        frequent = items.filter(pl.col("interactions") >= self.settings.min_item_interactions)
        counts.kept, counts.items = int(frequent["interactions"].sum()), len(frequent)
        counts.rare_items = int(items["interactions"].sum()) - counts.kept
        if not counts.kept:
            raise DataError(
                f"min_item_interactions={self.settings.min_item_interactions}: none of {len(items):,} items has that many positive "
                f"interactions (at most {items['interactions'].max():,}). Lower it."
            )
        return frequent

    def examples(self, path: Path, frequent: pl.DataFrame, bucket: int) -> BucketExamples | None:
        """The examples of a bucket; None without positive rows of frequent items."""
        rows = self.frequent_rows(path, frequent)
        if rows is None:
            return None
        sequences = rows if self.features is None else self.features.coded(rows)
        return BucketExamples(sequences, self.settings, seed=[self.seed, bucket])

    def frequent_rows(self, path: Path, frequent: pl.DataFrame) -> pl.DataFrame | None:
        """A bucket's rows without rare items; None without a positive one."""
        pl = import_polars()
        if not path.exists():
            return None
        rows = pl.read_ipc(path)
        # Items that have no positive row are not counted.
        if self.settings.min_item_interactions > 1 or "positive" in rows.columns:
            rows = rows.join(frequent, on="item", how="semi", maintain_order="left")
        return rows if num_positive(rows) else None

    def count(self, found: dict[str, Any]) -> None:
        """Adds what [`bucket_counts`] found in a bucket."""
        counts = self.counts
        counts.users += found["users"]
        counts.train += found["train"]
        counts.test += found["test"]
        self.ties.append(Ties(**found["ties"]))

    def check_examples(self) -> None:
        """
        What is said of all examples.

        Raises:
            DataError: there are none of training or of test.

        Warns:
            UserWarning: ties in time decide test targets.
        """
        counts = self.counts
        counts.validation, counts.train_only_users = counts.test, counts.users - counts.test
        ties = Ties.sum(self.ties)
        counts.tied = ties.tied
        if ties.matter:
            warnings.warn(
                f"{ties} Sort the log by another column, or train from it with --interactions and --ties shuffle."
            )
        if not counts.test:
            raise DataError(
                f"leave-one-out: none of {counts.users:,} users has 3 items. Add data, or lower min_item_interactions."
            )
        if not counts.train:
            raise DataError(
                f"no training examples: none of {counts.users:,} users has two items left for training. Add data with longer sequences."
            )

    def write_items(self, folder: Path, frequent: pl.DataFrame, trained: pl.DataFrame, user_type: str) -> None:
        """Writes the table of items, with codes where they have features."""
        pl = import_polars()
        learned = trained.rename({"interactions": "train_interactions"})
        table = frequent.join(learned, on="item", how="left").with_columns(pl.col("train_interactions").fill_null(0))
        table = table.sort("item").rename({"item": "item_id"}).to_arrow(compat_level=pl.CompatLevel.oldest())
        if self.features is not None:
            table = self._with_features(table, folder)
        pq.write_table(table, folder / "items.parquet", compression="zstd")
        self.id_types = user_type, "int64" if frequent.schema["item"].is_integer() else "string"

    def _learn(self, scratch: Path, frequent: pl.DataFrame) -> None:
        """Between the second and the third pass: the schema, from training rows of every bucket."""
        assert self.features is not None
        users = 0
        for bucket in range(self.num_buckets):
            rows = self.frequent_rows(scratch / f"{bucket}.rows", frequent)
            if rows is not None:
                if not users:
                    self.start_features(rows, frequent)
                users += num_positive_users(rows)
                self.features.take(*self.features.training_rows(rows, self.counts.kept))
        self.features.learn(users)

    def start_features(self, rows: pl.DataFrame, frequent: pl.DataFrame) -> None:
        """Before the first bucket; raises a DataError where an item has no row."""
        assert self.features is not None
        self.features.start(rows)
        if self.features.items is not None:
            self.features.items.select(frequent["item"].to_list())

    def _with_features(self, items: pa.Table, folder: Path) -> pa.Table:
        """The table of items with their codes; the schema goes into the folder."""
        assert self.features is not None
        if self.features.schema is None:
            return items
        (folder / FEATURES_NAME).write_text(self.features.schema.to_json() + "\n", encoding="utf-8")
        codes = self.features.item_codes(column_ids(items["item_id"]))
        if codes is None:
            return items
        lists = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), codes.shape[1])
        return items.append_column("features", lists)


def column_ids(column: pa.ChunkedArray) -> np.ndarray:
    """Ids of an Arrow column: int64, or an object array of `str`."""
    if pa.types.is_integer(column.type):
        return column.to_numpy()
    return np.asarray(column.to_pandas(deduplicate_objects=True), dtype=object)


def num_positive(rows: pl.DataFrame) -> int:
    """Number of positive rows."""
    return int(rows["positive"].sum()) if "positive" in rows.columns else len(rows)


def positive_rows(rows: pl.DataFrame) -> pl.DataFrame:
    """The positive ones of a bucket's rows."""
    return rows.filter("positive") if "positive" in rows.columns else rows


def num_positive_users(rows: pl.DataFrame) -> int:
    """Number of users with positive rows."""
    return positive_rows(rows)["user"].n_unique()


def by_bucket(batch: pl.DataFrame) -> Iterator[tuple[int, pa.Table]]:
    """The rows of each bucket in a batch of a log."""
    ordered = batch.sort("bucket")
    runs = ordered["bucket"].rle().struct.unnest()
    table, start = ordered.drop("bucket").to_arrow(compat_level=import_polars().CompatLevel.oldest()), 0
    for length, bucket in runs.iter_rows():
        yield bucket, table.slice(start, length)
        start += length


def bucket_counts(examples: BucketExamples) -> dict[str, Any]:
    """What is counted of a bucket's examples."""
    return {
        "users": len(examples.sequences),
        "train": examples.num_train,
        "test": int(examples.held_out.sum()),
        "ties": asdict(Ties.of(examples.sequences)),
    }


def train_counts(examples: BucketExamples) -> pl.DataFrame:
    """Item counts of a bucket's training interactions."""
    return item_counts(import_polars().DataFrame({"item": examples.train_sequences.item_ids}))


def _read(path: Path) -> pl.DataFrame:
    with pa.OSFile(str(path), "rb") as file, pa.ipc.open_stream(file) as reader:
        frame: Any = import_polars().from_arrow(reader.read_all())
    return frame


def item_counts(rows: pl.DataFrame) -> pl.DataFrame:
    """`item` and `interactions` of rows."""
    pl = import_polars()
    return rows.group_by("item").agg(pl.len().cast(pl.Int64).alias("interactions"))


def added(parts: list[pl.DataFrame], counts: pl.DataFrame) -> list[pl.DataFrame]:
    """Adds item counts to `parts`, and sums the parts once they exceed four times the largest one."""
    parts = [*parts, counts]
    return [summed(parts)] if sum(map(len, parts)) > 4 * max(map(len, parts)) else parts


def summed(parts: list[pl.DataFrame]) -> pl.DataFrame:
    """Item counts of parts, added up."""
    pl = import_polars()
    return pl.concat(parts).group_by("item").agg(pl.col("interactions").sum())
