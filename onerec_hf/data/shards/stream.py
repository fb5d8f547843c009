"""
Training examples streamed from many Parquet files: shuffled in every epoch, distributed over ranks and data loader workers, resumable in
the middle of an epoch.

`datasets` streams, shuffles and shards. This module adds an equal number of batches for every rank and worker, so that no rank waits at the
end of an epoch, and a cheap way to skip the batches that a resumed run has already trained on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

_CHUNK = 1000


class ExampleStream(torch.utils.data.IterableDataset):
    """
    A stream of examples from Parquet files, shuffled by (seed, epoch): shards in random order, rows through a shuffle buffer.

    It has a length, so `num_train_epochs` works. [`OneRecTrainer`] reads it through `batches`, each rank its part.

    Args:
        files: Parquet files with the trainer's columns, `history` and `session`.
        rows: number of examples per file (default: read from the files).
        seed: shuffle seed (default: the trainer's `data_seed` or `seed`).
        buffer_size: size of the shuffle buffer, per rank and worker.

    Raises:
        ValueError: no examples, or (while iterating) a reader without examples.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for shard in range(2):
        ...         rows = {"history": [[1], [2]], "session": [[10 * shard], [10 * shard + 1]]}
        ...         pq.write_table(pa.table(rows), f"{folder}/{shard}.parquet")
        ...     stream = ExampleStream([f"{folder}/{shard}.parquet" for shard in range(2)])
        ...     len(stream), sorted(example["session"][0] for example in stream)
        (4, [0, 1, 10, 11])
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        rows: Sequence[int] | None = None,
        seed: int | None = None,
        buffer_size: int = 10_000,
    ):
        counted = [pq.read_metadata(path).num_rows for path in files] if rows is None else rows
        # Empty files are skipped.
        self.files = [str(path) for path, count in zip(files, counted, strict=True) if count]
        self.rows = [count for count in counted if count]
        if not self.files:
            raise ValueError(f"a stream needs Parquet files with examples; got {len(files)} files without any")
        self.column_names = pq.read_schema(self.files[0]).names
        self.seed, self.buffer_size, self.epoch = seed, buffer_size, 0

    def __len__(self) -> int:
        return sum(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for table in self.tables(0, 1, self.epoch):
            yield from table.to_pylist()

    def tables(self, part: int, parts: int, epoch: int) -> Iterator[pa.Table]:
        """
        The examples of one epoch for one of `parts` equal readers, as Arrow tables of up to a thousand rows. Together the readers yield every
        example once.
        """
        from datasets import load_dataset
        from datasets.distributed import split_dataset_by_node

        data: Any = load_dataset(
            "parquet", data_files=self.files, split="train", streaming=True, columns=self.column_names
        )
        # One shard at a time: prepared shards are shuffled already, and reading several ends with a delay of five seconds
        # (datasets waits for pyarrow's threads).
        data = data.shuffle(seed=self.seed or 0, buffer_size=self.buffer_size, max_buffer_input_shards=1)
        data = split_dataset_by_node(data.with_format("arrow"), rank=part, world_size=parts)
        data.set_epoch(epoch)
        yield from data.iter(batch_size=_CHUNK)

    def batches(
        self, batch_size: int, collate: Callable[[list[dict[str, Any]]], Any], rank: int, world_size: int, workers: int
    ) -> BatchStream:
        """
        The batches of one rank, for a `DataLoader` with `batch_size=None` and `workers` workers.

        Warns:
            UserWarning: the number of files is not divisible by ranks x workers.
        """
        parts = world_size * max(workers, 1)
        if len(self.files) % parts and rank == 0:
            warnings.warn(
                f"{len(self.files)} training shards are not divisible by {world_size} rank{'s' * (world_size > 1)} x "
                f"{max(workers, 1)} data loader worker{'s' * (workers > 1)} = {parts} readers: each reads all shards and keeps one "
                f"example in {parts}. Prepare the log with --num_shards {-(-len(self.files) // parts) * parts}, or change the number of workers."
            )
        return BatchStream(self, batch_size, collate, rank, world_size, workers)

    def longest_part(self, parts: int) -> int:
        """The maximum number of examples of one of `parts` readers in an epoch."""
        if len(self.files) % parts:
            return -(-len(self) // parts)
        return sum(sorted(self.rows)[-(len(self.files) // parts) :])


class BatchStream(torch.utils.data.IterableDataset):
    """
    Collated batches of an [`ExampleStream`] for one rank, created by `ExampleStream.batches`. All ranks and workers have the same number of
    batches: a reader with fewer examples repeats its first ones.

    After `skip(n)` the next epoch begins with `n` empty batches `{}` instead of the first `n` real ones, which are neither read nor collated:
    a resumed trainer discards them anyway.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = {"history": [[1]] * 5, "session": [[0], [1], [2], [3], [4]]}
        ...     pq.write_table(pa.table(rows), f"{folder}/0.parquet")
        ...     batches = ExampleStream([f"{folder}/0.parquet"]).batches(2, len, rank=0, world_size=1, workers=0)
        ...     batches.skip(1)
        ...     len(batches), list(batches)
        (3, [{}, 2, 1])
    """

    def __init__(self, stream: ExampleStream, batch_size: int, collate, rank: int, world_size: int, workers: int):
        self.stream, self.batch_size, self.collate = stream, batch_size, collate
        self.rank, self.world_size, self.workers = rank, world_size, max(workers, 1)
        # Epoch and number of batches to skip, in shared memory so that persistent workers see changes.
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def _batches_per_reader(self) -> int:
        examples = self.stream.longest_part(self.world_size * self.workers)
        return -(-examples // self.batch_size)

    def __len__(self) -> int:
        return self._batches_per_reader * self.workers

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self._position[0] = epoch

    def skip(self, batches: int) -> None:
        """Starts the next iteration with this number of empty batches."""
        self._position[1] = batches

    def __iter__(self) -> Iterator[Any]:
        epoch, skip = self._position.tolist()
        worker = torch.utils.data.get_worker_info()
        number = 0 if worker is None else worker.id
        # Workers take turns, so each skips its share.
        skip = (skip - number + self.workers - 1) // self.workers
        yield from ({} for _ in range(skip))
        part = self.rank * self.workers + number
        examples = self._examples(part, epoch, skip * self.batch_size)
        for _ in range(skip, self._batches_per_reader):
            yield self.collate(list(islice(examples, self.batch_size)))

    def _examples(self, part: int, epoch: int, skip: int) -> Iterator[dict[str, Any]]:
        """As many examples as the longest reader has, minus the first `skip`."""
        parts = self.world_size * self.workers
        left = total = self.stream.longest_part(parts)
        while left:
            for table in self.stream.tables(part, parts, epoch):
                table = table.slice(0, left)
                left -= len(table)
                passed = min(skip, len(table))
                skip -= passed
                yield from table.slice(passed).to_pylist()
                if not left:
                    return
            if left == total:
                raise ValueError(
                    f"reader {part} of {parts} (ranks x data loader workers) has no examples: {len(self.stream):,} examples in "
                    f"{len(self.stream.files)} shards are too few. Prepare the log with fewer shards, or use fewer workers."
                )
