"""
Preparing a log that does not fit in memory: rows per second and peak memory, beside the in-memory path on a log that fits.

The log is made up, shard by shard: a user per hundred rows, of very unequal activity; a million items by
Zipf's law; a day per shard. Nine of ten rows are positive. Each preparation runs in a separate process, whose peak is its VmHWM (it
starts no others). Windows have stride 5: every position is a target once.

- `prepare/...`: the whole log (200 million rows, or `--rows`), from Parquet shards to Parquet shards.
- `small/...`: the first rows of it (4 million), by `prepare` and by pandas: read, positive rows, rare items out, leave-one-out split. Pandas keeps
  the examples in memory; `prepare` writes them to disk.

`--log FOLDER` keeps the made-up log there, or takes the one that an earlier call kept.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/speed/prepare.py`

from benchmarks.harness import cpu_seconds, finish, parser, peak_gib, say
from onerec_hf.evaluation.results import result_row

SHARD_ROWS = 2_000_000
STRIDE = 5


def make_log(folder: Path, rows: int, num_items: int = 1_000_000) -> None:
    """Writes `rows` interactions, a shard at a time."""
    rng = np.random.default_rng(0)
    users = max(rows // 100, 1)
    share = np.cumsum(1 / np.arange(1, num_items + 1) ** 0.9)
    folder.mkdir(parents=True)
    for day, start in enumerate(range(0, rows, SHARD_ROWS)):
        size = min(SHARD_ROWS, rows - start)
        table = {
            "user_id": (users * rng.random(size) ** 1.5).astype(np.int64),
            "item_id": np.searchsorted(share, share[-1] * rng.random(size)),
            "timestamp": 1_700_000_000 + 86_400 * day + np.sort(rng.integers(0, 86_400, size)),
            "like": (rng.random(size) < 0.9).astype(np.int8),
        }
        pq.write_table(pa.table(table), folder / f"day-{day:04d}.parquet", compression="snappy")
    (folder / "_rows.json").write_text(json.dumps(rows))


def by_prepare(log: str, ready: str) -> None:
    from onerec_hf.data import PositiveFeedback
    from onerec_hf.data.shards.buckets import ExampleSettings
    from onerec_hf.data.shards.write import prepare_log

    prepare_log(log, ready, positive=PositiveFeedback({"like": 1}), settings=ExampleSettings(stride=STRIDE))


def by_pandas(log: str, ready: str) -> None:
    import pandas as pd

    from onerec_hf.data import PositiveFeedback, UserSequences, leave_one_out, read_interactions

    table = pd.concat([pd.read_parquet(path) for path in sorted(Path(log).glob("*.parquet"))], ignore_index=True)
    positive = PositiveFeedback({"like": 1}).apply(read_interactions(table))
    leave_one_out(UserSequences.from_interactions(positive).k_core(min_item=5), stride=STRIDE)


def measured(run, log: Path, ready: Path) -> dict[str, float]:
    """Wall and CPU seconds and peak GiB of a run in a new process."""
    with get_context("spawn").Pool(1) as pool:
        result = pool.apply(_timed, (run, str(log), str(ready)))
    return result


def _timed(run, log: str, ready: str) -> dict[str, float]:
    wall, cpu = time.perf_counter(), cpu_seconds()
    run(log, ready)
    return {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu, "peak": peak_gib()}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, help="rows of the log (200,000,000)")
    arguments.add_argument("--log", help="folder to keep the made-up log in, or that holds one")
    args = arguments.parse_args()
    rows = args.rows or (1_000_000 if args.quick else 200_000_000)
    scratch = Path(tempfile.mkdtemp(prefix="prepare-"))
    try:
        log = Path(args.log) if args.log else scratch / "log"
        if not log.exists():
            say(f"making {rows:,} rows up")
            make_log(log, rows)
        rows = json.loads((log / "_rows.json").read_text())
        small = scratch / "small"
        small.mkdir()
        for path in sorted(log.glob("*.parquet"))[:2]:
            os.symlink(path.absolute(), small / path.name)
        small_rows = sum(pq.read_metadata(path).num_rows for path in small.iterdir())

        say(f"preparing {rows:,} rows")
        whole = measured(by_prepare, log, scratch / "ready")
        manifest: dict[str, Any] = json.loads((scratch / "ready" / "prepared.json").read_text())
        size = sum(path.stat().st_size for path in (scratch / "ready").iterdir()) / 2**30
        shutil.rmtree(scratch / "ready")
        say(f"{small_rows:,} rows, by pandas and by prepare")
        pandas, again = measured(by_pandas, small, scratch / "none"), measured(by_prepare, small, scratch / "less")
    finally:
        shutil.rmtree(scratch)
    table = [
        result_row("prepare/rows", rows, "rows"),
        result_row("prepare/seconds", whole["wall"], "s"),
        result_row("prepare/cpu_seconds", whole["cpu"], "s"),
        result_row("prepare/rows_per_second", rows / whole["wall"], "rows/s"),
        result_row("prepare/peak", whole["peak"], "GiB"),
        result_row("prepare/examples", manifest["counts"]["train"], "examples"),
        result_row("prepare/output", size, "GiB"),
        result_row("small/rows", small_rows, "rows"),
        result_row("small/prepare_rows_per_second", small_rows / again["wall"], "rows/s"),
        result_row("small/pandas_rows_per_second", small_rows / pandas["wall"], "rows/s"),
        result_row("small/prepare_peak", again["peak"], "GiB"),
        result_row("small/pandas_peak", pandas["peak"], "GiB"),
        result_row("small/prepare_cpu_over_pandas", again["cpu"] / pandas["cpu"], "ratio", against="pandas"),
    ]
    import polars

    finish(table, args.json, counts=manifest["counts"], settings=manifest["settings"], polars=polars.__version__)


if __name__ == "__main__":
    main()
