"""A table of impressions with feedback as data for a reward model: histories, then labelled windows, split by time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from onerec_hf.data.columns import DataError, names_source
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
    Impressions before `history_end` are the users' histories; those after it are cut into windows of 5 to 10 and labelled with the rate of
    every objective in them, see `feedback_windows`. A window lies inside one of three periods: training, validation, test.

    Args:
        source: path of a table, a DataFrame or a `datasets.Dataset`, a row per impression.
        objectives: name of the objective -> column with numbers in [0, 1], null where unknown.
        history_end, validation_start, test_start: instants in the unit of the timestamps; a period begins with its instant.
        items: what is known of the items; one row per id of the table when not given.
        history_objective: only impressions above 0 in this objective enter histories; all when not given.
        min_items, max_items: impressions of a window.
        max_history: latest items of a history.

    Raises:
        DataError: bad columns or values, instants out of order, a period without windows, an impression of an item that `items` lacks.

    Example:
        >>> table = pd.DataFrame({"user_id": [1] * 8, "item_id": range(8), "timestamp": range(8), "like": [0, 1] * 4})
        >>> feedback = load_impressions(table, {"ltr": "like"}, 2, 4, 6, min_items=1, max_items=2)
        >>> feedback.train[0]
        {'user_id': 1, 'history': [0, 1], 'session': [2, 3], 'labels': [0.5]}
    """
    if not objectives:
        raise DataError("impressions: name at least one objective, e.g. objectives={'ltr': 'like'}.")
    if not history_end < validation_start < test_start:
        raise DataError(
            f"impressions: history_end={history_end}, validation_start={validation_start} and test_start={test_start} must follow each other."
        )
    if history_objective is not None and history_objective not in objectives:
        raise DataError(f"impressions: history_objective={history_objective!r} is none of {sorted(objectives)}.")
    log = read_interactions(
        source,
        user_column=user_column,
        item_column=item_column,
        timestamp_column=timestamp_column,
        feedback_columns=sorted(set(objectives.values())),
    )
    items = read_items(pd.DataFrame({"item_id": np.unique(log["item_id"].to_numpy())})) if items is None else items
    items.select(pd.unique(log["item_id"].to_numpy()))  # raises where an impression has no item
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
                f"validation_start={validation_start}, test_start={test_start}. Move them."
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
    return SessionFeedback(
        parts["training"],
        parts["validation"],
        parts["test"],
        list(objectives),
        items,
        [before[user] for user in sorted(before)],
        description,
    )
