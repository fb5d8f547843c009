"""Advantages of logged impressions by their play time (OneRec-V2's duration-aware reward), as samples for policy optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from onerec_hf.data.columns import DataError, column_of, names_source
from onerec_hf.data.feedback.watch_time import duration_bucket, milliseconds
from onerec_hf.data.interactions import read_interactions
from onerec_hf.data.windows import example_table

if TYPE_CHECKING:
    import datasets

    from onerec_hf.data.sequences import UserSequences
    from onerec_hf.data.tables import TableSource


def duration_rewards(users, play_ms, duration_ms, disliked=None, base: float = 2.0, top: float = 0.25) -> np.ndarray:
    """
    The duration-aware reward of impressions (arXiv 2508.20900, section 4): an impression's play time has a percentile among those of the same user
    and of items of similar duration (`floor(log_base(seconds))`). The reward is 1 where that is among the `top` share of all impressions, -1 for a
    dislike, and 0 otherwise. Percentiles are mid-ranks: an impression that is alone in its bucket has 1/2.

    Args:
        users: (N,) user ids.
        play_ms, duration_ms: (N,) milliseconds, finite and not negative; a duration of 0 is unknown.
        disliked: (N,) whether the user disliked the item.

    Returns:
        (N,) float64 of -1, 0 and 1.

    Raises:
        DataError: no rows, or times that are negative or not finite (their number and the first).

    Example:
        >>> duration_rewards([1] * 4, [1000, 2000, 3000, 9000], [10_000] * 4).tolist()
        [0.0, 0.0, 0.0, 1.0]
        >>> duration_rewards([1] * 4, [1000, 2000, 3000, 9000], [10_000] * 4, disliked=[0, 1, 0, 1]).tolist()
        [0.0, -1.0, 0.0, -1.0]
    """
    if not 0 < top < 1:
        raise ValueError(f"top={top} must be between 0 and 1")
    play, duration = milliseconds(play_ms, "play time"), milliseconds(duration_ms, "duration")
    if not len(play):
        raise DataError("impressions: no rows to rank play times among. Change the time range.")
    table = pd.DataFrame({"user": np.asarray(users), "bucket": duration_bucket(duration, base), "play": play})
    group: Any = table.groupby(["user", "bucket"])["play"]
    percentile = ((group.rank(method="average") - 0.5) / group.transform("size")).to_numpy()
    best = percentile > np.quantile(percentile, 1 - top, method="inverted_cdf")
    rewards = best.astype(np.float64)
    if disliked is not None:
        rewards[np.asarray(disliked, dtype=bool)] = -1.0
    return rewards


@names_source
def logged_samples(
    source: TableSource,
    sequences: UserSequences,
    catalogue: Any,
    *,
    play_time_column: str = "play_time_ms",
    duration_column: str = "duration_ms",
    dislike_column: str | None = None,
    user_column: str = "user_id",
    item_column: str = "item_id",
    timestamp_column: str = "timestamp",
    max_history: int = 50,
    exclude_seen: bool = True,
) -> tuple[datasets.Dataset, str]:
    """
    Impressions as samples of another policy for `OneRecGRPOTrainer`: rows with `user_id`, `history`, `session` (the item) and `advantage`
    ([`duration_rewards`]).

    A history is the user's training interactions before the impression; where the sequences have features, columns of their codes too, as examples have
    ([`~onerec_hf.data.events.Histories`]). Impressions from the user's last training interaction on are left out: they
    would show what is held out. So are those of items that the catalogue lacks and, with `exclude_seen`, of items of the history.

    Args:
        source: path of a table, a DataFrame or a `datasets.Dataset`, one row per impression.
        sequences: the users' training interactions.
        catalogue: the model's `ItemCatalogue`.
        dislike_column: a column with numbers above 0 for dislikes.

    Returns:
        The rows, and a sentence with counts.

    Raises:
        DataError: missing columns or values, ids of another type than the interactions', or no impression left.

    Example:
        >>> rows, note = logged_samples("log.csv", dataset.train_sequences, processor.catalogue)  # doctest: +SKIP
    """
    from datasets import Dataset

    wanted = [play_time_column, duration_column, *([dislike_column] if dislike_column else [])]
    log = read_interactions(
        source,
        user_column=user_column,
        item_column=item_column,
        timestamp_column=timestamp_column,
        feedback_columns=wanted,
    )
    users = log["user_id"].to_numpy()
    if (users.dtype.kind in "iu") != (sequences.user_ids.dtype.kind in "iu"):
        raise DataError(
            f"impressions: user ids are of another type than those of the interactions (first: {users[0]!r}, {sequences.user_ids[0]!r}). "
            "Write them in the same form."
        )
    for column in wanted:
        if missing := int(column_of(log, column).isna().sum()):
            raise DataError(f"impressions: column {column!r} has {missing} missing values. Drop or fill them.")
    disliked = None if dislike_column is None else log[dislike_column].to_numpy() > 0
    rewards = duration_rewards(users, log[play_time_column], log[duration_column], disliked)
    rows = np.searchsorted(sequences.user_ids, users).clip(max=len(sequences) - 1)
    known = sequences.user_ids[rows] == users
    found = catalogue.indices(log["item_id"].tolist(), unknown="mask")
    in_catalogue = (found >= 0) & catalogue.active[found]
    read = sequences.histories
    read_at = sequences.timestamps
    if read.rows is not None and sequences.events is not None:  # with interactions that are no targets
        read_at = sequences.events.timestamps[read.rows]
    kept: list[tuple[int, int, int, int]] = []
    seen = 0
    times, items = log["timestamp"].to_numpy(), log["item_id"].to_numpy()
    for place in np.flatnonzero(known & in_catalogue).tolist():
        row, time = int(rows[place]), times[place]
        own = sequences.timestamps[slice(*sequences.offsets[row : row + 2])]
        if not own[0] < time < own[-1]:
            continue
        first, last = read.offsets[row : row + 2].tolist()
        stop = first + int(np.searchsorted(read_at[first:last], time))
        start = max(first, stop - max_history)
        had = read.item_ids[start:stop]
        if read.positive is not None:
            had = had[read.positive[start:stop]]
        if exclude_seen and items[place] in had.tolist():
            seen += 1
            continue
        kept.append((place, row, start, stop))
    if not kept:
        raise DataError(
            f"impressions: none of {len(log):,} rows is of a user with training interactions before and after it and of an item of the catalogue. "
            "Check ids and timestamps."
        )
    places, users_of, starts, stops = np.array(kept).T
    advantages = rewards[places]
    note = (
        f"{len(kept):,} of {len(log):,} impressions: {int((advantages > 0).sum()):,} with advantage 1, {int((advantages < 0).sum()):,} with -1; left out are "
        f"{int((~in_catalogue).sum()):,} of items that the catalogue lacks, {seen:,} of items of the history, the others of unknown users or from their last "
        "training interaction on"
    )
    each = np.arange(len(kept))
    table = example_table(
        sequences.user_ids[users_of], (read.item_ids, starts, stops), (items[places], each, each + 1)
    ).append_column("advantage", pa.array(advantages))
    for name, column in read.columns(users_of, starts, stops).items():
        table = table.append_column(name, column)
    return Dataset(table), note
