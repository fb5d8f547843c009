"""Labelled impressions for a session reward model, from a named source or the user's own table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from onerec_hf.workflows.settings import gather
from onerec_hf.workflows.splitting import time_of

if TYPE_CHECKING:
    from onerec_hf.data import SessionFeedback
    from onerec_hf.data.tables import TableSource


@dataclass
class RewardDataSettings:
    """The impressions and the cutting of labelled sessions."""

    dataset: str | None = field(
        default=None, metadata={"help": "A named data set: kuairand-pure. Or pass --impressions."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the data set's files."})
    impressions: str | None = field(
        default=None,
        metadata={"help": "Your own table, one row per impression: user, item, timestamp and a column per objective."},
    )
    objectives: list[str] | None = field(
        default=None, metadata={"help": "NAME=COLUMN of --impressions, values in [0, 1], e.g. vtr=viewed ltr=liked."}
    )
    history_end: str | None = field(
        default=None,
        metadata={
            "help": "Timestamp before which impressions are history (--impressions): a number as in the table, or an ISO date (UTC)."
        },
    )
    validation_start: str | None = field(
        default=None,
        metadata={"help": "Likewise the start of the validation period (kuairand-pure: day, 2022-05-03 or 20220503)."},
    )
    test_start: str | None = field(
        default=None,
        metadata={"help": "Likewise the start of the test period (kuairand-pure: day, 2022-05-06 or 20220506)."},
    )
    history_objective: str | None = field(
        default=None, metadata={"help": "Only impressions above 0 in this objective enter histories; all by default."}
    )
    items: str | None = field(
        default=None,
        metadata={"help": "Your items: item_id, and any of tags, author, type, duration_ms as features."},
    )
    embeddings: str | None = field(
        default=None, metadata={"help": ".npy of item embeddings, one row per row of --items, as features."}
    )
    min_items: int = field(default=5, metadata={"help": "Minimum number of impressions per session."})
    max_items: int = field(default=10, metadata={"help": "Maximum number of impressions per session."})
    user_column: str = field(default="user_id", metadata={"help": "Name of the user column."})
    item_column: str = field(default="item_id", metadata={"help": "Name of the item column."})
    timestamp_column: str = field(default="timestamp", metadata={"help": "Name of the time column."})


def load_feedback(
    settings: RewardDataSettings | None = None,
    *,
    max_history: int = 50,
    impressions: TableSource | None = None,
    items: TableSource | None = None,
    **options,
) -> SessionFeedback:
    """
    Labelled windows of a named source or of the user's own table.

    Args:
        settings: the impressions and the cutting of labelled sessions.
        max_history: latest items of a history.
        impressions, items: a path, a DataFrame or a `datasets.Dataset`.
        options: single fields of [`RewardDataSettings`], over `settings`.

    Raises:
        ValueError: neither or both sources, or missing options; DataError: what is wrong with the table.
        TypeError: an unknown option.

    Example:
        >>> load_feedback(dataset="kuairand-pure", data_dir="kuairand").objectives  # doctest: +SKIP
        ['swr', 'vtr', 'wtr', 'ltr']
    """
    from onerec_hf.data import load_impressions, load_kuairand_feedback, read_items

    (settings,) = gather((RewardDataSettings,), [] if settings is None else [settings], options)
    assert isinstance(settings, RewardDataSettings)
    impressions = settings.impressions if impressions is None else impressions
    items = settings.items if items is None else items
    if (settings.dataset is None) == (impressions is None):
        raise ValueError("pass either --dataset kuairand-pure with --data_dir, or --impressions, your own table")
    if impressions is None:
        if settings.dataset != "kuairand-pure" or settings.data_dir is None:
            raise ValueError(
                f"--dataset {settings.dataset}: the only data set with labelled impressions is kuairand-pure, with --data_dir"
            )
        return load_kuairand_feedback(
            settings.data_dir,
            validation_start=_day("validation_start", settings.validation_start or "20220503"),
            test_start=_day("test_start", settings.test_start or "20220506"),
            min_items=settings.min_items,
            max_items=settings.max_items,
        )
    missing = [
        f"--{name}"
        for name in ("objectives", "history_end", "validation_start", "test_start")
        if getattr(settings, name) is None
    ]
    if missing:
        raise ValueError(f"--impressions needs {', '.join(missing)} too")
    assert settings.objectives is not None
    if settings.embeddings is not None and items is None:
        raise ValueError("--embeddings needs --items: one embedding per row")
    return load_impressions(
        impressions,
        {pair.split("=")[0]: pair.split("=")[-1] for pair in settings.objectives},
        *(time_of(name, str(getattr(settings, name))) for name in ("history_end", "validation_start", "test_start")),
        items=None if items is None else read_items(items, embeddings=settings.embeddings),
        history_objective=settings.history_objective,
        min_items=settings.min_items,
        max_items=settings.max_items,
        max_history=max_history,
        user_column=settings.user_column,
        item_column=settings.item_column,
        timestamp_column=settings.timestamp_column,
    )


def _day(option: str, text: str) -> int:
    """A day as KuaiRand writes it: 20220503."""
    digits = str(text).replace("-", "").removesuffix(".0")
    if len(digits) != 8 or not digits.isdecimal():
        raise ValueError(f"--{option} {text}: pass a day such as 2022-05-03")
    return int(digits)
