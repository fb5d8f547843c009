"""
What the encoder reads of a user: the interactions of a history, in order, with their codes.

Targets are positive interactions ([`~onerec_hf.data.UserSequences`]). A history holds the positive ones before its target, or with
`history_feedback="all"` every interaction before it, and where the data has features the codes of each interaction and of the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa

from onerec_hf.data.lists import list_slices
from onerec_hf.modeling.features import FeatureSchema, in_seconds, time_values


@dataclass(frozen=True, eq=False)
class Events:
    """
    All N interactions of a table, also those that are no targets, in the order of users, then of time.

    Args:
        user_ids, item_ids: (N,) ids.
        timestamps: (N,) int64.
        order: (N,) int64 ascending in the order of a user's interactions.
        read: (N,) bool, interactions that histories hold though they are not positive; None where histories are of positive ones.
        schema: the features; None before they are learned.
        codes: (N, interaction slots) int32; 0 in the slots that are derived of times, whose values depend on the interactions in between.
        users: (U,) ids and (U, user slots) int32 codes of the users table, for any users.
        ties: (N,) int64, the same number for rows of one table with equal user and time, fractions included.
    """

    user_ids: np.ndarray
    item_ids: np.ndarray
    timestamps: np.ndarray
    order: np.ndarray
    read: np.ndarray | None = None
    schema: FeatureSchema | None = None
    codes: np.ndarray | None = None
    users: tuple[np.ndarray, np.ndarray] | None = None
    ties: np.ndarray | None = None

    @cached_property
    def seconds(self) -> np.ndarray:
        """(N,) float64 seconds since 1970 of times that may be milliseconds, or finer."""
        return in_seconds(self.timestamps)

    def shuffled(self, seed: int) -> Events:
        """The interactions with those of equal user and time in random order."""
        assert self.ties is not None
        rows = np.lexsort((self.order, pd.factorize(self.user_ids)[0]))
        ties = np.cumsum(np.diff(self.ties[rows], prepend=-1) != 0)
        order = np.empty_like(self.order)
        order[rows[np.lexsort((np.random.default_rng(seed).random(len(rows)), ties))]] = self.order[rows]
        return replace(self, order=order)

    def of_items(self, item_ids: np.ndarray) -> Events:
        """The interactions where histories hold those with these items only, among them that are not positive."""
        if self.read is None:
            return self
        return replace(self, read=self.read & (pd.Index(item_ids).get_indexer(pd.Index(self.item_ids)) >= 0))

    def user_codes(self, user_ids: np.ndarray) -> np.ndarray:
        """(U, user slots) int32 codes of users; those without a row in the users table have missing values."""
        assert self.schema is not None
        missing = self.schema.encode_users([None])
        if self.users is None:
            return np.repeat(missing, len(user_ids), axis=0)
        rows = pd.Index(self.users[0]).get_indexer(pd.Index(user_ids))
        return np.concatenate([self.users[1], missing])[rows]  # -1: the last one


@dataclass(frozen=True, eq=False)
class Histories:
    """
    The flat history items of users, of which each example reads a slice.

    Args:
        item_ids: (E,) ids, one user after another.
        offsets: (U + 1,) int64; user u's are `item_ids[offsets[u]:offsets[u + 1]]`.
        places: (T,) int64: where the T positive items stand among them.
        positive: (E,) bool; None where all are.
        rows: (E,) int64 rows of the events; None without features.
        codes: (E, interaction slots) int32, or None.
        users: (U, user slots) int32, or None.
    """

    item_ids: np.ndarray
    offsets: np.ndarray
    places: np.ndarray
    positive: np.ndarray | None = None
    rows: np.ndarray | None = None
    codes: np.ndarray | None = None
    users: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        user_ids: np.ndarray,
        item_ids: np.ndarray,
        offsets: np.ndarray,
        rows: np.ndarray | None,
        events: Events | None,
    ) -> Histories:
        """
        The histories of positive sequences.

        Args:
            user_ids, item_ids, offsets: as of `UserSequences`.
            rows: (T,) rows of the events.
        """
        if events is None or rows is None:
            return cls(item_ids, offsets, np.arange(len(item_ids)))
        places, positive = np.arange(len(rows)), None
        if events.read is not None:
            others = np.flatnonzero(events.read)
            users = pd.Index(user_ids).get_indexer(pd.Index(events.user_ids[others]))
            others, users = others[users >= 0], users[users >= 0]
            users = np.concatenate([np.repeat(np.arange(len(user_ids)), np.diff(offsets)), users])
            merged = np.lexsort((events.order[np.concatenate([rows, others])], users))
            positive = merged < len(rows)
            places = np.flatnonzero(positive)
            # Positive ones keep the order of their sequence.
            merged[places] = np.arange(len(rows))
            item_ids = np.concatenate([item_ids, events.item_ids[others]])[merged]
            rows = np.concatenate([rows, others])[merged]
            offsets = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=len(user_ids)))]).astype(np.int64)
        found = cls(item_ids, offsets, places, positive, rows)
        if events.schema is None:
            return found
        return replace(
            found,
            codes=_with_times(events, rows, offsets) if events.schema.interaction_slots else None,
            users=events.user_codes(user_ids) if events.schema.user_slots else None,
        )

    def columns(
        self, users: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> dict[str, pa.Array | pa.ChunkedArray]:
        """
        The columns of examples beside their ids.

        Args:
            users: (E,) rows of the users.
            starts, stops: (E,) slices of each history.

        Returns:
            what there is of `history_positive`, `history_features` and `user_features`.
        """
        found: dict[str, pa.Array | pa.ChunkedArray] = {}
        if self.positive is not None:
            found["history_positive"] = list_slices(self.positive, starts, stops)
        if self.codes is not None:
            slots = self.codes.shape[1]
            found["history_features"] = list_slices(self.codes.reshape(-1), starts * slots, stops * slots)
        if self.users is not None:
            slots = self.users.shape[1]
            found["user_features"] = list_slices(self.users.reshape(-1), users * slots, (users + 1) * slots)
        return found

    def time_columns(self, seconds: np.ndarray) -> dict[str, np.ndarray]:
        """(E,) float64 each: what the times of the histories say, see [`time_values`]."""
        assert self.rows is not None
        return time_values(seconds[self.rows], _firsts(self.offsets))


def _firsts(offsets: np.ndarray) -> np.ndarray:
    first = np.zeros(offsets[-1], dtype=bool)
    first[offsets[:-1][np.diff(offsets) > 0]] = True
    return first


def _with_times(events: Events, rows: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(E, slots) codes of histories, those of times too."""
    assert events.schema is not None
    assert events.codes is not None
    codes, slot, times = events.codes[rows], 0, None
    for feature in events.schema.interaction:
        if feature.derive is not None:
            times = times or time_values(events.seconds[rows], _firsts(offsets))
            codes[:, slot : slot + 1] = feature.encode(times[feature.derive])
        slot += feature.slots
    return codes


def positive_histories(examples) -> Sequence[list]:
    """
    The positive items of each example's history: what the user has had, and the input of models that read nothing else.

    Args:
        examples: a dataset with the column `history`, and `history_positive` where histories hold other interactions too.

    Example:
        >>> from datasets import Dataset
        >>> positive_histories(Dataset.from_dict({"history": [[5, 6]], "history_positive": [[True, False]]}))
        [[5]]
    """
    histories = examples["history"]
    if "history_positive" not in examples.column_names:
        return histories
    return [
        [item for item, is_positive in zip(history, flags, strict=True) if is_positive]
        for history, flags in zip(histories, examples["history_positive"], strict=True)
    ]
