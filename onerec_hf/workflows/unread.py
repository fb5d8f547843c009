"""What a model without features does not read of its tables: the columns that `--features auto` would take."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.workflows.auto import Choice
from onerec_hf.workflows.dataset import InMemoryDataset, RecommendationDataset
from onerec_hf.workflows.feature_options import feature_tables, options_on
from onerec_hf.workflows.splitting import kept_sequences, period_starts, read_parts, training_interactions

if TYPE_CHECKING:
    from collections.abc import Sequence

# Columns of a side that are named; of more it is said how many.
_NAMED = 2
# Of more interactions those of some users are read: a sentence must not cost as much as the loading.
_ROWS = 200_000


def unread(data: RecommendationDataset) -> str:
    """
    What `--features auto` would read of a dataset's tables, learned from training rows as a schema is. Empty where features were asked for or refused
    (`none`), for a prepared folder, and where only times are left: every table has them, and they gained nothing by themselves.

    Example:
        >>> import pandas as pd
        >>> from onerec_hf.workflows import load_dataset
        >>> rows = pd.DataFrame({"user_id": [u for u in range(6) for _ in range(5)], "item_id": [*range(5)] * 6, "timestamp": [*range(5)] * 6})
        >>> unread(load_dataset(interactions=rows)), unread(load_dataset(interactions=rows.assign(tab=rows.item_id % 2)))
        ('', 'tab of interactions')
    """
    from onerec_hf.data import PositiveFeedback
    from onerec_hf.data.feature_tables import TIME, columns_of, schema_of

    if not isinstance(data, InMemoryDataset) or data.tables is not None or data.settings.features is not None:
        return ""
    positive = PositiveFeedback.parse(data.settings.positive or ())
    parts = read_parts(data.settings)
    masks = [positive.holds(table) for table in (data.source.interactions, *parts)]
    feedback = data.settings.history_feedback if "history_feedback" in data.given else None
    settings = replace(data.settings, features="auto", history_feedback=feedback)
    settings = replace(settings, **options_on(settings, data.source, masks))
    source = data.source
    if len(source.interactions) > _ROWS:
        rows = _some_rows(data, masks[0])
        source = replace(source, interactions=source.interactions[rows].reset_index(drop=True))
        masks[0] = masks[0][rows]
        # Which items are frequent and where periods start is known of all rows.
        settings = replace(settings, min_item_interactions=1)
        if settings.holdout == "temporal":
            starts = period_starts(settings, data.sequences.timestamps)
            settings = replace(settings, validation_start=str(starts[0]), test_start=str(starts[1]))
    tables = feature_tables(source, parts, masks, settings)
    assert tables is not None
    sequences, parts = kept_sequences(tables.sequences(), settings)
    training = training_interactions(sequences, parts, settings, tables)
    learned = tables.learn([tables.training_rows(sequences, training, len(sequences.item_ids))])
    schema = schema_of(learned)
    said = []
    for side in ("user", "item", "interaction"):
        names = [] if schema is None else columns_of(schema, side)
        if names := [name for name in names if (side, name) != ("interaction", TIME)]:
            said.append(f"{_listed(names)} of {side}s")
    return "; ".join([*said, *(["interactions that are not positive"] if tables.everything else [])])


def _some_rows(data: InMemoryDataset, positive: np.ndarray) -> np.ndarray:
    """(rows,) bool: the interactions of some users with frequent items, about `_ROWS` of them; the same in each call."""
    table: Any = data.source.interactions
    rows = table["item_id"].isin(data.item_ids).to_numpy()
    users = table["user_id"][rows & positive].unique()
    some = max(len(users) * _ROWS // len(table), 1)
    chosen = np.random.default_rng(0).choice(users, some, replace=False)
    return rows & table["user_id"].isin(chosen).to_numpy()


def without_features(left: str) -> list[Choice]:
    """
    The row of a model that reads no features in the table of choices, where tables hold some.

    Args:
        left: from `unread`.

    Example:
        >>> without_features("age of users"), without_features("")
        ([Choice(option='features', value='none', reason='auto would also read age of users')], [])
    """
    return [Choice("features", "none", f"auto would also read {left}")] if left else []


def _listed(names: Sequence[str]) -> str:
    """
    The first of some names.

    Example:
        >>> _listed(["age"]), _listed(["age", "city", "job"]), _listed(["age", "city", "job", "plan"])
        ('age', 'age, city, job', 'age, city and 2 more')
    """
    if len(names) <= _NAMED + 1:
        return ", ".join(names)
    return f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more"
