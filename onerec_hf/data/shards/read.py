"""A prepared folder read back: its manifest, the stream of its training examples, its held-out examples and sequences."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from onerec_hf.data.columns import DataError
from onerec_hf.data.sequences import UserSequences
from onerec_hf.data.shards.write import FORMAT, MANIFEST_NAME

if TYPE_CHECKING:
    import datasets

    from onerec_hf.data.shards.stream import ExampleStream


class PreparedFolder:
    """
    What `onerec-hf prepare` wrote.

    Args:
        path: the folder.

    Attributes:
        manifest: its `prepared.json`.

    Raises:
        DataError: it is no prepared folder, one of another format, or files of it are missing or cut short.

    Example:
        >>> PreparedFolder("/tmp")
        Traceback (most recent call last):
        ...
        onerec_hf.data.columns.DataError: /tmp: no prepared.json; name a folder that `onerec-hf prepare` wrote.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            manifest: Any = json.loads((self.path / MANIFEST_NAME).read_text())
        except FileNotFoundError:
            raise DataError(f"{path}: no {MANIFEST_NAME}; name a folder that `onerec-hf prepare` wrote.") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: {MANIFEST_NAME} cannot be read: {error}") from error
        try:
            if manifest["format"] != FORMAT:
                raise DataError(
                    f"{path}: of format {manifest['format']}, and this version reads {FORMAT}; prepare the log again."
                )
            self.train_files = [(str(shard["file"]), int(shard["rows"])) for shard in manifest["train"]]
            self.settings: dict[str, Any] = dict(manifest["settings"])
            self.counts: dict[str, int] = {name: int(count) for name, count in manifest["counts"].items()}
            self.protocol = str(manifest["protocol"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: {MANIFEST_NAME} is damaged ({error!r}); prepare the log again.") from error
        self.manifest = manifest
        held_out = [("validation.parquet", self.counts["validation"]), ("test.parquet", self.counts["test"])]
        for name, rows in [*self.train_files, *held_out]:
            self._require(name, rows)

    def _require(self, name: str, rows: int) -> None:
        cure = "copy the whole folder again, or prepare the log again"
        try:
            found = pq.read_metadata(self.path / name).num_rows
        except FileNotFoundError:
            raise DataError(f"{self.path}: {name} is missing; {cure}.") from None
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: {name} is damaged ({error}); {cure}.") from error
        if found != rows:
            raise DataError(f"{self.path}: {name} has {found:,} rows, not {rows:,}; {cure}.")

    def train(self, seed: int | None = None, buffer_size: int = 10_000) -> ExampleStream:
        """The training examples as a stream; see [`ExampleStream`]."""
        from onerec_hf.data.shards.stream import ExampleStream

        files = [self.path / name for name, _ in self.train_files]
        return ExampleStream(files, [rows for _, rows in self.train_files], seed=seed, buffer_size=buffer_size)

    def held_out(self, split: str, limit: int | None = None) -> datasets.Dataset:
        """
        Validation or test examples in memory.

        Args:
            split: "validation" or "test".
            limit: at most so many; users stand in an order that has nothing to do with what they did, so these are a sample.
        """
        from datasets import Dataset

        file = pq.ParquetFile(self.path / f"{split}.parquet")
        rows = file.metadata.num_rows if limit is None else min(limit, file.metadata.num_rows)
        batches, read = [], 0
        for batch in file.iter_batches(batch_size=10_000):
            batches.append(batch.slice(0, rows - read))
            read += len(batches[-1])
            if read == rows:
                break
        return Dataset(pa.Table.from_batches(batches, schema=file.schema_arrow))

    @cached_property
    def item_ids(self) -> np.ndarray:
        """(items,) int64 or object array of `str`, sorted."""
        return _ids(pq.read_table(self.path / "items.parquet", columns=["item_id"])["item_id"])

    @cached_property
    def train_sequences(self) -> UserSequences:
        """What may be learned from, all of it in memory: users in the order of the buckets, without times."""
        table = pq.read_table(self.path / "sequences.parquet")
        lengths = pc.call_function("list_value_length", [table["items"]]).to_numpy()
        items = _ids(pc.call_function("list_flatten", [table["items"]]))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return UserSequences(_ids(table["user_id"]), items, np.zeros(len(items), dtype=np.int64), offsets)


def _ids(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_integer(column.type):
        return column.to_numpy()
    return np.asarray(column.to_pandas(deduplicate_objects=True), dtype=object)
