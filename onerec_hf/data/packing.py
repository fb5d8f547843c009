"""
Padding-free training: examples of unequal length packed into rows of equal size.

A packed row has a capacity of history items and of sessions and holds as many examples as fit. Samplers shuffle rows, the batch size
counts rows, and all batches have the same shapes, so `torch.compile` compiles once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from onerec_hf.data.collators import PREFIXES_OF_PATHWAYS
from onerec_hf.modeling.feature_codes import FEATURE_COLUMNS

if TYPE_CHECKING:
    import datasets


#: Columns of training examples that collators read.
EXAMPLE_COLUMNS = ("history", "session", "sessions", "history_lengths", "history_positive", *FEATURE_COLUMNS)


def example_sizes(
    dataset: datasets.Dataset,
    max_history: int | None = None,
    static_places: int = 0,
    pathways: Mapping[str, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """
    Sizes of windows (`history`, `session`) or prefixes (`history`, `sessions`, `history_lengths`).

    Args:
        max_history: number of latest history items that the model reads of a window.
        static_places: places before the first item ([`OneRecProcessor`]'s `static_places`: one where users have features), counted as items.
        pathways: sizes of the processor's pathways: an item may be read twice, as one of the latest and as a positive one.

    Returns:
        (E,) history items and (E,) sessions per example, and the number of items in the longest session.

    Raises:
        ValueError: unknown columns, prefixes of a history longer than `max_history`, or prefixes with pathways.

    Example:
        >>> from datasets import Dataset
        >>> windows = Dataset.from_dict({"history": [[1, 2, 3], [4]], "session": [[5, 6], [7]]})
        >>> [size.tolist() for size in example_sizes(windows, max_history=2)[:2]], example_sizes(windows)[2]
        ([[2, 1], [1, 1]], 2)
    """
    columns = set(dataset.column_names)
    table: pa.Table = dataset.with_format("arrow")[:]
    if {"history", "sessions", "history_lengths"} <= columns:
        if pathways is not None:
            raise ValueError(PREFIXES_OF_PATHWAYS)
        items, counts = _lengths(table["history"]), _lengths(table["sessions"])
        session_items = _lengths(pc.call_function("list_flatten", [table["sessions"]]))
        if max_history is not None and items.max(initial=0) > max_history:
            raise ValueError(
                f"prefixes of histories of up to {items.max()} items exceed the processor's max_history of {max_history}; create them "
                f"with prefix_examples(..., max_history={max_history})"
            )
    elif {"history", "session"} <= columns:
        items, session_items = _lengths(table["history"]), _lengths(table["session"])
        items = items if max_history is None else np.minimum(items, max_history)
        if pathways is not None:
            items = np.minimum(items, pathways["short_term"]) + np.minimum(
                _positives(table, items), pathways["positive"]
            )
        counts = np.ones_like(items)
    else:
        raise ValueError(
            f"training needs the columns history and session (windows), or history, sessions and history_lengths (prefixes); got "
            f"{sorted(columns)}"
        )
    return items + static_places, counts, int(session_items.max(initial=0))


def _positives(table: pa.Table, items: np.ndarray) -> np.ndarray:
    """(E,) how many of the latest `items` interactions of each history were positive."""
    if "history_positive" not in table.column_names:  # all of them
        return items
    lists = table["history_positive"]
    counts = np.append(0, np.cumsum(pc.call_function("list_flatten", [lists]).to_numpy()))
    ends = np.cumsum(_lengths(lists))
    return counts[ends] - counts[ends - items]


def _lengths(lists: pa.ChunkedArray) -> np.ndarray:
    return pc.call_function("list_value_length", [lists]).to_numpy().astype(np.int64)


def pack_rows(items: np.ndarray, sessions: np.ndarray, capacity: int, slots: int, seed: int = 0) -> list[np.ndarray]:
    """
    Assigns examples to rows, longest first, each to the row with the most free capacity. Handles about a million examples per second.

    The minimum number of rows is open from the start, so long and short examples mix and rows hold similar numbers of sessions. Best-fit
    decreasing fills one row after another and leaves rows of short examples only, which run out of slots: on Beauty's windows it fills 80
    to 90% of the capacity, while this method fills all rows but the last.

    Args:
        items, sessions: (E,) sizes of the examples.
        capacity, slots: maximum number of items and of sessions per row.
        seed: shuffles examples of equal length, so that neighbours in the data are separated.

    Returns:
        for each row, the indices of its examples.

    Raises:
        ValueError: an example exceeds the capacity of a row.

    Example:
        >>> [row.tolist() for row in pack_rows(np.array([2, 5, 3, 6]), np.ones(4, dtype=int), capacity=8, slots=2)]
        [[1, 2], [3, 0]]
    """
    for name, sizes, limit in (("history items", items, capacity), ("sessions", sessions, slots)):
        if sizes.max(initial=0) > limit:
            raise ValueError(
                f"an example has {sizes.max()} {name}, but a packed row holds {limit}; raise packing_length"
            )
    shuffled = np.random.default_rng(seed).permutation(len(items))
    order = shuffled[np.argsort(-items[shuffled], kind="stable")]
    rows: list[list[int]] = [[] for _ in range(-(-int(items.sum()) // capacity))]
    free_slots = [slots] * len(rows)
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    by_room[capacity] = list(range(len(rows)))
    rooms = 1 << capacity  # bit r is set if some row has room for r items
    for example, size, count in zip(order.tolist(), items[order].tolist(), sessions[order].tolist(), strict=True):
        row, room, candidates = len(rows), capacity, rooms >> size << size
        while candidates:
            most = candidates.bit_length() - 1
            if free_slots[by_room[most][-1]] >= count:
                row, room = by_room[most].pop(), most
                if not by_room[most]:
                    rooms &= ~(1 << most)
                break
            candidates &= ~(1 << most)
        if row == len(rows):
            rows.append([])
            free_slots.append(slots)
        rows[row].append(example)
        free_slots[row] -= count
        if free_slots[row] and room > size:
            by_room[room - size].append(row)
            rooms |= 1 << (room - size)
    return [np.asarray(row) for row in rows]


class PackedDataset:
    """
    Map-style dataset of windows or prefixes packed into rows of up to `packing_length` history items. Row i is `{"examples": [example, ...]}`,
    for [`PackedDataCollator`]. It stores indices of examples, not copies.

    Args:
        dataset: windows (`history`, `session`) or prefixes (`history`, `sessions`, `history_lengths`).
        packing_length: history items per row; at least the longest history.
        max_history: number of latest history items that the model reads of a window.
        static_places, pathways: as for [`example_sizes`].
        seed: shuffles examples of equal length.

    Attributes:
        items: `packing_length`.
        slots: maximum number of sessions per row.
        session_items: number of items in the longest session.
        fill: used share of the rows' capacity for history items.

    Raises:
        ValueError: unknown columns, an empty dataset, a history longer than `packing_length`.

    Example:
        >>> from datasets import Dataset
        >>> windows = Dataset.from_dict({"history": [[1], [1, 2], [1, 2, 3]], "session": [[2], [3], [4]]})
        >>> packed = PackedDataset(windows, packing_length=4)
        >>> len(packed), packed.fill, [example["history"] for example in packed[0]["examples"]]
        (2, 0.75, [[1, 2], [1]])
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        packing_length: int,
        max_history: int | None = None,
        seed: int = 0,
        static_places: int = 0,
        pathways: Mapping[str, int] | None = None,
    ):
        items, sessions, self.session_items = example_sizes(dataset, max_history, static_places, pathways)
        if not len(items):
            raise ValueError("the dataset to pack has no examples")
        self.items = packing_length
        read = [name for name in dataset.column_names if name in EXAMPLE_COLUMNS]
        self.dataset = dataset.select_columns(read).with_format(None)
        # Each slot costs a decoder row, used or not. 20% above an even spread lets rows differ.
        even = packing_length * sessions.sum() / items.sum()
        slots = int(max(min(1.2 * even, packing_length), sessions.max()))
        self.rows = pack_rows(items, sessions, packing_length, slots, seed)
        self.slots = max(int(sessions[row].sum()) for row in self.rows)
        self.fill = float(items.sum() / (len(self.rows) * packing_length))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[dict[str, Any]]]:
        return self.__getitems__([i])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, list[dict[str, Any]]]]:
        rows = [self.rows[i] for i in numbers]
        columns = self.dataset[np.concatenate(rows).tolist()]
        examples = iter([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
        return [{"examples": [next(examples) for _ in row]} for row in rows]
