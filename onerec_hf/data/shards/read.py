"""Reads a prepared folder: manifest, stream of training examples, held-out examples and sequences."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from onerec_hf.data.columns import DataError
from onerec_hf.data.feature_tables import DatasetFeatures
from onerec_hf.data.sequences import UserSequences
from onerec_hf.data.shards.passes import FEATURES_NAME, column_ids
from onerec_hf.data.shards.write import FORMAT, MANIFEST_NAME
from onerec_hf.modeling.features import FeatureSchema

if TYPE_CHECKING:
    import datasets

    from onerec_hf.data.shards.stream import ExampleStream


class PreparedFolder:
    """
    A folder written by `onerec-hf prepare`.

    Args:
        path: the folder.

    Attributes:
        manifest: the content of `prepared.json`.

    Raises:
        DataError: not a prepared folder, an unsupported format, or missing or truncated files.

    Example:
        >>> PreparedFolder("/tmp")
        Traceback (most recent call last):
        ...
        onerec_hf.data.columns.DataError: /tmp: prepared.json is missing. Pass a folder written by `onerec-hf prepare`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            manifest: Any = json.loads((self.path / MANIFEST_NAME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{path}: {MANIFEST_NAME} is missing. Pass a folder written by `onerec-hf prepare`."
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: {MANIFEST_NAME} cannot be read ({error}). Prepare the log again.") from error
        try:
            if manifest["format"] != FORMAT:
                raise DataError(
                    f"{path}: format {manifest['format']} is not supported by this version (it reads {FORMAT}). Prepare the log again."
                )
            self.train_files = [(str(shard["file"]), int(shard["rows"])) for shard in manifest["train"]]
            self.settings: dict[str, Any] = dict(manifest["settings"])
            self.counts: dict[str, int] = {name: int(count) for name, count in manifest["counts"].items()}
            self.protocol = str(manifest["protocol"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: {MANIFEST_NAME} is damaged ({error!r}). Prepare the log again.") from error
        self.manifest = manifest
        held_out = [("validation.parquet", self.counts["validation"]), ("test.parquet", self.counts["test"])]
        for name, rows in [*self.train_files, *held_out]:
            self._require(name, rows)

    def _require(self, name: str, rows: int) -> None:
        fix = "Copy the whole folder again, or prepare the log again"
        try:
            found = pq.read_metadata(self.path / name).num_rows
        except FileNotFoundError:
            raise DataError(f"{self.path}: {name} is missing. {fix}.") from None
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: {name} is damaged ({error}). {fix}.") from error
        if found != rows:
            raise DataError(f"{self.path}: {name} has {found:,} rows, expected {rows:,}. {fix}.")

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
            limit: maximum number of examples. Users are stored in hash order, so the first ones are a random sample.
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
        return column_ids(pq.read_table(self.path / "items.parquet", columns=["item_id"])["item_id"])

    @cached_property
    def features(self) -> DatasetFeatures | None:
        """
        The schema and the items' codes; None where the log was prepared without features.

        Raises:
            DataError: a damaged file.
        """
        path, wanted = self.path / FEATURES_NAME, self.manifest.get("features_sha256")
        if wanted is None and not path.is_file():
            return None
        try:
            content = path.read_bytes()
            if wanted is not None and hashlib.sha256(content).hexdigest() != wanted:
                raise ValueError("it is of another folder")
            schema = FeatureSchema.from_json(content.decode())
            codes = np.zeros((len(self.item_ids), 0), np.int32)
            if schema.item:
                lists = pq.read_table(self.path / "items.parquet", columns=["features"])["features"]
                codes = pc.call_function("list_flatten", [lists]).to_numpy().reshape(len(codes), schema.item_slots)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise DataError(f"{path}: damaged ({error}). Prepare the log again.") from error
        return DatasetFeatures(schema, codes)

    @cached_property
    def train_sequences(self) -> UserSequences:
        """The training sequences, in memory: users in bucket order, without timestamps."""
        table = pq.read_table(self.path / "sequences.parquet")
        lengths = pc.call_function("list_value_length", [table["items"]]).to_numpy()
        items = column_ids(pc.call_function("list_flatten", [table["items"]]))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return UserSequences(
            column_ids(table["user_id"]), items, np.zeros(len(items), dtype=np.int64), offsets, timed=False
        )
