"""High-value sessions by the paper's criteria (arXiv 2502.18965, the definition of S), each criterion a parameter."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from onerec_hf.data.columns import DataError, canonical_ids, column_of, require_columns
from onerec_hf.data.positives import PositiveFeedback, numeric_column
from onerec_hf.data.windows import examples

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class SessionCriteria:
    """
    Criteria for high-value sessions. A session must meet all of them; the paper does not say whether they are joined by "and" or "or",
    and gives no threshold for the watch time.

    Args:
        min_views: minimum number of watched videos (5 in the paper).
        min_watch_time: the summed watch time must exceed this value, in the column's unit. None disables the criterion.
        watch_time_column: column of the watch time.
        view_column: a row counts as watched if this column is above 0. None counts every row.
        require_interaction_columns: at least one row must be above 0 in one of these columns (likes, collects, shares). Empty disables the
            criterion.

    Example:
        >>> SessionCriteria(min_views=2, require_interaction_columns=("like",)).min_views
        2
    """

    min_views: int = 5
    min_watch_time: float | None = None
    watch_time_column: str = "watch_time"
    view_column: str | None = None
    require_interaction_columns: tuple[str, ...] = ()


def find_sessions(
    interactions: pd.DataFrame, criteria: SessionCriteria, gap_seconds: float | None = None
) -> pd.DataFrame:
    """
    The rows of all sessions that meet the criteria, sorted by user and time.

    Args:
        interactions: `user_id`, `timestamp` and the criteria's columns. `session_id`, if present, marks a user's sessions;
            otherwise a pause of more than `gap_seconds` starts a new session.
        gap_seconds: in the timestamps' unit (seconds). Ignored if there is a `session_id`.

    Returns:
        the rows with all their columns and `session_id` (derived sessions are numbered 0, 1, ... across users).

    Raises:
        DataError: neither `session_id` nor `gap_seconds`, a missing or non-numeric criterion column, no session meets the criteria.

    Example:
        >>> rows = pd.DataFrame({"user_id": [1, 1, 1], "item_id": [7, 8, 9], "timestamp": [0, 10, 5000]})
        >>> find_sessions(rows, SessionCriteria(min_views=2), gap_seconds=60)["item_id"].tolist()
        [7, 8]
    """
    rows, sessions = _sessionise(interactions, gap_seconds)
    return rows.loc[_qualifying(rows, sessions, criteria)[sessions]].reset_index(drop=True)


def session_examples(
    interactions: pd.DataFrame,
    criteria: SessionCriteria,
    positive: PositiveFeedback,
    session_length: int = 5,
    max_history: int | None = None,
    gap_seconds: float | None = None,
) -> datasets.Dataset:
    """
    One example per session that meets the criteria: its first `session_length` positive items, with the user's earlier positive items as history.

    Returns:
        columns `user_id`, `history` (list of the last `max_history` ids), `session` (list of ids); sorted by user and session.

    Raises:
        DataError: as `find_sessions` and `PositiveFeedback.apply`, or no session remains.

    Warns:
        UserWarning: sessions without a positive item, or without a positive item before them, were skipped (with their number).

    Example:
        >>> rows = pd.DataFrame({"user_id": [1] * 4, "item_id": [6, 7, 8, 9], "timestamp": [0, 1, 500, 501], "like": [1, 1, 1, 0]})
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # the first session has no history
        ...     data = session_examples(rows, SessionCriteria(min_views=2), PositiveFeedback({"like": 1}), gap_seconds=60)
        >>> data[0]
        {'user_id': 1, 'history': [6, 7], 'session': [8]}
    """
    if session_length < 1 or (max_history is not None and max_history < 1):
        raise ValueError(f"session_length ({session_length}) and max_history ({max_history}) must be at least 1.")
    rows, sessions = _sessionise(interactions, gap_seconds)
    qualifying = _qualifying(rows, sessions, criteria)

    # User and time form one sorted key, so a user's positives before a session are the slice between two keys.
    users, user_ids = pd.factorize(canonical_ids(column_of(rows, "user_id"), "user_id"))
    instants = np.unique(rows["timestamp"].to_numpy(), return_inverse=True)[1]
    first_key = users.astype(np.int64) * len(rows)
    positives = positive.apply(rows.assign(_session=sessions, _key=first_key + instants))
    items, positive_keys = canonical_ids(column_of(positives, "item_id"), "item_id"), positives["_key"].to_numpy()
    first_row = np.unique(sessions, return_index=True)[
        1
    ]  # rows are in time order, so a session's first row is its start
    stops = np.searchsorted(positive_keys, (first_key + instants)[first_row])
    starts = np.searchsorted(positive_keys, first_key[first_row])
    if max_history is not None:
        starts = np.maximum(starts, stops - max_history)

    # Positives sorted by session (stable, so in time order within a session).
    positive_sessions = positives["_session"].to_numpy()
    by_session = np.argsort(positive_sessions, kind="stable")
    counts = np.bincount(positive_sessions, minlength=len(first_row))
    session_starts = np.cumsum(counts) - counts

    empty, new = qualifying & (counts == 0), qualifying & (counts > 0) & (stops == starts)
    usable = qualifying & (counts > 0) & (stops > starts)
    skipped = (
        f"{empty.sum() + new.sum():,} of {qualifying.sum():,} qualifying sessions skipped: {empty.sum():,} without a positive item, "
        f"{new.sum():,} without a positive item before them"
    )
    if not usable.any():
        raise DataError(f"sessions: none remain, {skipped}. Loosen the positive rule, or use per-user windows.")
    if empty.any() or new.any():
        warnings.warn(f"sessions: {skipped}.")
    session_stops = session_starts + np.minimum(counts, session_length)
    return examples(
        np.asarray(user_ids)[users[first_row][usable]],
        (items, starts[usable], stops[usable]),
        (items[by_session], session_starts[usable], session_stops[usable]),
    )


def _sessionise(interactions: pd.DataFrame, gap_seconds: float | None) -> tuple[pd.DataFrame, np.ndarray]:
    """The rows sorted by user and time, and the session number of each row (0..S-1 in order of first appearance)."""
    require_columns(interactions, ["user_id", "item_id", "timestamp"], "interactions")
    if not len(interactions):
        raise DataError("interactions: the table has no rows.")
    users = pd.factorize(canonical_ids(column_of(interactions, "user_id"), "user_id"), sort=True)[0]
    order = np.lexsort((interactions["timestamp"].to_numpy(), users))
    rows, users = interactions.iloc[order].reset_index(drop=True), users[order]
    if "session_id" in rows.columns:
        # Session ids may be numbered per user, so only (user, session id) identifies a session.
        ids = pd.factorize(canonical_ids(column_of(rows, "session_id"), "session_id"))[0]
        return rows, pd.factorize(users.astype(np.int64) * len(rows) + ids)[0]
    if gap_seconds is None:
        raise DataError(
            "interactions: no column 'session_id'. Pass gap_seconds, the pause that ends a session, or train on per-user windows "
            "(leave_one_out, temporal_split)."
        )
    pause = np.diff(rows["timestamp"].to_numpy()) > gap_seconds
    sessions = np.concatenate([[0], np.cumsum(pause | (np.diff(users) != 0))])
    return rows.assign(session_id=sessions), sessions


def _qualifying(rows: pd.DataFrame, sessions: np.ndarray, criteria: SessionCriteria) -> np.ndarray:
    """(S,) bool: which sessions meet all criteria."""
    acting = list(criteria.require_interaction_columns)
    view = [] if criteria.view_column is None else [criteria.view_column]
    watch = [] if criteria.min_watch_time is None else [criteria.watch_time_column]
    require_columns(rows, view + watch + acting, "session criteria")
    viewed = numeric_column(rows, view[0]) > 0 if view else np.ones(len(rows), dtype=bool)
    met = {f"at least {criteria.min_views} views": np.bincount(sessions, weights=viewed) >= criteria.min_views}
    if criteria.min_watch_time is not None:
        watched = np.nan_to_num(numeric_column(rows, criteria.watch_time_column))
        name = f"{criteria.watch_time_column} above {criteria.min_watch_time:g}"
        met[name] = np.bincount(sessions, weights=watched) > criteria.min_watch_time
    if acting:
        acted = np.any([numeric_column(rows, column) > 0 for column in acting], axis=0)
        met[f"a row with {' or '.join(acting)}"] = np.bincount(sessions, weights=acted) > 0
    qualifying = np.all(list(met.values()), axis=0)
    if not qualifying.any():
        failed = "; ".join(f"{(~passed).sum():,} miss '{name}'" for name, passed in met.items())
        raise DataError(
            f"sessions: none of {len(qualifying):,} meets all criteria: {failed}. Loosen one, widen gap_seconds, or use per-user "
            "windows."
        )
    return qualifying
