"""
Features of a log of any size: a schema learned from training rows bucket by bucket, and the codes of each bucket's sequences.

The codes are those that the same log has in memory. The tables of users and items are in memory, and so are the training rows that the schema is
learned from, at most about two million.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.data.feature_tables import FeatureTables, TrainingRows, schema_of, told, told_lacking
from onerec_hf.data.sequences import UserSequences
from onerec_hf.data.shards.scans import import_polars
from onerec_hf.data.splits import hold_out_last_two, training_rows
from onerec_hf.data.times import FRACTION
from onerec_hf.data.types import table_from_arrow

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

    from onerec_hf.data.interactions import ItemTable
    from onerec_hf.data.users import UserTable
    from onerec_hf.modeling.features import FeatureSchema

#: Columns of features in batches of a log are named so.
COLUMN = "feature "
_BOOLEANS = ("True", "TRUE", "true", "False", "FALSE", "false")


@dataclass
class LogFeatures:
    """
    What is read of a log beside its ids and times.

    Args:
        names: by side ("user", "interaction", "item") the columns that are features, or ["auto"].
        users, items: None where there is no such table.
        everything: histories hold the interactions that are not positive too; None: if there are any, which the first pass finds out.

    Example:
        >>> LogFeatures({"interaction": ["like"]}).names["interaction"]
        ['like']
    """

    names: Mapping[str, Sequence[str]]
    users: UserTable | None = None
    items: ItemTable | None = None
    everything: bool | None = False
    schema: FeatureSchema | None = field(default=None, init=False)
    said: list[str] = field(default_factory=list, init=False)
    _parts: list[TrainingRows] = field(default_factory=list, init=False)
    _tables: FeatureTables | None = field(default=None, init=False)
    _lacking: int = field(default=0, init=False)

    def start(self, rows: pl.DataFrame) -> None:
        """Takes the columns of a bucket's rows, and makes the ids of users and items those that the rows have."""
        if self.users is not None:
            self.users = self.users.with_ids_like(_ids(rows["user"].head(1)))
        if self.items is not None:
            self.items = self.items.with_ids_like(_ids(rows["item"].head(1)))
        self._tables, _ = self.sequences(rows)

    def sequences(self, rows: pl.DataFrame) -> tuple[FeatureTables, UserSequences]:
        """A bucket's rows of frequent items, from `tidy`, as tables and their sequences without codes."""
        frame = _frame(rows)
        tables = FeatureTables(
            [frame.drop(columns="__positive__")],
            [frame["__positive__"].to_numpy(dtype=bool)],
            self.users,
            self.items,
            self.names,
            bool(self.everything),
        )
        return tables, tables.sequences()[0]

    def training_rows(self, rows: pl.DataFrame, kept: int) -> tuple[TrainingRows, int]:
        """
        What `take` takes of a bucket: its training rows, and how many of its users have no row in the users table.

        Args:
            rows: as of `sequences`.
            kept: number of all positive interactions that are kept.
        """
        tables, sequences = self.sequences(rows)
        lacking = 0
        if self.users is not None and self.names.get("user"):
            lacking = int((self.users.rows_of(sequences.user_ids) < 0).sum())
        train = hold_out_last_two(sequences)[0]
        return tables.training_rows(sequences, training_rows(sequences, train.lengths), kept), lacking

    def take(self, part: TrainingRows, lacking: int) -> None:
        """Takes the training rows of a bucket, after `start`."""
        self._parts.append(part)
        self._lacking += lacking

    def learn(self, users: int) -> None:
        """
        Learns the schema of what was taken.

        Args:
            users: number of users.

        Raises:
            ValueError, DataError: as [`FeatureTables.learn`].
        """
        assert self._tables is not None
        learned = self._tables.learn(self._parts)
        self.schema, self.said = schema_of(learned), told_lacking(self._lacking, users) + told(learned)
        self._parts = []

    @cached_property
    def _user_codes(self) -> tuple[np.ndarray, np.ndarray] | None:
        assert self.schema is not None
        assert self._tables is not None
        return self._tables.user_codes(self.schema)

    def coded(self, rows: pl.DataFrame) -> UserSequences:
        """The sequences of a bucket with codes."""
        tables, sequences = self.sequences(rows)
        return sequences if self.schema is None else tables.encoded(sequences, self.schema, self._user_codes)

    def item_codes(self, item_ids: np.ndarray) -> np.ndarray | None:
        """(items, item slots) int32; None without features of items."""
        if self.schema is None or not self.schema.item:
            return None
        assert self._tables is not None
        return self._tables.item_codes(self.schema, item_ids)

    def options(self) -> dict[str, Any]:
        """For the manifest."""
        return {"history_feedback": None if self.everything is None else "all" if self.everything else "positive"}


@dataclass
class TextKinds:
    """
    What the texts of a column are, as pandas reads a text file.

    Example:
        >>> import polars as pl
        >>> kinds = TextKinds()
        >>> kinds.follow(pl.Series(["7", None])), kinds.follow(pl.Series(["7.5"])), kinds.kind
        (None, None, 'number')
    """

    integers: bool = True
    numbers: bool = True
    booleans: bool = True
    any: bool = False

    def follow(self, texts: pl.Series) -> None:
        """Takes more values; missing ones are null."""
        pl = import_polars()
        known = texts.drop_nulls()
        if not len(known):
            return
        self.any = True
        self.integers = self.integers and known.cast(pl.Int64, strict=False).null_count() == 0
        self.numbers = self.numbers and known.cast(pl.Float64, strict=False).null_count() == 0
        self.booleans = self.booleans and bool(known.is_in(list(_BOOLEANS)).all())

    def merge(self, other: TextKinds) -> None:
        """Takes the values that another one was given."""
        self.integers &= other.integers
        self.numbers &= other.numbers
        self.booleans &= other.booleans
        self.any |= other.any

    @property
    def kind(self) -> str:
        """ "integer", "number", "boolean" or "text"."""
        if not self.any:
            return "number"
        return "integer" if self.integers else "number" if self.numbers else "boolean" if self.booleans else "text"


def typed(rows: pl.DataFrame, kinds: Mapping[str, TextKinds]) -> pl.DataFrame:
    """
    The rows with the texts of features as what they are.

    Example:
        >>> import polars as pl
        >>> kinds = TextKinds()
        >>> kinds.follow(pl.Series(["True"]))
        >>> typed(pl.DataFrame({"feature like": ["True", "False"]}), {"like": kinds})["feature like"].to_list()
        [True, False]
    """
    pl = import_polars()
    casts = []
    for name, kind in kinds.items():
        column = pl.col(f"{COLUMN}{name}")
        if kind.kind in ("integer", "number"):
            casts.append(column.cast(pl.Int64 if kind.kind == "integer" else pl.Float64))
        elif kind.kind == "boolean":
            casts.append(column.str.to_lowercase() == "true")
    return rows.with_columns(casts)


def _frame(rows: pl.DataFrame) -> pd.DataFrame:
    """As `read_interactions` has them, with `__positive__`."""
    pl = import_polars()
    names = {name: name.removeprefix(COLUMN) for name in rows.columns if name.startswith(COLUMN)}
    names |= {"user": "user_id", "item": "item_id", "time": "timestamp", "rest": FRACTION, "positive": "__positive__"}
    return table_from_arrow(rows.select(*names).to_arrow(compat_level=pl.CompatLevel.oldest())).rename(columns=names)


def _ids(column: pl.Series) -> np.ndarray:
    return column.to_numpy() if column.dtype.is_integer() else np.asarray(column.to_list(), dtype=object)
