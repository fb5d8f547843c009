"""
Training examples streamed from many Parquet files, without loading them: shuffled anew every epoch, dealt out over ranks and data loader
workers, resumed in the middle of an epoch.

Reading, shuffling and dealing out are `datasets`' streaming. What is added: batches of the same number for every rank and worker, so that no
rank waits for another at the end of an epoch, and a cheap way to pass over the batches that a resumed run has trained on.
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
    The examples of some Parquet files, in a shuffled order that (seed, epoch) decides: shards in random order, and rows through a buffer.

    It has a length, so `num_train_epochs` works; [`OneRecTrainer`] makes batches of it, by `batches`, and knows which part a rank reads.

    Args:
        files: Parquet files with columns that the trainer reads, `history` and `session`.
        rows: how many examples each file has; read from the files when not given.
        seed: of the order; the trainer's (`data_seed` or `seed`) when None.
        buffer_size: examples that are mixed in memory, per rank and worker.

    Raises:
        ValueError: no examples, or (while iterating) a reader for whom there is no example.

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
        # An empty file is nobody's part.
        self.files = [str(path) for path, count in zip(files, counted, strict=True) if count]
        self.rows = [count for count in counted if count]
        if not self.files:
            raise ValueError(f"a stream needs Parquet files with examples; got {len(files)} without any")
        self.column_names = pq.read_schema(self.files[0]).names
        self.seed, self.buffer_size, self.epoch = seed, buffer_size, 0

    def __len__(self) -> int:
        return sum(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that epoch's."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for table in self.tables(0, 1, self.epoch):
            yield from table.to_pylist()

    def tables(self, part: int, parts: int, epoch: int) -> Iterator[pa.Table]:
        """
        An epoch's examples of one of `parts` equal readers, as Arrow tables of up to a thousand rows; with those of the others, every
        example once.
        """
        from datasets import load_dataset
        from datasets.distributed import split_dataset_by_node

        data: Any = load_dataset(
            "parquet", data_files=self.files, split="train", streaming=True, columns=self.column_names
        )
        # One shard after the other: prepared shards are mixed already, and reading several at a time ends with a pause of five seconds
        # (datasets waits for pyarrow's threads).
        data = data.shuffle(seed=self.seed or 0, buffer_size=self.buffer_size, max_buffer_input_shards=1)
        data = split_dataset_by_node(data.with_format("arrow"), rank=part, world_size=parts)
        data.set_epoch(epoch)
        yield from data.iter(batch_size=_CHUNK)

    def batches(
        self, batch_size: int, collate: Callable[[list[dict[str, Any]]], Any], rank: int, world_size: int, workers: int
    ) -> BatchStream:
        """
        The batches of one rank, for a `DataLoader` with `batch_size=None` and so many workers.

        Warns:
            UserWarning: the files do not divide over ranks and workers (with the numbers).
        """
        parts = world_size * max(workers, 1)
        if len(self.files) % parts and rank == 0:
            warnings.warn(
                f"{len(self.files)} training shards do not divide over {world_size} rank{'s' * (world_size > 1)} x "
                f"{max(workers, 1)} data loader worker{'s' * (workers > 1)} = {parts} readers: each reads all shards and keeps one "
                f"example in {parts}. Prepare the log with --num_shards {-(-len(self.files) // parts) * parts}, or change the workers."
            )
        return BatchStream(self, batch_size, collate, rank, world_size, workers)

    def longest_part(self, parts: int) -> int:
        """The most examples that one of `parts` readers may get in an epoch."""
        if len(self.files) % parts:
            return -(-len(self) // parts)
        return sum(sorted(self.rows)[-(len(self.files) // parts) :])


class BatchStream(torch.utils.data.IterableDataset):
    """
    One rank's batches of an [`ExampleStream`], collated; `ExampleStream.batches` makes it. All ranks and workers have the same number of
    batches: a reader with fewer examples goes on with its first ones.

    `skip(n)` makes the next epoch begin with `n` empty batches `{}` in place of as many real ones, which nobody then reads or collates: a
    trainer that resumes takes the first `n` batches and throws them away.

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
        # Epoch and batches to skip; workers that stay alive between epochs see them change.
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def _batches_of_a_reader(self) -> int:
        examples = self.stream.longest_part(self.world_size * self.workers)
        return -(-examples // self.batch_size)

    def __len__(self) -> int:
        return self._batches_of_a_reader * self.workers

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that epoch's."""
        self._position[0] = epoch

    def skip(self, batches: int) -> None:
        """The next iteration begins with so many empty batches."""
        self._position[1] = batches

    def __iter__(self) -> Iterator[Any]:
        epoch, skip = self._position.tolist()
        worker = torch.utils.data.get_worker_info()
        number = 0 if worker is None else worker.id
        # Workers take turns, so of the first batches each has made its share.
        skip = (skip - number + self.workers - 1) // self.workers
        yield from ({} for _ in range(skip))
        part = self.rank * self.workers + number
        examples = self._examples(part, epoch, skip * self.batch_size)
        for _ in range(skip, self._batches_of_a_reader):
            yield self.collate(list(islice(examples, self.batch_size)))

    def _examples(self, part: int, epoch: int, skip: int) -> Iterator[dict[str, Any]]:
        """As many examples as the longest reader has, without the first `skip`."""
        parts = self.world_size * self.workers
        left = whole = self.stream.longest_part(parts)
        while left:
            for table in self.stream.tables(part, parts, epoch):
                table = table.slice(0, left)
                left -= len(table)
                passed = min(skip, len(table))
                skip -= passed
                yield from table.slice(passed).to_pylist()
                if not left:
                    return
            if left == whole:
                raise ValueError(
                    f"reader {part} of {parts} (ranks x data loader workers) has no example: {len(self.stream):,} examples in "
                    f"{len(self.stream.files)} shards are too few for so many. Prepare the log with fewer shards, or use fewer workers."
                )
