"""The split of a table in memory as its settings say: each user's last items, by time, or given tables."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from onerec_hf.workflows.settings import DataSettings

if TYPE_CHECKING:
    import pandas as pd

    from onerec_hf.data import Split, UserSequences
    from onerec_hf.data.feature_tables import FeatureTables
    from onerec_hf.data.tables import TableSource

HOLDOUTS = ("last", "temporal", "given")
#: Shares of the interactions before the validation and the test period, where their starts are not given.
BEFORE_VALIDATION, BEFORE_TEST = 0.8, 0.9
# Items of a held-out session, at most: the rest of a long period has no part in the metrics.
_TARGETS = 50


def check_holdout(settings: DataSettings) -> None:
    """
    Raises:
        ValueError: an unknown holdout, or options of another one.
    """
    if settings.holdout not in HOLDOUTS:
        raise ValueError(f"--holdout {settings.holdout}: choose one of {', '.join(HOLDOUTS)}")
    for options, holdout in (
        (("validation_start", "test_start"), "temporal"),
        (("validation_interactions", "test_interactions"), "given"),
    ):
        for option in options:
            if (getattr(settings, option) is not None) and settings.holdout != holdout:
                raise ValueError(f"--{option} goes with --holdout {holdout}; pass both or neither")
            if getattr(settings, option) is None and settings.holdout == holdout == "given":
                raise ValueError(f"--holdout given needs --{option}: the table of these targets")


def read_parts(
    settings: DataSettings, validation: TableSource | None = None, test: TableSource | None = None
) -> list[pd.DataFrame]:
    """
    The tables of validation and test targets; none of another holdout.

    Args:
        validation, test: tables in memory, in place of the settings' paths.
    """
    from onerec_hf.data import read_interactions

    if settings.holdout != "given":
        return []
    names = ("user_column", "item_column", "timestamp_column", "column_names")
    columns = {name: getattr(settings, name) for name in names}
    return [
        read_interactions(path if table is None else table, **columns)
        for path, table in ((settings.validation_interactions, validation), (settings.test_interactions, test))
    ]


class SplitTable(NamedTuple):
    """
    A table's sequences and their split.

    Args:
        sequences: all that are kept.
        said: of the features; empty without any.
    """

    sequences: UserSequences
    split: Split
    said: str = ""


def split_table(
    tables: list[UserSequences], settings: DataSettings, features: FeatureTables | None = None
) -> SplitTable:
    """
    All kept sequences of a table and its split.

    Args:
        tables: positive interactions; with `holdout="given"` those for training, for validation and for test.
        features: codes the interactions of the tables, whose sequences come from it.

    Raises:
        ValueError, DataError: too few interactions of frequent items, or periods outside the data's times.
    """
    from onerec_hf.data import DataError, given_split

    for name in ("user_ids", "item_ids"):
        if len({getattr(part, name).dtype for part in tables}) > 1:
            raise ValueError(
                f"--holdout given: {name} are integers in one table and texts in another; write them alike"
            )
    sequences, tables = kept_sequences(tables, settings)
    if settings.holdout == "last":
        return SplitTable(*split_last(sequences, settings, features))
    said = ""
    if features is not None:
        sequences, said = features.coded(sequences, training_interactions(sequences, tables, settings, features))
    if settings.holdout == "temporal":
        return SplitTable(sequences, split_by_time(sequences, settings, sequences.timestamps), said)
    if features is not None:
        tables = [replace(part, events=sequences.events) for part in tables]
    sizes = (settings.session_length, settings.max_history, settings.stride)
    try:
        train, validation, test = tables
        split = given_split(train, validation, test, *sizes, targets=_TARGETS)
    except DataError as error:
        raise ValueError(f"--holdout given: {error}") from error
    return SplitTable(sequences, split, said)


def kept_sequences(tables: list[UserSequences], settings: DataSettings) -> tuple[UserSequences, list[UserSequences]]:
    """
    What is kept of positive interactions: all together, and each table; with `ties="shuffle"` in random order.

    Raises:
        ValueError: no item is frequent enough.
    """
    from onerec_hf.data import DataError
    from onerec_hf.data.sequences import concatenated

    try:
        sequences = concatenated(*tables).k_core(min_user=1, min_item=settings.min_item_interactions)
    except DataError as error:
        raise ValueError(f"--min_item_interactions {settings.min_item_interactions}: {error}") from error
    if settings.holdout != "given":
        if settings.ties == "shuffle":  # of the rows that are kept, as `with_shuffled_ties` does
            sequences = sequences.shuffled_ties(settings.ties_seed)
        return sequences, [sequences]
    kept = sequences.item_counts()[0]
    tables = [part.where(np.isin(part.item_ids, kept)) for part in tables]
    if settings.ties == "shuffle":
        tables = [part.shuffled_ties(settings.ties_seed) for part in tables]
        sequences = concatenated(*tables).reading(kept)
    return sequences, tables


def training_interactions(
    sequences: UserSequences, tables: list[UserSequences], settings: DataSettings, features: FeatureTables
) -> np.ndarray:
    """
    (N,) bool: the interactions that a schema of features is learned from.

    Args:
        sequences, tables: of `kept_sequences`.
        features: from which they come.
    """
    from onerec_hf.data.splits import hold_out_last_two, lengths_of, training_rows

    if settings.holdout == "last":
        return training_rows(sequences, hold_out_last_two(sequences)[0].lengths)
    if settings.holdout == "given":
        return training_rows(sequences, lengths_of(tables[0], sequences.user_ids)) & features.of_table(0)
    start, _ = period_starts(settings, sequences.timestamps)
    early = sequences.timestamps < start
    lengths = np.bincount(sequences.user_rows[early], minlength=len(sequences))
    return training_rows(sequences, lengths) & (features.events.timestamps < start)


def split_by_time(sequences: UserSequences, settings: DataSettings, times: np.ndarray) -> Split:
    """
    A temporal split.

    Args:
        times: of which the starts are quantiles, where the settings name none.
    """
    from onerec_hf.data import temporal_split

    sizes = (settings.session_length, settings.max_history, settings.stride)
    return temporal_split(sequences, *period_starts(settings, times), *sizes, targets=_TARGETS)


def period_starts(settings: DataSettings, times: np.ndarray) -> tuple[int, int]:
    """Starts of the validation and the test period: of the settings, or quantiles of the times."""
    starts = [
        np.quantile(times, share, method="higher") if text is None else time_of(option, text)
        for option, text, share in (
            ("validation_start", settings.validation_start, BEFORE_VALIDATION),
            ("test_start", settings.test_start, BEFORE_TEST),
        )
    ]
    return int(starts[0]), int(starts[1])


def time_of(option: str, text: str) -> int:
    """
    The start of a period: a number as in the table, or the seconds since 1970 of an ISO date or datetime, UTC where no zone is given. Fractions are
    rounded up, as tables hold whole times.

    Raises:
        ValueError: neither of them.

    Example:
        >>> time_of("test_start", "2024-01-31"), time_of("test_start", "8.5")
        (1706659200, 9)
    """
    from onerec_hf.data.times import seconds_of

    try:
        return int(text) if text.lstrip("-").isdigit() else math.ceil(seconds_of(text))
    except ValueError:
        raise ValueError(
            f"--{option} {text}: pass a number as in the table's time column, or a date such as 2024-01-31"
        ) from None


def split_last(
    sequences: UserSequences, settings: DataSettings, features: FeatureTables | None = None
) -> tuple[UserSequences, Split, str]:
    """
    The sequences with codes of their features, their leave-one-out split, and what is said of the features. What the split's warning about ties says
    stands in its description.
    """
    from onerec_hf.data import leave_one_out

    said = ""
    if features is not None:
        sequences, said = features.coded(sequences, training_interactions(sequences, [], settings, features))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A tie in time", UserWarning)
        split = leave_one_out(sequences, settings.session_length, settings.max_history, settings.stride)
    return sequences, split, said


def about_ties(sequences: UserSequences, settings: DataSettings) -> str:
    """What the protocol says about the order of rows of equal time, behind the split's description."""
    from onerec_hf.data import Ties

    if settings.ties == "shuffle":
        return " Rows of a user with equal times are in random order."
    found = Ties.of(sequences) if settings.holdout == "last" else None
    misleading = found is not None and found.tied and found.are_sorted
    return " --ties shuffle puts them in random order." if misleading else ""
