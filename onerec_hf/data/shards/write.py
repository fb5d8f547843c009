"""
Converts raw logs of any size to a folder of sharded training examples, with memory that does not grow with the log.

Users are hashed into buckets. The first pass over the log writes each bucket's positive rows to a file, the second sorts each bucket and
counts its items, the third creates its examples. Memory holds one batch of the log, one bucket, and the interaction count of every item.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from onerec_hf.data.columns import DataError
from onerec_hf.data.compressed import table_name
from onerec_hf.data.duplicates import warn_hidden
from onerec_hf.data.feature_tables import about_features
from onerec_hf.data.positives import PositiveFeedback
from onerec_hf.data.shards.buckets import BucketExamples, ExampleSettings, tidy
from onerec_hf.data.shards.features import LogFeatures, typed
from onerec_hf.data.shards.logs import Checks, Log, find_log_files
from onerec_hf.data.shards.numbering import hidden_duplicates
from onerec_hf.data.shards.scans import import_polars
from onerec_hf.data.splits import describe_leave_one_out
from onerec_hf.data.ties import Ties

if TYPE_CHECKING:
    import polars as pl

MANIFEST_NAME, FEATURES_NAME = "prepared.json", "features.json"
FORMAT = 1
# One open file per bucket during the first pass; the usual limit is 1,024.
_MAX_BUCKETS = 512
# Minimum bytes per row of a text file. It overestimates the number of buckets, which is harmless.
_TEXT_ROW = 16
# How many times a compressed log expands.
_EXPANDS = 10
_IPC = pa.ipc.IpcWriteOptions(compression="lz4")


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


def prepare_log(
    source: str | Path,
    output_dir: str | Path,
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
    timestamp_column: str | None = "timestamp",
    column_names: Sequence[str] | None = None,
    positive: PositiveFeedback | None = None,
    settings: ExampleSettings | None = None,
    num_shards: int = 64,
    rows_per_bucket: int = 2_000_000,
    seed: int = 0,
    overwrite: bool = False,
    features: LogFeatures | None = None,
) -> dict[str, Any]:
    """
    Writes the examples of `leave_one_out` as Parquet. Training, validation and test examples equal those of the in-memory function.

    The folder contains `train-00000-of-000NN.parquet` (examples in random order, distributed evenly over the shards), `validation.parquet`,
    `test.parquet`, `sequences.parquet` (`user_id`, `items`: the training sequences), `items.parquet` (`item_id`, `interactions`,
    `train_interactions`) and `prepared.json`, the manifest. It is written under a temporary name and renamed when complete.

    Args:
        source: a file that `read_interactions` reads (not RecBole's), a folder, or a glob pattern. Files are read in the order of their names.
        output_dir: the folder to create.
        user_column, item_column, timestamp_column, column_names: as in `read_interactions`.
        positive: rule for positive rows (default: every row).
        settings: how sequences become examples.
        num_shards: number of training files. A multiple of ranks x data loader workers reads evenly.
        rows_per_bucket: approximate number of log rows in memory at a time. All rows of a user share one bucket.
        seed: seed of the order of the training examples.
        overwrite: replace a folder written by an earlier call.
        features: columns of users, items and interactions that models read; they are learned from training rows, as in memory. The schema is written
            to `features.json`, and `items.parquet` holds the items' codes (`features`).

    Returns:
        the manifest.

    Raises:
        DataError: unreadable files, invalid rows (with their number), or no rows remain.
        FileExistsError: `output_dir` is not empty, and `overwrite` is false or it is not a prepared folder.
        ImportError: polars is not installed (extra `prepare`).

    Warns:
        UserWarning: as `read_interactions` and `leave_one_out`: rows that are duplicates but for a column that differs in every row; ties in time that
            decide test targets of a log that is sorted by item.

    Example:
        >>> import os
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "log.csv")
        ...     with open(path, "w") as file:
        ...         _ = file.write("user_id,item_id,timestamp\\n" + "".join(f"{u},m{u + t},{t}\\n" for u in range(4) for t in range(5)))
        ...     manifest = prepare_log(path, f"{folder}/ready", settings=ExampleSettings(min_item_interactions=2), num_shards=2)
        ...     sorted(os.listdir(f"{folder}/ready"))[-3:], manifest["counts"]["rare_items"], manifest["counts"]["test"]
        (['train-00000-of-00002.parquet', 'train-00001-of-00002.parquet', 'validation.parquet'], 2, 4)
    """
    for name, value in (("num_shards", num_shards), ("rows_per_bucket", rows_per_bucket)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    check_output(output_dir, overwrite)
    positive, settings = positive or PositiveFeedback(), settings or ExampleSettings()
    log = Log(find_log_files(source), user_column, item_column, timestamp_column, positive, 0, column_names)
    if features is not None:
        log.features, log.everything = list(features.names.get("interaction") or ()), features.everything
    run = _Run(log, settings, num_shards, _number_of_buckets(log, rows_per_bucket), seed, features)
    with _new_folder(Path(output_dir)) as folder:
        run.write(folder)
        manifest = {
            "format": FORMAT,
            "source": [os.fspath(path) for path in log.files],
            "settings": run.all_settings(),
            "settings_sha256": hashlib.sha256(json.dumps(run.all_settings(), sort_keys=True).encode()).hexdigest(),
            "counts": asdict(run.counts),
            "ids": {"user": run.id_types[0], "item": run.id_types[1]},
            "train": [{"file": name, "rows": rows} for name, rows in run.shards],
            "protocol": run.protocol(),
        }
        if (schema := folder / FEATURES_NAME).is_file():
            manifest["features_sha256"] = hashlib.sha256(schema.read_bytes()).hexdigest()
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def check_output(folder: str | Path, overwrite: bool) -> None:
    """
    Raises:
        FileExistsError: the folder is not empty and must not be replaced.

    Example:
        >>> check_output("/tmp/nothing-is-here-yet", overwrite=False)
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or not (folder / MANIFEST_NAME).is_file():
        raise FileExistsError(f"{folder} exists and is not a prepared folder; choose another folder")
    if not overwrite:
        raise FileExistsError(f"{folder} exists; choose another folder, or pass --overwrite to replace it")


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`. It replaces `folder` if the block succeeds and is removed otherwise."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        earlier = temporary.with_name(f"{temporary.name}-earlier")
        if folder.exists():
            folder.rename(earlier)
        temporary.rename(folder)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _number_of_buckets(log: Log, rows_per_bucket: int) -> int:
    if log.files[0].suffix.lower() == ".parquet":
        try:
            rows = sum(pq.read_metadata(path).num_rows for path in log.files)
        except (pa.ArrowException, OSError):
            return 1  # reading the log raises the error with details
    else:
        sizes = (path.stat().st_size * (_EXPANDS if table_name(path).compression else 1) for path in log.files)
        rows = sum(sizes) // _TEXT_ROW
    return min(max(-(-rows // rows_per_bucket), 1), _MAX_BUCKETS)


@dataclass
class _Run:
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
        features = "" if self.features is None else about_features(self.features.schema, self.features.everything)
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
                ordered = batch.sort("bucket")
                runs = ordered["bucket"].rle().struct.unnest()
                table, start = ordered.drop("bucket").to_arrow(compat_level=import_polars().CompatLevel.oldest()), 0
                for length, bucket in runs.iter_rows():
                    if bucket not in writers:
                        sink = open_files.enter_context(pa.OSFile(str(scratch / f"{bucket}.raw"), "wb"))
                        writers[bucket] = open_files.enter_context(pa.ipc.new_stream(sink, table.schema, options=_IPC))
                    writers[bucket].write_table(table.slice(start, length))
                    start += length
        self.log.require_good(checks)
        self.counts.rows, self.counts.not_positive = checks.rows, checks.rows - checks.positive
        return checks

    def _order_and_count(self, scratch: Path, checks: Checks) -> pl.DataFrame:
        """Second pass: sorts and deduplicates every bucket. Returns `item` and `interactions` of all items."""
        pl = import_polars()
        totals: list[pl.DataFrame] = []
        hidden, distinct = 0, checks.distinct
        for bucket in range(self.num_buckets):
            path = scratch / f"{bucket}.raw"
            if not path.exists():
                continue
            rows = _read(path)
            ordered = tidy(rows, checks.as_integers)
            self.counts.repeated += _positives(rows) - _positives(ordered)
            hidden += hidden_duplicates(rows, list(distinct.values()))
            path.unlink()
            if self.features is not None:
                ordered = typed(ordered, checks.kinds)
                if self.log.timestamp_column in (None, "none"):  # places in the order of a user's rows
                    ordered = ordered.with_columns(time=pl.int_range(pl.len()).over("user"))
            ordered.write_ipc(scratch / f"{bucket}.rows", compression="lz4")
            totals = _counted(totals, ordered.filter("positive") if "positive" in ordered.columns else ordered)
        warn_hidden(hidden, checks.positive, [name for name, apart in distinct.items() if apart])
        return _summed(totals)

    def _write_examples(self, scratch: Path, folder: Path, items: pl.DataFrame) -> None:
        """Third pass: writes the examples."""
        pl, counts = import_polars(), self.counts
        frequent = items.filter(pl.col("interactions") >= self.settings.min_item_interactions)
        counts.kept, counts.items = int(frequent["interactions"].sum()), len(frequent)
        counts.rare_items = int(items["interactions"].sum()) - counts.kept
        if not counts.kept:
            raise DataError(
                f"min_item_interactions={self.settings.min_item_interactions}: none of {len(items):,} items has that many positive "
                f"interactions (at most {items['interactions'].max():,}). Lower it."
            )
        if self.features is not None:
            self._learn(scratch, frequent)
        trained: list[pl.DataFrame] = []
        with _Writers(folder, self.num_shards) as writers:
            for bucket in range(self.num_buckets):
                path = scratch / f"{bucket}.rows"
                if not path.exists():
                    continue
                rows = self._frequent(path, frequent)
                path.unlink()
                if not _positives(rows):
                    continue
                sequences = rows if self.features is None else self.features.coded(rows)
                examples = BucketExamples(sequences, self.settings, seed=[self.seed, bucket])
                writers.write(examples, counts.train)
                counts.users += len(examples.sequences)
                counts.train += examples.num_train
                counts.test += int(examples.held_out.sum())
                self.ties.append(Ties.of(examples.sequences))
                trained = _counted(trained, pl.DataFrame({"item": examples.train_sequences.item_ids}))
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
        learned = _summed(trained).rename({"interactions": "train_interactions"})
        table = frequent.join(learned, on="item", how="left").with_columns(pl.col("train_interactions").fill_null(0))
        table = table.sort("item").rename({"item": "item_id"}).to_arrow(compat_level=pl.CompatLevel.oldest())
        if self.features is not None:
            table = self._with_features(table, folder)
        pq.write_table(table, folder / "items.parquet", compression="zstd")
        self.shards = list(zip(writers.names, writers.rows, strict=True))
        self.id_types = writers.user_type, "int64" if frequent.schema["item"].is_integer() else "string"

    def _frequent(self, path: Path, frequent: pl.DataFrame) -> pl.DataFrame:
        """A bucket's rows without rare items."""
        pl = import_polars()
        rows = pl.read_ipc(path)
        # Items that have no positive row are not counted.
        few = self.settings.min_item_interactions > 1 or "positive" in rows.columns
        return rows.join(frequent, on="item", how="semi", maintain_order="left") if few else rows

    def _learn(self, scratch: Path, frequent: pl.DataFrame) -> None:
        """Between the second and the third pass: the schema, from training rows of every bucket."""
        assert self.features is not None
        users = 0
        for bucket in range(self.num_buckets):
            path = scratch / f"{bucket}.rows"
            rows = self._frequent(path, frequent) if path.exists() else None
            if rows is not None and _positives(rows):
                if not users:
                    self.features.match_ids(rows)
                    if self.features.items is not None:  # raises where an item has no row
                        self.features.items.select(frequent["item"].to_list())
                users += rows.filter("positive")["user"].n_unique()
                self.features.read(rows, self.counts.kept)
        self.features.learn(users)

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


def _positives(rows: pl.DataFrame) -> int:
    return int(rows["positive"].sum()) if "positive" in rows.columns else len(rows)


def _read(path: Path) -> pl.DataFrame:
    with pa.OSFile(str(path), "rb") as file, pa.ipc.open_stream(file) as reader:
        frame: Any = import_polars().from_arrow(reader.read_all())
    return frame


def _counted(parts: list[pl.DataFrame], rows: pl.DataFrame) -> list[pl.DataFrame]:
    """Adds the item counts of `rows` to `parts`, and sums the parts once they exceed four times the largest one."""
    pl = import_polars()
    parts = [*parts, rows.group_by("item").agg(pl.len().cast(pl.Int64).alias("interactions"))]
    return [_summed(parts)] if sum(map(len, parts)) > 4 * max(map(len, parts)) else parts


def _summed(parts: list[pl.DataFrame]) -> pl.DataFrame:
    pl = import_polars()
    return pl.concat(parts).group_by("item").agg(pl.col("interactions").sum())


class _Writers:
    """Open Parquet writers of the folder. Training examples are distributed round-robin over the shards."""

    def __init__(self, folder: Path, num_shards: int):
        self.folder = folder
        self.names = [f"train-{shard:05d}-of-{num_shards:05d}.parquet" for shard in range(num_shards)]
        self.rows = [0] * num_shards
        self.user_type = ""
        self._files: dict[str, pq.ParquetWriter] = {}

    def __enter__(self) -> _Writers:
        self._threads = ThreadPoolExecutor(os.cpu_count())
        return self

    def __exit__(self, *error) -> None:
        self._threads.shutdown()
        for file in self._files.values():
            file.close()

    def write(self, examples: BucketExamples, before: int) -> None:
        """Appends a bucket to every file; `before` is the number of training examples written so far."""
        shards = len(self.names)

        def write_shard(shard: int) -> None:
            table = examples.train(slice((shard - before) % shards, None, shards))
            self.rows[shard] += table.num_rows
            self._append(self.names[shard], table)

        others = {
            "validation.parquet": examples.validation,
            "test.parquet": examples.test,
            "sequences.parquet": examples.train_items,
        }
        futures = [self._threads.submit(write_shard, shard) for shard in range(shards)]
        futures += [self._threads.submit(lambda n, m: self._append(n, m()), *part) for part in others.items()]
        for future in futures:
            future.result()
        self.user_type = str(pa.array(examples.sequences.user_ids[:1]).type)

    def _append(self, name: str, table: pa.Table) -> None:
        if name not in self._files:
            self._files[name] = pq.ParquetWriter(self.folder / name, table.schema, **_parquet_options(table.schema))
        self._files[name].write_table(table)


def _parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """
    Parquet options: byte stream split for integers, which takes 0.6 of the space and 0.3 of the time of a dictionary with many items.
    """
    leaves: dict[str, pa.DataType] = {}
    for name, kind in zip(schema.names, schema.types, strict=True):
        path: str = name
        while pa.types.is_list(kind):
            path, kind = f"{path}.list.element", kind.value_type
        leaves[path] = kind
    numbers = [path for path, kind in leaves.items() if pa.types.is_integer(kind)]
    return {
        "compression": "zstd",
        "compression_level": 1,
        "write_statistics": False,
        "use_byte_stream_split": numbers,
        "use_dictionary": [path for path in leaves if path not in numbers],
    }
