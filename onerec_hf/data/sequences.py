"""All users' items in time order, in flat arrays; splits and windows are slices of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from onerec_hf.data.columns import DataError, canonical_ids, column_of, require_columns
from onerec_hf.data.events import Events, Histories
from onerec_hf.data.times import FRACTION, TIMED, Instants, instants


@dataclass(frozen=True, eq=False)
class UserSequences:
    """
    The items of U users, concatenated, each user's in time order. Every user has at least one item.

    Args:
        user_ids: (U,) int64 or object array of `str`, sorted.
        item_ids: (T,) int64 or object array of `str`.
        timestamps: (T,) int64.
        offsets: (U + 1,) int64; user u's items are `item_ids[offsets[u]:offsets[u + 1]]`.
        fractions: (T,) float64 in [0, 1), of the timestamps' unit; None where all times are whole.
        timed: False where the timestamps are the places of a user's items in a table without times.
        rows, events: (T,) int64, the interaction of each item among all those of the table; None where histories are items and nothing else.

    Example:
        >>> rows = pd.DataFrame({"user_id": ["b", "a", "a"], "item_id": [3, 2, 1], "timestamp": [5, 9, 8]})
        >>> sequences = UserSequences.from_interactions(rows)
        >>> len(sequences), sequences.user_ids.tolist(), sequences[0].tolist()
        (2, ['a', 'b'], [1, 2])
    """

    user_ids: np.ndarray
    item_ids: np.ndarray
    timestamps: np.ndarray
    offsets: np.ndarray
    fractions: np.ndarray | None = None
    rows: np.ndarray | None = None
    events: Events | None = None
    timed: bool = True

    @classmethod
    def from_interactions(
        cls, interactions: pd.DataFrame, rows: np.ndarray | None = None, events: Events | None = None
    ) -> UserSequences:
        """
        From a table with `user_id`, `item_id` and `timestamp`, in any row order (stable for equal timestamps), and `timestamp_fraction` where
        [`~onerec_hf.data.read_interactions`] made it.

        Args:
            rows, events: the table's rows among all interactions.

        Raises:
            DataError: missing columns, no rows, ids that `canonical_ids` rejects, timestamps that are neither numbers nor dates.

        Example:
            >>> rows = pd.DataFrame({"user_id": [1, 1], "item_id": ["y", "x"], "timestamp": [0, 0]})
            >>> UserSequences.from_interactions(rows)[0].tolist()
            ['y', 'x']
        """
        require_columns(interactions, ["user_id", "item_id", "timestamp"], "interactions")
        if not len(interactions):
            raise DataError("interactions: the table has no rows.")
        codes, user_ids = pd.factorize(canonical_ids(column_of(interactions, "user_id"), "user_id"), sort=True)
        times = _times(interactions)
        order = np.lexsort((*_fraction_keys(times.rest), times.whole, codes))
        items = canonical_ids(column_of(interactions, "item_id"), "item_id")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=len(user_ids)))]).astype(np.int64)
        fractions = None if times.rest is None else times.rest[order]
        rows = None if rows is None else rows[order]
        timed = interactions.attrs.get(TIMED, True)
        return cls(np.asarray(user_ids), items[order], times.whole[order], offsets, fractions, rows, events, timed)

    def __len__(self) -> int:
        return len(self.user_ids)

    def __getitem__(self, u: int) -> np.ndarray:
        u = range(len(self))[u]
        return self.item_ids[self.offsets[u] : self.offsets[u + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(U,) int64: number of items per user."""
        return np.diff(self.offsets)

    @property
    def user_rows(self) -> np.ndarray:
        """(T,) int64: the user row (0..U-1) of every item."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def times(self) -> np.ndarray:
        """(T,) timestamps with their fractions, in float64 where there are any."""
        return self.timestamps if self.fractions is None else self.timestamps + self.fractions

    @cached_property
    def histories(self) -> Histories:
        """What the encoder reads: the items, and with `events` the codes of features and the interactions that are not positive."""
        return Histories.of(self.user_ids, self.item_ids, self.offsets, self.rows, self.events)

    @property
    def tied(self) -> np.ndarray:
        """(T,) bool: whether an item has the time of the user's item before it, fractions included."""
        tied = np.zeros(len(self.item_ids), dtype=bool)
        tied[1:] = (np.diff(self.timestamps) == 0) & (np.diff(self.user_rows) == 0)
        if self.fractions is not None:
            tied[1:] &= np.diff(self.fractions) == 0
        return tied

    def lists(self) -> list[np.ndarray]:
        """
        The U sequences, one array each.

        Example:
            >>> rows = pd.DataFrame({"user_id": [1, 2, 1], "item_id": [7, 8, 9], "timestamp": [0, 1, 2]})
            >>> [items.tolist() for items in UserSequences.from_interactions(rows).lists()]
            [[7, 9], [8]]
        """
        return np.split(self.item_ids, self.offsets[1:-1])

    def item_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """
        The distinct item ids, sorted, and their numbers of occurrences.

        Example:
            >>> rows = pd.DataFrame({"user_id": [1, 2, 2], "item_id": [9, 9, 7], "timestamp": [0, 1, 2]})
            >>> [values.tolist() for values in UserSequences.from_interactions(rows).item_counts()]
            [[7, 9], [1, 2]]
        """
        codes, items = pd.factorize(self.item_ids, sort=True)
        return np.asarray(items), np.bincount(codes, minlength=len(items))

    def where(self, keep: np.ndarray) -> UserSequences:
        """
        Keeps the items where `keep`, a (T,) bool mask, is true, and drops users without items.

        Example:
            >>> rows = pd.DataFrame({"user_id": [1, 2, 2], "item_id": [9, 9, 7], "timestamp": [0, 1, 2]})
            >>> UserSequences.from_interactions(rows).where(np.array([False, True, False])).user_ids.tolist()
            [2]
        """
        lengths = np.bincount(self.user_rows[keep], minlength=len(self))
        offsets = np.concatenate([[0], np.cumsum(lengths[lengths > 0])]).astype(np.int64)
        fractions = None if self.fractions is None else self.fractions[keep]
        rows = None if self.rows is None else self.rows[keep]
        return UserSequences(
            self.user_ids[lengths > 0],
            self.item_ids[keep],
            self.timestamps[keep],
            offsets,
            fractions,
            rows,
            self.events,
            self.timed,
        )

    def reading(self, item_ids: np.ndarray) -> UserSequences:
        """The sequences where histories hold these items only, among the interactions that are not positive."""
        return self if self.events is None else replace(self, events=self.events.of_items(item_ids))

    def shuffled_ties(self, seed: int = 0) -> UserSequences:
        """
        A user's items of equal time, fractions included, in random order, in place of the table's order.

        Example:
            >>> rows = pd.DataFrame({"user_id": [1] * 5, "item_id": [1, 2, 3, 4, 5], "timestamp": [7, 7, 7, 7, 9]})
            >>> UserSequences.from_interactions(rows).shuffled_ties()[0].tolist()
            [4, 3, 2, 1, 5]
        """
        random = np.random.default_rng(seed).random(len(self.item_ids))
        order = np.lexsort((random, *_fraction_keys(self.fractions), self.timestamps, self.user_rows))
        if self.rows is None or self.events is None:
            return replace(self, item_ids=self.item_ids[order])
        return replace(self, item_ids=self.item_ids[order], rows=self.rows[order], events=self.events.shuffled(seed))

    def k_core(self, min_user: int = 1, min_item: int = 5, iterative: bool = False) -> UserSequences:
        """
        Drops items with fewer than `min_item` interactions, then users with fewer than `min_user` remaining interactions.

        Args:
            iterative: repeat until nothing more is dropped (the true k-core) instead of once.

        Raises:
            DataError: no interactions remain.

        Example:
            >>> rows = pd.DataFrame({"user_id": [1, 2, 2], "item_id": [9, 9, 7], "timestamp": [0, 1, 2]})
            >>> core = UserSequences.from_interactions(rows).k_core(min_item=2)
            >>> [items.tolist() for items in core.lists()]
            [[9], [9]]
        """
        users, items = self.user_rows, pd.factorize(self.item_ids)[0]
        keep = np.ones(len(items), dtype=bool)
        while True:
            before = keep
            keep = before & (np.bincount(items[before], minlength=items.max() + 1)[items] >= min_item)
            keep &= np.bincount(users[keep], minlength=len(self))[users] >= min_user
            if not iterative or keep.sum() == before.sum():
                break
        if not keep.any():
            raise DataError(
                f"filtering removes all {len(self):,} users and {len(items):,} interactions: no user has "
                f"at least {min_user} items with at least {min_item} interactions each. Lower min_user or min_item."
            )
        return self.where(keep).reading(pd.unique(self.item_ids[keep]))


def concatenated(*parts: UserSequences) -> UserSequences:
    """
    The items of several tables as one: a user's items of the first table before those of the second, whatever their times.

    Example:
        >>> rows = pd.DataFrame({"user_id": [1, 2], "item_id": [7, 8], "timestamp": [9, 9]})
        >>> more = pd.DataFrame({"user_id": [2, 3], "item_id": [5, 6], "timestamp": [0, 0]})
        >>> both = concatenated(UserSequences.from_interactions(rows), UserSequences.from_interactions(more))
        >>> [items.tolist() for items in both.lists()]
        [[7], [8, 5], [6]]
    """
    users, codes = np.unique(np.concatenate([part.user_ids[part.user_rows] for part in parts]), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    items, times = (
        np.concatenate([getattr(part, name) for part in parts])[order] for name in ("item_ids", "timestamps")
    )
    fractions = None
    if any(part.fractions is not None for part in parts):
        cut = [np.zeros(len(part.item_ids)) if part.fractions is None else part.fractions for part in parts]
        fractions = np.concatenate(cut)[order]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=len(users)))]).astype(np.int64)
    first, rows = parts[0], None
    if first.rows is not None:
        rows = np.concatenate([np.asarray(part.rows) for part in parts])[order]
    timed = all(part.timed for part in parts)
    return UserSequences(users, items, times, offsets, fractions, rows, first.events, timed)


def _times(interactions: pd.DataFrame) -> Instants:
    """The times of a table; those of `read_interactions` are whole, with their fractions in a column of their own."""
    series = column_of(interactions, "timestamp")
    if not pd.api.types.is_integer_dtype(series.dtype):
        return instants(series, "timestamp")
    fractions = interactions[FRACTION].to_numpy(dtype=np.float64) if FRACTION in interactions.columns else None
    return Instants(series.to_numpy(dtype=np.int64), fractions)


def _fraction_keys(fractions: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """Keys of `np.lexsort`."""
    return () if fractions is None else (fractions,)
