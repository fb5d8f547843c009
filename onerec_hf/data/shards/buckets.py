"""One bucket of a log's users that fits into memory: sorted rows, training examples and held-out targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from onerec_hf.data.lists import list_slices
from onerec_hf.data.prefixes import prefix_examples
from onerec_hf.data.sequences import UserSequences
from onerec_hf.data.shards.features import COLUMN
from onerec_hf.data.shards.scans import import_polars
from onerec_hf.data.splits import hold_out_last_two, last_items
from onerec_hf.data.windows import cut, window_bounds

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class ExampleSettings:
    """
    How sequences become examples. Names and meanings are those of `onerec-hf train`.

    Args:
        min_item_interactions: items with fewer rows are dropped.
        session_length, max_history, stride: as in `window_examples`.
        train_on: "windows" or "prefixes".

    Example:
        >>> ExampleSettings(session_length=2).max_history
        50
    """

    min_item_interactions: int = 5
    session_length: int = 5
    max_history: int = 50
    stride: int = 1
    train_on: str = "windows"

    def __post_init__(self):
        for name in ("min_item_interactions", "session_length", "max_history", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.train_on not in ("windows", "prefixes"):
            raise ValueError(f"train_on={self.train_on!r} is unknown; choose windows or prefixes")


def tidy(bucket: pl.DataFrame, integers: Mapping[str, bool]) -> pl.DataFrame:
    """
    Sorts a bucket's rows by user and time (equal times in the order of the log) and drops exact duplicates.

    Args:
        bucket: `user`, `item`, `time`, `rest`, `row`, `others`, as returned by [`Log.batches`].
        integers: whether "user" and "item" contain only integers ("7" or "7.0"), if they are text.

    Returns:
        columns `user` and `item`, int64 or str; with features also `time`, `positive` and the features.

    Example:
        >>> import polars as pl
        >>> rows = {"user": ["b", "a", "a", "a"], "item": ["7", "8", "9", "9"], "time": [1, 10, 9, 9], "rest": [0.0] * 4}
        >>> rows |= {"row": [0, 1, 2, 3], "others": [0] * 4}
        >>> tidy(pl.DataFrame(rows), {"user": False, "item": True}).rows()
        [('a', 9), ('a', 8), ('b', 7)]
    """
    pl = import_polars()
    text = [name for name in ("user", "item") if bucket.schema[name] == pl.String and integers[name]]
    casts = [pl.col(name).str.strip_suffix(".0").cast(pl.Int64) for name in text]
    # Items of one row's list have its number; they stay in their order.
    ordered = bucket.with_columns(casts).sort("user", "time", "rest", "row", maintain_order=True)
    # Duplicates share user and time. Few rows do, so only those are compared.
    again = [pl.col(name) == pl.col(name).shift() for name in ("user", "time", "rest")]
    with_last = pl.all_horizontal(again).fill_null(False)
    ordered = ordered.with_columns(compared=with_last | with_last.shift(-1, fill_value=False)).with_row_index("place")
    compared = ordered.filter("compared")
    if len(compared):
        first = compared.unique(["user", "item", "time", "rest", "others"], keep="first", maintain_order=True)["place"]
        ordered = ordered.filter(~pl.col("compared") | pl.col("place").is_in(first.implode()))
    read = ["time", "positive", *(name for name in ordered.columns if name.startswith(COLUMN))]
    return ordered.select("user", "item", *(read if "positive" in ordered.columns else ()))


def sequences_of(rows: pl.DataFrame) -> UserSequences:
    """
    The sequences of rows from `tidy`. Their timestamps are set to 0, since they are not needed any more.

    Example:
        >>> import polars as pl
        >>> [items.tolist() for items in sequences_of(pl.DataFrame({"user": ["a", "a", "b"], "item": [9, 8, 7]})).lists()]
        [[9, 8], [7]]
    """
    users = rows["user"].rle().struct.unnest()
    offsets = np.concatenate([[0], np.cumsum(users["len"].to_numpy(), dtype=np.int64)]).astype(np.int64)
    ids, items = (
        column.to_numpy() if column.dtype.is_integer() else np.asarray(column.to_list(), dtype=object)
        for column in (users["value"], rows["item"])
    )
    return UserSequences(ids, items, np.zeros(len(items), dtype=np.int64), offsets)


class BucketExamples:
    """
    The examples of a bucket: training examples in random order, validation and test examples, training sequences.

    Args:
        rows: rows from `tidy`, without rare items; or their sequences.
        settings: how they become examples.
        seed: seed of the order of the training examples.

    Attributes:
        num_train: number of training examples.
        held_out: (U,) bool mask of the users with a validation and a test target.

    Example:
        >>> import polars as pl
        >>> bucket = BucketExamples(pl.DataFrame({"user": [1] * 5, "item": [5, 6, 7, 8, 9]}), ExampleSettings(session_length=1), seed=0)
        >>> sorted(bucket.train(slice(None)).to_pylist(), key=lambda example: len(example["history"]))
        [{'user_id': 1, 'history': [5], 'session': [6]}, {'user_id': 1, 'history': [5, 6], 'session': [7]}]
        >>> bucket.validation().to_pylist(), bucket.test().num_rows
        ([{'user_id': 1, 'history': [5, 6, 7], 'session': [8]}], 1)
    """

    def __init__(self, rows: pl.DataFrame | UserSequences, settings: ExampleSettings, seed: Any):
        self.settings = settings
        self.sequences = rows if isinstance(rows, UserSequences) else sequences_of(rows)
        self.train_sequences, self.held_out = hold_out_last_two(self.sequences)
        length, stride = settings.session_length, settings.stride
        if settings.train_on == "prefixes":
            prefixes = prefix_examples(self.train_sequences, length, settings.max_history, stride)
            self._prefixes: pa.Table = prefixes.with_format("arrow")[:]
            self.num_train = len(prefixes)
        else:
            self._bounds = window_bounds(self.train_sequences.lengths, length, stride)
            self.num_train = len(self._bounds[0])
        self._order = np.random.default_rng(seed).permutation(self.num_train)

    def train(self, which: slice) -> pa.Table:
        """A slice of the training examples in random order."""
        chosen = self._order[which]
        if self.settings.train_on == "prefixes":
            return self._prefixes.take(pa.array(chosen))
        rows, starts, stops = (bound[chosen] for bound in self._bounds)
        base = self.train_sequences.offsets[rows]
        return cut(self.train_sequences, rows, base + starts, base + stops, self.settings.max_history)

    def validation(self) -> pa.Table:
        """One example per held-out user: the item before the last one, with everything before it as history."""
        return last_items(self.sequences, self.held_out, before_end=1).with_format("arrow")[:]

    def test(self) -> pa.Table:
        """One example per held-out user: the last item, with everything before it as history."""
        return last_items(self.sequences, self.held_out, before_end=0).with_format("arrow")[:]

    def train_items(self) -> pa.Table:
        """`user_id` and `items`: the training sequences."""
        sequences = self.train_sequences
        id_type = pa.int64() if sequences.user_ids.dtype.kind == "i" else pa.string()
        users = pa.array(sequences.user_ids, type=id_type)
        items = list_slices(sequences.item_ids, sequences.offsets[:-1], sequences.offsets[1:])
        return pa.table({"user_id": users, "items": items})
