"""Converts raw logs of any size to a folder of sharded training examples, on this machine or on the workers of a Ray cluster."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from onerec_hf import __version__
from onerec_hf.data.compressed import table_name
from onerec_hf.data.positives import PositiveFeedback
from onerec_hf.data.shards.buckets import ExampleSettings
from onerec_hf.data.shards.cluster import RayRun, import_ray
from onerec_hf.data.shards.features import LogFeatures
from onerec_hf.data.shards.folders import kept_folder, new_folder
from onerec_hf.data.shards.logs import Log, find_log_files
from onerec_hf.data.shards.passes import FEATURES_NAME, Run
from onerec_hf.data.shards.scans import import_polars

MANIFEST_NAME = "prepared.json"
FORMAT = 1
ENGINES = ("polars", "ray")
# One open file per bucket during the first pass; the usual limit is 1,024.
_MAX_BUCKETS = 512
# Minimum bytes per row of a text file. It overestimates the number of buckets, which is harmless.
_TEXT_ROW = 16
# How many times a compressed log expands.
_EXPANDS = 10


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
    engine: str = "polars",
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
        engine: "polars" on this machine, or "ray": the workers of a Ray cluster that share the files of the log and `output_dir` write the same files. A
            run of it that was killed is resumed by the next call with the same arguments.

    Returns:
        the manifest.

    Raises:
        DataError: unreadable files, invalid rows (with their number), or no rows remain.
        FileExistsError: `output_dir` is not empty, and `overwrite` is false or it is not a prepared folder.
        ImportError: polars is not installed (extra `prepare`), or Ray for its engine (extra `ray`).
        RuntimeError: workers of the cluster die again and again; another run prepares the same folder.

    Warns:
        UserWarning: as `read_interactions` and `leave_one_out`: rows that are duplicates but for a column that differs in every row; ties in time that
            decide test targets of a log that is sorted by item.

    Example:
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "log.csv")
        ...     with open(path, "w") as file:
        ...         _ = file.write("user_id,item_id,timestamp\\n" + "".join(f"{u},m{u + t},{t}\\n" for u in range(4) for t in range(5)))
        ...     manifest = prepare_log(path, f"{folder}/ready", settings=ExampleSettings(min_item_interactions=2), num_shards=2)
        ...     sorted(os.listdir(f"{folder}/ready"))[-3:], manifest["counts"]["rare_items"], manifest["counts"]["test"]
        (['train-00000-of-00002.parquet', 'train-00001-of-00002.parquet', 'validation.parquet'], 2, 4)
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; choose polars or ray")
    for name, value in (("num_shards", num_shards), ("rows_per_bucket", rows_per_bucket)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    check_output(output_dir, overwrite)
    positive, settings = positive or PositiveFeedback(), settings or ExampleSettings()
    log = Log(find_log_files(source), user_column, item_column, timestamp_column, positive, 0, column_names)
    if features is not None:
        log.features, log.everything = list(features.names.get("interaction") or ()), features.everything is not False
    parts = (log, settings, num_shards, _number_of_buckets(log, rows_per_bucket), seed, features)
    if engine == "ray":
        import_ray()
        run: Run = RayRun(*parts)
        where = kept_folder(Path(output_dir), _fingerprint(run))
    else:
        run, where = Run(*parts), new_folder(Path(output_dir))
    with where as folder:
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


def _fingerprint(run: Run) -> str:
    """A hash of the settings, of the states of the files that are read, and of the versions: polars hashes users to buckets, each version its own way."""
    files = [(os.fspath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in run.log.files]
    versions = [__version__, import_polars().__version__]
    digest = hashlib.sha256(json.dumps([run.all_settings(), files, versions], sort_keys=True).encode())
    if run.features is not None:
        names = {side: list(columns) for side, columns in run.features.names.items()}
        digest.update(json.dumps(names, sort_keys=True).encode())
        for table in (run.features.users, run.features.items):
            if table is not None:
                digest.update(str(table.frame.to_json(default_handler=str)).encode())
    return digest.hexdigest()[:12]


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
