"""
The passes of `prepare` on a Ray cluster: a task per file of the log, per bucket of users and per file of the result.

Tasks hand their rows on in files of a folder that all machines see, so that no pass needs more memory than one bucket, and Ray's object store holds
settings only. A task has ended when its JSON file is there. Ray runs the tasks of a worker that died again, and a run that is started again goes on
with the tasks that have not ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from onerec_hf.data.shards.checks import Checks
from onerec_hf.data.shards.folders import new_file
from onerec_hf.data.shards.logs import Log
from onerec_hf.data.shards.outputs import OTHERS, new_parquet, others_of, residue, shard_names, user_type
from onerec_hf.data.shards.passes import (
    IPC,
    Run,
    added,
    bucket_counts,
    by_bucket,
    item_counts,
    num_positive_users,
    positive_rows,
    summed,
    train_counts,
)
from onerec_hf.data.shards.scans import import_polars, unreadable

if TYPE_CHECKING:
    import polars as pl

# How often Ray starts a task again whose worker died.
_RETRIES = 3
# Each bucket is read from as many files.
_MOST_PARTS = 512
# A task has one CPU of the cluster.
_ENVIRONMENT = {"env_vars": {"POLARS_MAX_THREADS": "1"}}


def import_ray():
    """
    Imports Ray (extra `ray`).

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ImportError(
            '--engine ray needs Ray, which is not installed. Run: pip install "onerec-hf[ray]"'
        ) from None
    return ray


@dataclass
class RayRun(Run):
    """
    One run of `prepare_log` on the cluster that `ray.init` finds; it starts Ray on this machine where there is none.

    Args:
        parts: the files of each task of the first pass.
        index: by part, the buckets of its record batches.
        checks: what the first pass found.
        cuts: by bucket, what the third pass found, and the number of training examples `before` it.
    """

    parts: list[Log] = field(default_factory=list)
    index: list[list[int]] = field(default_factory=list)
    checks: Checks = field(default_factory=Checks)
    cuts: dict[int, dict[str, Any]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        scratch, ended = folder / "buckets", folder / "buckets-ended"
        if ended.exists():  # of a run that was killed while it removed them
            shutil.rmtree(ended)
        with _ray():
            scratch.mkdir(exist_ok=True)
            # Workers have other working directories.
            self.log = replace(self.log, files=[path.absolute() for path in self.log.files]).fixed()
            self.parts = self._parts(scratch)
            buckets = self._partition_all(scratch)
            frequent = self._order_all(scratch, buckets)
            if self.features is not None:
                self._learn(scratch, frequent)
            self._cut_all(scratch, buckets)
            names = [*shard_names(self.num_shards), *OTHERS]
            files = self._each(scratch, "file", _join, range(len(names)))
        self.shards = [(name, found["rows"]) for name, found in zip(names, files, strict=True) if name not in OTHERS]
        trained = self._items(scratch / f"{bucket}.trained" for bucket in self.cuts)
        self.write_items(folder, frequent, trained, next(iter(self.cuts.values()))["user_type"])
        scratch.rename(ended)  # whole or not there: what says that tasks have ended goes with what they wrote
        shutil.rmtree(ended)

    def _parts(self, scratch: Path) -> list[Log]:
        """The log in parts of whole files, with the number of the first row of each."""
        files = self.log.files
        if self.log.files[0].suffix.lower() == ".parquet":
            sizes = [_rows(path) for path in files]
        else:
            self.parts = [replace(self.log, files=[path]) for path in files]
            sizes = [found["rows"] for found in self._each(scratch, "rows", _count, range(len(files)))]
        starts = np.cumsum([0, *sizes])
        groups = np.array_split(np.arange(len(files)), min(len(files), _MOST_PARTS))
        return [
            replace(self.log, files=[files[place] for place in group], first_row=int(starts[group[0]]))
            for group in groups
        ]

    def _partition_all(self, scratch: Path) -> list[int]:
        """First pass; returns the buckets that hold rows."""
        found = self._each(scratch, "part", _partition, range(len(self.parts)))
        for number, each in enumerate(found):
            self.checks.merge(Checks.load(scratch / f"part-{number}", each["checks"]))
        self.accept(self.checks)
        self.index = [each["buckets"] for each in found]
        return sorted(set().union(*self.index))

    def _order_all(self, scratch: Path, buckets: Sequence[int]) -> pl.DataFrame:
        """Second pass; returns the items that are kept."""
        found = self._each(scratch, "order", _order, buckets)
        self.counts.repeated = sum(each["repeated"] for each in found)
        self.tell_hidden(sum(each["hidden"] for each in found), self.checks)
        frequent = self.frequent_items(self._items(scratch / f"{bucket}.items" for bucket in buckets))
        with new_file(scratch / "frequent") as path:
            frequent.write_ipc(path)
        for number in range(len(self.parts)):
            (scratch / f"part-{number}" / "rows").unlink(missing_ok=True)
        return frequent

    def _learn(self, scratch: Path, frequent: pl.DataFrame) -> None:
        assert self.features is not None
        paths = ((bucket, scratch / f"{bucket}.rows") for bucket in range(self.num_buckets))
        full = ((bucket, self.frequent_rows(path, frequent)) for bucket, path in paths)
        first, rows = next((bucket, rows) for bucket, rows in full if rows is not None)
        self.start_features(rows, frequent)
        users = 0
        for training, lacking, more in self._tasks(scratch, "learn", _training_rows, range(first, self.num_buckets)):
            if training is not None:
                self.features.take(training, lacking)
                users += more
        self.features.learn(users)

    def _cut_all(self, scratch: Path, buckets: Sequence[int]) -> None:
        """Third pass: the examples of every bucket."""
        for bucket, found in zip(buckets, self._each(scratch, "cut", _cut, buckets), strict=True):
            if found:
                self.cuts[bucket] = found | {"before": self.counts.train}
                self.count(found)
        self.check_examples()

    def _items(self, paths: Iterable[Path]) -> pl.DataFrame:
        """Item counts of buckets, added up."""
        totals: list[pl.DataFrame] = []
        for path in paths:
            totals = added(totals, import_polars().read_ipc(path))
        return summed(totals)

    def _each(
        self, scratch: Path, stage: str, function: Callable[..., dict], numbers: Sequence[int]
    ) -> list[dict[str, Any]]:
        """What a task of each number found, those that ended in an earlier run not run again."""
        paths = [scratch / f"{stage}-{number}.json" for number in numbers]
        left = [number for number, path in zip(numbers, paths, strict=True) if not path.exists()]
        for _ in self._tasks(scratch, stage, _noted, left, function, stage):
            pass
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def _tasks(
        self, scratch: Path, stage: str, function: Callable, numbers: Sequence[int], *args: Any
    ) -> Iterator[Any]:
        """
        Runs a function for each number on the cluster; yields the results in order.

        Raises:
            RuntimeError: its workers died again and again; else what the function raised.
        """
        ray: Any = import_ray()
        remote = ray.remote(max_retries=_RETRIES, num_cpus=1, runtime_env=_ENVIRONMENT)(_on_worker)
        run, version = ray.put(self), import_polars().__version__
        tasks = [
            remote.options(name=f"prepare-{stage}-{number}").remote(version, function, run, scratch, number, *args)
            for number in numbers
        ]
        waiting = tasks
        try:
            while waiting:  # in any order, so that what fails is heard of at once
                [done], waiting = ray.wait(waiting, num_returns=1)
                ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise RuntimeError(
                f"--engine ray: the workers of a task ({stage}) died {_RETRIES + 1} times: {str(error).splitlines()[0]} Lower --rows_per_bucket if they "
                "lacked memory, and run the command again: it resumes."
            ) from error
        finally:
            for task in waiting:
                ray.cancel(task)
        for task in tasks:
            yield ray.get(task)


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """Ray, for as long as the block lasts where it was not there before."""
    ray = import_ray()
    ours = not ray.is_initialized()
    if ours:
        ray.init(logging_level=logging.WARNING)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _on_worker(version: str, function: Callable, run: RayRun, scratch: Path, *args: Any) -> Any:
    """Runs a function on a worker that sees the folder, and hashes users as the others do."""
    if not scratch.is_dir():
        raise FileNotFoundError(
            f"{scratch.parent}: not there on {socket.gethostname()}. Pass an --output_dir that all machines of the cluster share."
        )
    if (mine := import_polars().__version__) != version:
        raise RuntimeError(
            f"polars {mine} on {socket.gethostname()}, {version} where the command runs: install one version"
        )
    return function(run, scratch, *args)


def _noted(run: RayRun, scratch: Path, number: int, function: Callable[..., dict], stage: str) -> None:
    """Runs a function and writes what it found to the file that says that it has ended."""
    found = function(run, scratch, number)
    with new_file(scratch / f"{stage}-{number}.json") as path:
        path.write_text(json.dumps(found), encoding="utf-8")


def _count(run: RayRun, scratch: Path, number: int) -> dict[str, Any]:
    """The rows of a part."""
    return {"rows": run.parts[number].count_rows()}


def _partition(run: RayRun, scratch: Path, number: int) -> dict[str, Any]:
    """First pass over a part: its positive rows in record batches of one bucket each."""
    checks = Checks()
    folder = scratch / f"part-{number}"
    folder.mkdir(exist_ok=True)
    with new_file(folder / "rows") as path:
        batches = run.parts[number].batches(checks, buckets=run.num_buckets)
        pieces = ((bucket, rows) for batch in batches for bucket, rows in by_bucket(batch))
        buckets = _write(path, pieces)
    return {"buckets": buckets, "checks": checks.save(folder)}


def _order(run: RayRun, scratch: Path, bucket: int) -> dict[str, Any]:
    """Second pass over a bucket."""
    tables = [
        _read(scratch / f"part-{number}" / "rows", places)
        for number, index in enumerate(run.index)
        if (places := [place for place, of in enumerate(index) if of == bucket])
    ]
    rows: Any = import_polars().from_arrow(pa.concat_tables(tables))
    ordered, repeated, hidden = run.ordered(rows, run.checks)
    for name, frame in (("rows", ordered), ("items", item_counts(positive_rows(ordered)))):
        with new_file(scratch / f"{bucket}.{name}") as path:
            frame.write_ipc(path, compression="lz4")
    return {"repeated": repeated, "hidden": hidden}


def _training_rows(run: RayRun, scratch: Path, bucket: int) -> tuple[Any, int, int]:
    """The rows of a bucket that a schema is learned from, the users without a row, and all users."""
    assert run.features is not None
    rows = run.frequent_rows(scratch / f"{bucket}.rows", _frequent(scratch))
    if rows is None:
        return None, 0, 0
    return *run.features.training_rows(rows, run.counts.kept), num_positive_users(rows)


def _cut(run: RayRun, scratch: Path, bucket: int) -> dict[str, Any]:
    """Third pass over a bucket: its training examples by the shard that they go to, and the others."""
    examples = run.examples(scratch / f"{bucket}.rows", _frequent(scratch), bucket)
    if examples is None:
        return {}
    shards = run.num_shards
    tables: list[tuple[str, Any]] = [
        ("train", ((place, examples.train(slice(place, None, shards))) for place in range(shards)))
    ]
    tables += [(name, [(0, make())]) for name, make in others_of(examples)]
    index = {}
    for name, pieces in tables:
        with new_file(scratch / f"{bucket}.{name}") as path:
            index[name] = _write(path, pieces)
    with new_file(scratch / f"{bucket}.trained") as path:
        train_counts(examples).write_ipc(path)
    return bucket_counts(examples) | {"index": index["train"], "user_type": user_type(examples)}


def _join(run: RayRun, scratch: Path, number: int) -> dict[str, Any]:
    """Fourth pass, over the files of the folder: the examples of all buckets."""
    shards, rows = run.num_shards, 0
    name = [*shard_names(shards), *OTHERS][number]
    # What a killed worker leaves must not be part of the result.
    with new_file(scratch.parent / name, scratch) as path, contextlib.ExitStack() as opened:
        writer: Any = None
        for bucket, cut in run.cuts.items():
            if number < shards:
                mine = residue(number, cut["before"], shards)
                table = _read(
                    scratch / f"{bucket}.train", [place for place, of in enumerate(cut["index"]) if of == mine]
                )
            else:
                table = _read(scratch / f"{bucket}.{name}")
            if writer is None:
                writer = opened.enter_context(new_parquet(path, table.schema))
            writer.write_table(table)
            rows += table.num_rows
        opened.close()
    return {"rows": rows}


def _rows(path: Path) -> int:
    try:
        return pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise unreadable([path], error) from error


def _frequent(scratch: Path) -> pl.DataFrame:
    return import_polars().read_ipc(scratch / "frequent")


def _write(path: Path, pieces: Iterable[tuple[int, pa.Table]]) -> list[int]:
    """Writes numbered tables of one schema to an Arrow file; returns the number of each record batch."""
    numbers: list[int] = []
    with contextlib.ExitStack() as opened:
        sink, writer = opened.enter_context(pa.OSFile(str(path), "wb")), None
        for number, table in pieces:
            if writer is None:
                writer = opened.enter_context(pa.ipc.new_file(sink, table.schema, options=IPC))
            for batch in table.combine_chunks().to_batches():
                writer.write_batch(batch)
                numbers.append(number)
    return numbers


def _read(path: Path, places: Sequence[int] | None = None) -> pa.Table:
    """Record batches of an Arrow file."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
        chosen = range(file.num_record_batches) if places is None else places
        return pa.Table.from_batches([file.get_batch(place) for place in chosen], file.schema)
