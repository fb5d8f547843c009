"""Train, validation and test examples without leakage: leave-one-out, temporal or given split."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from onerec_hf.data.columns import DataError
from onerec_hf.data.sequences import UserSequences, concatenated
from onerec_hf.data.ties import Ties
from onerec_hf.data.windows import cut, window_examples

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, eq=False)
class Split:
    """
    The result of `leave_one_out`, `temporal_split` or `given_split`.

    Every dataset has the columns `user_id`, `history` (list of ids, time order, never empty) and `session` (list of ids); validation and test of a
    table with times also `request_time`, the time of the session's first item.

    Args:
        train: sliding windows over `train_sequences`, with histories truncated to `max_history`.
        validation, test: one example per user, with the user's whole past as history.
        train_sequences: the training interactions, for windows, popularity and item co-occurrence.
        description: one sentence with the counts, for model cards.

    Example:
        >>> [field for field in Split.__dataclass_fields__]
        ['train', 'validation', 'test', 'train_sequences', 'description']
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    train_sequences: UserSequences
    description: str


class LeaveOneOutSplit(Split):
    """
    A `Split` by `leave_one_out`.

    Example:
        >>> issubclass(LeaveOneOutSplit, Split)
        True
    """


class TemporalSplit(Split):
    """
    A `Split` by `temporal_split`.

    Example:
        >>> issubclass(TemporalSplit, Split)
        True
    """


class GivenSplit(Split):
    """
    A `Split` by `given_split`.

    Example:
        >>> issubclass(GivenSplit, Split)
        True
    """


def leave_one_out(
    sequences: UserSequences, session_length: int = 5, max_history: int = 50, stride: int = 1, min_length: int = 3
) -> LeaveOneOutSplit:
    """
    Each user's last item is the test target, the one before it the validation target, the rest is for training.

    Users with fewer than `min_length` items are used for training only, with all their items. Training examples are sliding windows (see
    `onerec_hf.data.windows.window_bounds`): the fallback for data without sessions.

    Args:
        session_length: maximum number of items in a training session; validation and test sessions are the single target.
        max_history: maximum number of items in a training history.
        stride: step between a user's training sessions.
        min_length: at least 3, so that a validation history is never empty.

    Raises:
        DataError: no user has `min_length` items, or no training window remains.

    Warns:
        UserWarning: ties in time decide at least 1 % of the test targets, and tied rows are sorted by item id.

    Example:
        >>> rows = pd.DataFrame({"user_id": [1] * 4, "item_id": [5, 6, 7, 8], "timestamp": [0, 1, 2, 3]})
        >>> split = leave_one_out(UserSequences.from_interactions(rows))
        >>> split.train[0], split.validation[0]["session"], split.test[0]
        ({'user_id': 1, 'history': [5], 'session': [6]}, [7], {'user_id': 1, 'history': [5, 6, 7], 'session': [8], 'request_time': 3})
    """
    train_sequences, held_out = hold_out_last_two(sequences, min_length)
    if not held_out.any():
        raise DataError(
            f"leave-one-out: none of {len(sequences):,} users has {min_length} items (the longest sequence has "
            f"{sequences.lengths.max()}). Add data, or split by time with temporal_split."
        )
    train = train_windows(train_sequences, session_length, max_history, stride)
    validation, test = (last_items(sequences, held_out, before_end, times=True) for before_end in (1, 0))
    description = describe_leave_one_out(
        int(held_out.sum()), int((~held_out).sum()), len(train), session_length, max_history, stride, min_length
    )
    ties = Ties.of(sequences, min_length)
    if ties.matter:
        warnings.warn(f"{ties} UserSequences.shuffled_ties() puts them in random order.", UserWarning, stacklevel=2)
    description += f" {ties}" if ties.tied else ""
    return LeaveOneOutSplit(train, validation, test, train_sequences, description)


def hold_out_last_two(sequences: UserSequences, min_length: int = 3) -> tuple[UserSequences, np.ndarray]:
    """
    The training sequences of leave-one-out, and a (U,) bool mask of the users with a validation and a test target.

    Example:
        >>> rows = pd.DataFrame({"user_id": [1] * 4 + [2], "item_id": [5, 6, 7, 8, 9], "timestamp": [0, 1, 2, 3, 4]})
        >>> train, held_out = hold_out_last_two(UserSequences.from_interactions(rows))
        >>> [items.tolist() for items in train.lists()], held_out.tolist()
        ([[5, 6], [9]], [True, False])
    """
    if min_length < 3:
        raise ValueError(f"min_length ({min_length}) must be at least 3: a history item and two targets.")
    held_out = sequences.lengths >= min_length
    users = sequences.user_rows
    from_end = sequences.offsets[1:][users] - np.arange(len(users))  # 1 for the last item
    return sequences.where((from_end > 2) | ~held_out[users]), held_out


def last_items(
    sequences: UserSequences, users: np.ndarray, before_end: int = 0, times: bool = False
) -> datasets.Dataset:
    """
    Examples of the users where the mask is true: one item as session and everything before it as history.

    Args:
        users: (U,) bool.
        before_end: 0 for the last item (the test target), 1 for the one before it (the validation target).
        times: also the column `request_time`, of a table with times.

    Example:
        >>> rows = pd.DataFrame({"user_id": [1] * 3, "item_id": [5, 6, 7], "timestamp": [0, 1, 2]})
        >>> last_items(UserSequences.from_interactions(rows), np.array([True]))[0]
        {'user_id': 1, 'history': [5, 6], 'session': [7]}
    """
    from datasets import Dataset

    at = sequences.offsets[1:][users] - 1 - before_end
    return Dataset(cut(sequences, np.flatnonzero(users), at, at + 1, times=times))


def describe_leave_one_out(
    held_out: int, others: int, train: int, session_length: int, max_history: int, stride: int, min_length: int = 3
) -> str:
    """
    Describes the split in one sentence, for model cards.

    Example:
        >>> describe_leave_one_out(9, 1, 40, 5, 50, 1)[:63]
        'Leave-one-out split: for each of 9 users with at least 3 intera'
    """
    return (
        f"Leave-one-out split: for each of {held_out:,} users with at least {min_length} interactions the last item is the "
        f"test target and the one before it the validation target; {others:,} users with fewer are used for training "
        f"only; {describe_windows(train, session_length, max_history, stride)}."
    )


def temporal_split(
    interactions: pd.DataFrame | UserSequences,
    validation_start: int,
    test_start: int,
    session_length: int = 5,
    max_history: int = 50,
    stride: int = 1,
    targets: int | None = None,
) -> TemporalSplit:
    """
    Training before `validation_start`, validation in [validation_start, test_start), test from `test_start` on.

    Every user with items both in a period and before it gives one example: the history is everything before the period, the session
    the first `targets` items in it.

    Args:
        validation_start, test_start: in the timestamps' unit.
        session_length, max_history, stride: as in `leave_one_out`.
        targets: at most so many items of a validation or test session; `session_length` when not given.

    Raises:
        DataError: starts in the wrong order, or a part without examples.

    Example:
        >>> rows = pd.DataFrame({"user_id": [1] * 5, "item_id": [5, 6, 7, 8, 9], "timestamp": [0, 1, 2, 3, 4]})
        >>> split = temporal_split(rows, validation_start=2, test_start=3)
        >>> list(split.train["session"]), split.validation[0]["session"], split.test[0]
        ([[6]], [7], {'user_id': 1, 'history': [5, 6, 7], 'session': [8, 9], 'request_time': 3})
    """
    from datasets import Dataset

    sequences = (
        UserSequences.from_interactions(interactions) if isinstance(interactions, pd.DataFrame) else interactions
    )
    times, targets = sequences.timestamps, targets or session_length
    if not times.min() < validation_start < test_start <= times.max():
        raise DataError(
            f"temporal split: validation_start {validation_start} and test_start {test_start} must lie in this order inside the "
            f"data's times, {times.min()} to {times.max()}."
        )
    train_sequences = sequences.where(times < validation_start)
    train = train_windows(train_sequences, session_length, max_history, stride)
    parts = {}
    for name, start, end in (("validation", validation_start, test_start), ("test", test_start, None)):
        at = sequences.offsets[:-1] + _count_before(sequences, start)
        stops = sequences.offsets[1:] if end is None else sequences.offsets[:-1] + _count_before(sequences, end)
        usable = (at > sequences.offsets[:-1]) & (stops > at)
        if not usable.any():
            raise DataError(
                f"temporal split: no user has items both in the {name} period and before it. Change its start."
            )
        ends = np.minimum(stops, at + targets)
        parts[name] = Dataset(cut(sequences, np.flatnonzero(usable), at[usable], ends[usable], times=True))
    description = (
        f"Temporal split: training on {len(train_sequences.item_ids):,} of {len(times):,} interactions, those before "
        f"{validation_start}; {len(parts['validation']):,} validation users from then to {test_start} and "
        f"{len(parts['test']):,} test users after, each with up to {targets} target items; "
        f"{describe_windows(len(train), session_length, max_history, stride)}."
    )
    return TemporalSplit(train, parts["validation"], parts["test"], train_sequences, description)


def given_split(
    train: UserSequences,
    validation: UserSequences,
    test: UserSequences,
    session_length: int = 5,
    max_history: int = 50,
    stride: int = 1,
    targets: int = 50,
) -> GivenSplit:
    """
    A split that is given as three tables. A validation user's history is the training items, a test user's the training and validation items;
    users without a history are left out and counted in the description.

    Args:
        session_length, max_history, stride: as in `leave_one_out`.
        targets: at most so many items of a validation or test session.

    Raises:
        DataError: no user of a part has a history.

    Example:
        >>> def rows(items, start):
        ...     table = {"user_id": [1] * len(items), "item_id": items, "timestamp": range(start, start + len(items))}
        ...     return UserSequences.from_interactions(pd.DataFrame(table))
        >>> split = given_split(rows([5, 6, 7], 0), rows([8], 3), rows([9, 4], 4))
        >>> split.validation[0]["session"], split.test[0]
        ([8], {'user_id': 1, 'history': [5, 6, 7, 8], 'session': [9, 4], 'request_time': 4})
    """
    from datasets import Dataset

    before, parts, without = train, {}, {}
    for name, part in (("validation", validation), ("test", test)):
        after = concatenated(before, part)
        known, new = (lengths_of(each, after.user_ids) for each in (before, part))
        usable = (known > 0) & (new > 0)
        if not usable.any():
            raise DataError(f"given split: no {name} user has a history in the tables before. Check the user ids.")
        at = (after.offsets[:-1] + known)[usable]
        ends = at + np.minimum(new[usable], targets)
        parts[name] = Dataset(cut(after, np.flatnonzero(usable), at, ends, times=True))
        without[name], before = int(((known == 0) & (new > 0)).sum()), after
    windows = train_windows(train, session_length, max_history, stride)
    left_out = ", ".join(f"{count:,} {name} users" for name, count in without.items() if count)
    description = (
        f"Given split: {len(train.item_ids):,} training interactions, {len(parts['validation']):,} validation and {len(parts['test']):,} "
        f"test users, each with up to {targets} target items"
        + (f"; {left_out} without a history are left out" if left_out else "")
        + f"; {describe_windows(len(windows), session_length, max_history, stride)}."
    )
    return GivenSplit(windows, parts["validation"], parts["test"], train, description)


def training_rows(sequences: UserSequences, lengths: np.ndarray) -> np.ndarray:
    """
    (N,) bool, the interactions among all of the table that are read before the first held-out item of their user.

    Args:
        lengths: (U,) number of each user's items for training, the first ones.
    """
    assert sequences.events is not None
    read, first = sequences.histories, sequences.offsets[:-1] + lengths
    assert read.rows is not None
    held_out = first < sequences.offsets[1:]
    stops = np.where(held_out, read.places[np.minimum(first, len(read.places) - 1)], read.offsets[1:])
    training = np.zeros(len(sequences.events.order), dtype=bool)
    training[read.rows[np.arange(len(read.rows)) < np.repeat(stops, np.diff(read.offsets))]] = True
    return training


def lengths_of(sequences: UserSequences, user_ids: np.ndarray) -> np.ndarray:
    """
    (U,) number of each user's items; 0 for users without any.

    Args:
        user_ids: sorted, all users of the sequences among them.

    Example:
        >>> rows = pd.DataFrame({"user_id": [2, 2], "item_id": [5, 6], "timestamp": [0, 1]})
        >>> lengths_of(UserSequences.from_interactions(rows), np.array([1, 2])).tolist()
        [0, 2]
    """
    lengths = np.zeros(len(user_ids), dtype=np.int64)
    lengths[np.searchsorted(user_ids, sequences.user_ids)] = sequences.lengths
    return lengths


def _count_before(sequences: UserSequences, time: int) -> np.ndarray:
    """(U,) number of each user's items before `time`."""
    before = np.concatenate([[0], np.cumsum(sequences.timestamps < time)])
    return before[sequences.offsets[1:]] - before[sequences.offsets[:-1]]


def train_windows(sequences: UserSequences, session_length: int, max_history: int, stride: int) -> datasets.Dataset:
    """
    The windows of training sequences.

    Raises:
        DataError: no user has two items.

    Example:
        >>> rows = pd.DataFrame({"user_id": [1] * 3, "item_id": [5, 6, 7], "timestamp": [0, 1, 2]})
        >>> train_windows(UserSequences.from_interactions(rows), 1, 50, 1)["session"][:]
        [[6], [7]]
    """
    train = window_examples(sequences, session_length, max_history, stride)
    if not len(train):
        raise DataError(
            f"no training examples: none of {len(sequences):,} users has two items left for training. Add data with longer sequences."
        )
    return train


def describe_windows(train: int, session_length: int, max_history: int, stride: int) -> str:
    """
    Describes the training examples, for model cards.

    Example:
        >>> describe_windows(40, 5, 50, 1)[:42]
        'the 40 training examples are per-user slid'
    """
    return (
        f"the {train:,} training examples are per-user sliding windows (up to {session_length} target items after up to "
        f"{max_history} history items, stride {stride}), not logged sessions"
    )
