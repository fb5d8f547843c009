"""Columns of a log that differ in every row, such as an event's number: they hide duplicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onerec_hf.data.shards.scans import import_polars

if TYPE_CHECKING:
    import polars as pl

# A column that repeats a value in the first rows does not number them.
_FIRST_ROWS = 10_000
# Values of a column that are kept; of longer logs those whose hash falls into a share.
_MOST = 2**20


def may_number(frame: pl.LazyFrame, keys: Sequence[str], others: Sequence[str]) -> list[str]:
    """
    The columns that differ in each of the first rows, exact duplicates counted once.

    Args:
        keys: columns of user, item and time.
        others: the columns to look at.

    Example:
        >>> import polars as pl
        >>> frame = pl.LazyFrame({"user": [7, 7, 7], "event": [1, 2, 2], "like": [0, 0, 0]})
        >>> may_number(frame, ["user"], ["event", "like"])
        ['event']
    """
    pl = import_polars()
    schema = frame.collect_schema()
    flat = [name for name in (*keys, *others) if not isinstance(schema[name], pl.List | pl.Array | pl.Struct)]
    rows = frame.select(flat).head(_FIRST_ROWS).collect().unique()
    return [name for name in others if name in flat and rows[name].n_unique() == len(rows)]


class DistinctValues:
    """
    Whether a column differs in every row of a log that is read in batches. Exact up to a million rows; of longer logs the values whose hash falls into
    a share are followed, all occurrences of each.

    Attributes:
        distinct: of the rows so far.

    Example:
        >>> import polars as pl
        >>> values = DistinctValues()
        >>> values.add(pl.Series([5, 6], dtype=pl.UInt64), pl.Series([1, 2], dtype=pl.UInt64))
        >>> values.add(pl.Series([6], dtype=pl.UInt64), pl.Series([2], dtype=pl.UInt64))  # the same row again
        >>> values.distinct
        True
        >>> values.add(pl.Series([6], dtype=pl.UInt64), pl.Series([3], dtype=pl.UInt64))
        >>> values.distinct
        False
    """

    def __init__(self):
        self.distinct = True
        self._share = 1
        self._seen: Any = None

    def add(self, values: pl.Series, rows: pl.Series) -> None:
        """Hashes of a batch's values, and of its whole rows."""
        pl = import_polars()
        if not self.distinct:
            return
        part = pl.DataFrame({"value": values, "row": rows}).filter(pl.col("value") % self._share == 0)
        seen = (part if self._seen is None else pl.concat([self._seen, part])).unique()
        self.distinct = seen["value"].n_unique() == len(seen)
        while len(seen) > _MOST:
            self._share *= 2
            seen = seen.filter(pl.col("value") % self._share == 0)
        self._seen = seen if self.distinct else None

    def merge(self, other: DistinctValues) -> None:
        """
        Takes the values of another part of the log; beyond a million rows those whose hash falls into the smaller share of the two.

        Example:
            >>> import polars as pl
            >>> values, others = DistinctValues(), DistinctValues()
            >>> values.add(pl.Series([6], dtype=pl.UInt64), pl.Series([1], dtype=pl.UInt64))
            >>> others.add(pl.Series([6], dtype=pl.UInt64), pl.Series([2], dtype=pl.UInt64))
            >>> values.merge(others)
            >>> values.distinct
            False
        """
        self.distinct &= other.distinct
        self._share = max(self._share, other._share)
        if not self.distinct:
            self._seen = None
        elif other._seen is not None:
            self.add(other._seen["value"], other._seen["row"])

    def save(self, path: Path) -> dict[str, Any]:
        """What JSON can hold of it; the values go into a file."""
        if self._seen is not None:
            self._seen.write_ipc(path)
        return {"distinct": self.distinct, "share": self._share, "any": self._seen is not None}

    @classmethod
    def load(cls, path: Path, found: Mapping[str, Any]) -> DistinctValues:
        """The opposite of `save`."""
        values = cls()
        values.distinct, values._share = found["distinct"], found["share"]
        if found["any"]:
            values._seen = import_polars().read_ipc(path)
        return values


def hidden_duplicates(bucket: pl.DataFrame, distinct: Sequence[bool]) -> int:
    """
    How many rows of a bucket equal an earlier one but for the columns that differ in every row.

    Args:
        bucket: as returned by [`Log.batches`], with a column "value 0" and so on for each column that may differ in every row.
        distinct: whether it does.

    Example:
        >>> import polars as pl
        >>> bucket = {"user": [1, 1], "item": [7, 7], "time": [3, 3], "rest": [0.0, 0.0], "others": [5, 6], "alike": [0, 0], "value 0": [5, 6]}
        >>> hidden_duplicates(pl.DataFrame(bucket), [True])
        1
    """
    if not any(distinct):
        return 0
    keys = ["user", "item", "time", "rest"]
    compared = ["alike", *(f"value {place}" for place, apart in enumerate(distinct) if not apart)]
    rows = bucket.unique([*keys, "others"])
    return len(rows) - rows.select(*keys, *compared).n_unique()


__all__ = ["DistinctValues", "hidden_duplicates", "may_number"]
