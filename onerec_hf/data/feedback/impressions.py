"""Reward model data from a table of impressions: histories and labelled windows, split by time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from onerec_hf.data.columns import DataError, names_source
from onerec_hf.data.feedback.item_statistics import ItemStatistics
from onerec_hf.data.feedback.kuairand import SessionFeedback
from onerec_hf.data.feedback.windows import feedback_windows
from onerec_hf.data.interactions import ItemTable, read_interactions, read_items

if TYPE_CHECKING:
    from onerec_hf.data.tables import TableSource


@names_source
def load_impressions(
    source: TableSource,
    objectives: Mapping[str, str],
    history_end: float,
    validation_start: float,
    test_start: float,
    *,
    items: ItemTable | None = None,
    history_objective: str | None = None,
    min_items: int = 5,
    max_items: int = 10,
    max_history: int = 50,
    user_column: str = "user_id",
    item_column: str = "item_id",
    timestamp_column: str = "timestamp",
) -> SessionFeedback:
    """
    Impressions before `history_end` form the users' histories. Later impressions are cut into windows of `min_items` to `max_items`, labelled
    with the rate of every objective, see `feedback_windows`. Each window lies inside one of three periods: training, validation, test. Item
    statistics are counted before the training and before the validation windows.

    Args:
        source: path of a table, a DataFrame or a `datasets.Dataset`, one row per impression.
        objectives: objective name -> column with numbers in [0, 1], null if unknown.
        history_end, validation_start, test_start: times in the unit of the timestamps; each starts its period (inclusive).
        items: the item table (default: one row per item id of `source`).
        history_objective: only impressions above 0 in this objective enter histories (default: all).
        min_items, max_items: impressions per window.
        max_history: history items to keep, the latest ones.

    Raises:
        DataError: invalid columns or values, times out of order, a period without windows, an impression of an item missing in `items`.

    Example:
        >>> table = pd.DataFrame({"user_id": [1] * 8, "item_id": range(8), "timestamp": range(8), "like": [0, 1] * 4})
        >>> feedback = load_impressions(table, {"ltr": "like"}, 2, 4, 6, min_items=1, max_items=2)
        >>> feedback.train[0]
        {'user_id': 1, 'history': [0, 1], 'session': [2, 3], 'labels': [0.5]}
    """
    if not objectives:
        raise DataError("impressions: no objectives given. Name at least one, e.g. objectives={'ltr': 'like'}.")
    if not history_end < validation_start < test_start:
        raise DataError(
            f"impressions: history_end={history_end}, validation_start={validation_start} and test_start={test_start} are not in ascending order. Reorder them."
        )
    if history_objective is not None and history_objective not in objectives:
        raise DataError(
            f"impressions: history_objective={history_objective!r} is unknown. Choose one of {sorted(objectives)}."
        )
    log = read_interactions(
        source,
        user_column=user_column,
        item_column=item_column,
        timestamp_column=timestamp_column,
        feedback_columns=sorted(set(objectives.values())),
    )
    items = read_items(pd.DataFrame({"item_id": np.unique(log["item_id"].to_numpy())})) if items is None else items
    items.select(pd.unique(log["item_id"].to_numpy()))  # raises if an impression's item is missing
    times = log["timestamp"].to_numpy()
    past: Any = log[times < history_end]
    if history_objective is not None:
        past = past[past[objectives[history_objective]] > 0]
    histories = {user: rows.tolist()[-max_history:] for user, rows in past.groupby("user_id")["item_id"]}
    periods = {
        "training": (times >= history_end) & (times < validation_start),
        "validation": (times >= validation_start) & (times < test_start),
        "test": times >= test_start,
    }
    parts: dict[str, Any] = {}
    for name, within in periods.items():
        if not within.any():
            raise DataError(
                f"impressions: no {name} rows among timestamps {times.min()} to {times.max()} with history_end={history_end}, "
                f"validation_start={validation_start}, test_start={test_start}. Change these times."
            )
        period: Any = log[within]
        parts[name] = feedback_windows(period, objectives, histories, min_items, max_items)
    before: dict[Any, np.ndarray] = {
        user: rows.to_numpy() for user, rows in log[times < validation_start].groupby("user_id")["item_id"]
    }
    description = (
        f"{len(log):,} impressions of {log['user_id'].nunique():,} users. Per-user windows of {min_items} to {max_items} impressions inside each "
        f"period, not logged sessions: {len(parts['training']):,} of training (timestamps from {history_end}), {len(parts['validation']):,} of "
        f"validation (from {validation_start}), {len(parts['test']):,} of test (from {test_start}). Histories: the latest {max_history} "
        f"{'impressions' if history_objective is None else f'impressions with {history_objective} above 0'} before {history_end}."
    )
    index = pd.Index(items.item_ids).get_indexer(pd.Index(log["item_id"]))
    values = log[list(objectives.values())].to_numpy(dtype=np.float64, na_value=np.nan)
    earlier, later = (
        ItemStatistics.count(index[times < end], values[times < end], len(items.item_ids))
        for end in (history_end, validation_start)
    )
    return SessionFeedback(
        parts["training"],
        parts["validation"],
        parts["test"],
        list(objectives),
        items,
        [before[user] for user in sorted(before)],
        description,
        earlier,
        later,
    )
