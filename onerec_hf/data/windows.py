"""
Sliding-window training examples from user sequences, for data without session ids.

An example is a `history` and the `session` that follows it. Both are slices of a flat array, so a million examples are one Arrow gather.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from onerec_hf.data.lists import list_slices
from onerec_hf.data.sequences import UserSequences

if TYPE_CHECKING:
    import datasets

#: Column of held-out examples: when the request was made, in the table's unit.
REQUEST_TIME = "request_time"


def window_bounds(
    lengths: np.ndarray, session_length: int = 5, stride: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Start and stop of each window's session, for sequences of the given lengths. Sequences with fewer than two items have no windows.

    With `stride` 1 a session starts at every position 1..n-1, so every item is the first target once; the last sessions are shorter.
    A larger stride places sessions from the end, so the last item is always covered and only the first session may be shorter.
    `stride == session_length` makes every position 1..n-1 a target exactly once.

    Args:
        lengths: (U,) sequence lengths.

    Returns:
        (W,) row of the sequence, (W,) start and (W,) stop of the session inside it, sorted by row and start.

    Example:
        >>> [bounds.tolist() for bounds in window_bounds(np.array([4, 1]), session_length=2)]
        [[0, 0, 0], [1, 2, 3], [3, 4, 4]]
        >>> [bounds.tolist() for bounds in window_bounds(np.array([6]), session_length=2, stride=2)]
        [[0, 0, 0], [1, 2, 4], [2, 4, 6]]
    """
    if session_length < 1 or stride < 1:
        raise ValueError(f"session_length ({session_length}) and stride ({stride}) must be at least 1.")
    lengths = np.asarray(lengths, dtype=np.int64)
    if stride == 1:
        counts = np.maximum(lengths - 1, 0)
    else:
        # Steps back until position 1 is covered or no target remains.
        steps_to_cover = -(-np.maximum(lengths - session_length - 1, 0) // stride)
        counts = np.where(lengths >= 2, 1 + np.minimum(steps_to_cover, (lengths - 2) // stride), 0)
    rows = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    if stride == 1:
        starts = 1 + nth
        return rows, starts, np.minimum(starts + session_length, lengths[rows])
    stops = lengths[rows] - stride * (counts[rows] - 1 - nth)
    return rows, np.maximum(stops - session_length, 1), stops


def window_examples(
    sequences: UserSequences,
    session_length: int = 5,
    max_history: int | None = 50,
    stride: int = 1,
    after: np.ndarray | None = None,
) -> datasets.Dataset:
    """
    Sliding windows over every user's sequence: up to `session_length` target items after up to `max_history` history items.

    Args:
        after: (U,) number of each user's first items that are no longer targets: only windows with a later target are returned.

    Returns:
        columns `user_id`, `history` (list of ids, never empty), `session` (list of ids); see `window_bounds` for the positions.

    Example:
        >>> import pandas as pd
        >>> rows = pd.DataFrame({"user_id": [1] * 4, "item_id": [5, 6, 7, 8], "timestamp": [0, 1, 2, 3]})
        >>> windows = window_examples(UserSequences.from_interactions(rows), session_length=2, max_history=2)
        >>> list(windows["history"]), list(windows["session"])
        ([[5], [5, 6], [6, 7]], [[6, 7], [7, 8], [8]])
    """
    if max_history is not None and max_history < 1:
        raise ValueError(f"max_history ({max_history}) must be at least 1, or None for the whole history.")
    from datasets import Dataset

    rows, starts, stops = later_windows(window_bounds(sequences.lengths, session_length, stride), after)
    base = sequences.offsets[rows]
    return Dataset(cut(sequences, rows, base + starts, base + stops, max_history))


def later_windows(
    bounds: tuple[np.ndarray, np.ndarray, np.ndarray], after: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    The windows of `window_bounds` with a target behind the first `after` items of their sequence; all of them when None.

    Example:
        >>> [part.tolist() for part in later_windows(window_bounds(np.array([4, 3]), session_length=1), np.array([3, 0]))]
        [[0, 1, 1], [3, 1, 2], [4, 2, 3]]
    """
    rows, starts, stops = bounds
    if after is None:
        return bounds
    later = stops > after[rows]
    return rows[later], starts[later], stops[later]


def cut(
    sequences: UserSequences,
    users: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    max_history: int | None = None,
    times: bool = False,
) -> pa.Table:
    """
    Examples of sequences as an Arrow table: what is read before each session, and the session. Where the sequences have features, columns of their
    codes too (see [`Histories.columns`]).

    Args:
        users: (E,) rows of the users.
        starts, stops: (E,) slices of `sequences.item_ids`: the sessions.
        max_history: at most so many items of a history, the latest.
        times: a column `request_time` too, int64: the time of each session's first item, where the table has times.

    Example:
        >>> import pandas as pd
        >>> rows = pd.DataFrame({"user_id": [1] * 3, "item_id": [5, 6, 7], "timestamp": [0, 1, 2]})
        >>> sequences = UserSequences.from_interactions(rows)
        >>> cut(sequences, np.array([0]), np.array([2]), np.array([3]), max_history=1).to_pylist()
        [{'user_id': 1, 'history': [6], 'session': [7]}]
    """
    read = sequences.histories
    ends, begins = read.places[starts], read.offsets[users]
    if max_history is not None:
        begins = np.maximum(ends - max_history, begins)
    table = example_table(
        sequences.user_ids[users], (read.item_ids, begins, ends), (sequences.item_ids, starts, stops)
    )
    for name, column in read.columns(users, begins, ends).items():
        table = table.append_column(name, column)
    if times and sequences.timed:
        table = table.append_column(REQUEST_TIME, pa.array(sequences.timestamps[starts]))
    return table


def request_times(held_out: Any) -> np.ndarray | None:
    """
    (users,) int64 times of the requests of held-out examples, a dataset or its columns by name; None where they have none.

    Example:
        >>> request_times({"history": [[7]], "request_time": [30]}).tolist()
        [30]
    """
    names = getattr(held_out, "column_names", None) or list(held_out)
    if REQUEST_TIME not in names:
        return None
    from onerec_hf.modeling.item_evidence import as_times

    times = as_times(held_out[REQUEST_TIME])
    return None if times is None else times.numpy()


def examples(
    user_ids: np.ndarray,
    history: tuple[np.ndarray, np.ndarray, np.ndarray],
    session: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> datasets.Dataset:
    """
    A Dataset of (history, session) examples from slices of flat id arrays.

    Args:
        user_ids: (E,) ids.
        history, session: flat ids, (E,) starts and (E,) stops of each example's slice.

    Example:
        >>> items = np.array([5, 6, 7])
        >>> examples(np.array([1]), (items, np.array([0]), np.array([2])), (items, np.array([2]), np.array([3])))[0]
        {'user_id': 1, 'history': [5, 6], 'session': [7]}
    """
    from datasets import Dataset

    return Dataset(example_table(user_ids, history, session))


def example_table(
    user_ids: np.ndarray,
    history: tuple[np.ndarray, np.ndarray, np.ndarray],
    session: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> pa.Table:
    """
    `examples` as an Arrow table.

    Example:
        >>> items = np.array([5, 6, 7])
        >>> example_table(np.array([1]), (items, np.array([0]), np.array([2])), (items, np.array([2]), np.array([3]))).column_names
        ['user_id', 'history', 'session']
    """
    id_type = pa.int64() if user_ids.dtype.kind == "i" else pa.string()
    columns = {
        "user_id": pa.array(user_ids, type=id_type),
        "history": list_slices(*history),
        "session": list_slices(*session),
    }
    return pa.table(columns)
