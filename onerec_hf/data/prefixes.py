"""
Training on all prefixes of a history in one pass, for causal encoders.

A window (`onerec_hf.data.windows`) is one target session with its history, so the encoder reads a user with n items n - 1 times. In a
causal encoder the states of a prefix do not depend on later items, so one pass over the history serves all target sessions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from onerec_hf.data.lists import list_slices
from onerec_hf.data.sequences import UserSequences
from onerec_hf.data.windows import later_windows, window_bounds

if TYPE_CHECKING:
    import datasets

# Arrow's list offsets are 32 bits; a chunk of nested lists holds about this many items.
_CHUNK_ITEMS = 1 << 24


def prefix_examples(
    sequences: UserSequences,
    session_length: int = 5,
    max_history: int | None = 50,
    stride: int = 1,
    after: np.ndarray | None = None,
) -> datasets.Dataset:
    """
    The sessions of `window_examples`, each exactly once, grouped by the history whose prefixes they follow.

    A session that starts at position s of its user's sequence (after s items) reads

    - all s items if s <= `max_history`: loss and gradient equal those of its window;
    - otherwise a chunk: chunks start at every `max_history // 2`-th item, so the session reads its latest
      `max_history - max_history // 2 + 1` to `max_history` items, while its window has exactly `max_history`.

    They require `encoder_is_causal=True`: a fully visible encoder would see the targets.

    Args:
        session_length: maximum number of items per session.
        max_history: maximum number of items per history, at least 2. None keeps whole histories, and all examples equal the windows.
        stride: step between a user's sessions, as in `window_bounds`.
        after: (U,) number of each user's first items that are no longer targets, as in `window_examples`.

    Returns:
        columns `user_id`, `history` (list of ids), `sessions` (list of lists of ids) and `history_lengths` (list of int64): session k
        follows `history[:history_lengths[k]]`. One row per user or chunk, none for users with fewer than two items.

    Example:
        >>> import pandas as pd
        >>> rows = pd.DataFrame({"user_id": [1] * 5, "item_id": [5, 6, 7, 8, 9], "timestamp": [0, 1, 2, 3, 4]})
        >>> sequences = UserSequences.from_interactions(rows)
        >>> prefix_examples(sequences, session_length=2)[0]
        {'user_id': 1, 'history': [5, 6, 7, 8], 'sessions': [[6, 7], [7, 8], [8, 9], [9]], 'history_lengths': [1, 2, 3, 4]}
        >>> chunks = prefix_examples(sequences, session_length=1, max_history=2)
        >>> list(chunks["history"]), list(chunks["history_lengths"])
        ([[5, 6], [6, 7], [7, 8]], [[1, 2], [2], [2]])
    """
    from datasets import Dataset

    if max_history is not None and max_history < 2:
        raise ValueError(f"max_history ({max_history}) must be at least 2, or None for the whole history.")
    rows, starts, stops = later_windows(window_bounds(sequences.lengths, session_length, stride), after)
    read, user_base = sequences.histories, sequences.offsets[rows]
    # Items before each session, among those that the encoder reads.
    before = read.places[user_base + starts] - read.offsets[rows]
    step = 1 if max_history is None else max_history // 2
    chunk = np.zeros_like(before) if max_history is None else -(-np.maximum(before - max_history, 0) // step)
    # Windows are sorted by row and start, so the windows of one chunk are adjacent.
    first = np.flatnonzero(np.diff(rows, prepend=-1) | np.diff(chunk, prepend=-1))
    counts = np.diff(first, append=len(rows))
    last, users = first + counts - 1, rows[first]
    begins, base = chunk[first] * step, read.offsets[users]
    id_type = pa.int64() if sequences.user_ids.dtype.kind == "i" else pa.string()
    columns = {
        "user_id": pa.array(sequences.user_ids[users], type=id_type),
        "history": list_slices(read.item_ids, base + begins, base + before[last]),
        "sessions": _grouped(sequences.item_ids, user_base + starts, user_base + stops, counts),
        "history_lengths": list_slices(before - np.repeat(begins, counts), first, first + counts),
        **read.columns(users, base + begins, base + before[last]),
    }
    return Dataset(pa.table(columns))


def _grouped(values: np.ndarray, starts: np.ndarray, stops: np.ndarray, counts: np.ndarray) -> pa.ChunkedArray:
    """(E,) lists of `counts[e]` lists, the slices `values[starts[i]:stops[i]]` in order."""
    ends = np.cumsum(counts)
    items = np.concatenate([[0], np.cumsum(stops - starts)])[ends]
    total = int(items[-1]) if len(items) else 0
    cuts = np.searchsorted(items, np.arange(_CHUNK_ITEMS, total, _CHUNK_ITEMS))
    chunks = []
    for first, last in zip([0, *cuts], [*cuts, len(counts)], strict=True):
        offsets = np.concatenate([[0], np.cumsum(counts[first:last])])
        inside = slice(ends[first - 1] if first else 0, ends[last - 1] if last else 0)
        inner = list_slices(values, starts[inside], stops[inside]).combine_chunks()
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), inner))
    return pa.chunked_array(chunks)
