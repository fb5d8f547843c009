"""What `--features auto` stands for on a table, and the tables that the options of features name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from onerec_hf.workflows.settings import FEATURE_OPTIONS

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from onerec_hf.data import ItemTable, RecommendationData
    from onerec_hf.data.feature_tables import FeatureTables
    from onerec_hf.modeling.features import FeatureSchema


class FeatureChoice(Protocol):
    """`features` and the single options that it stands for, such as [`~onerec_hf.workflows.DataSettings`] has them."""

    features: str | None
    user_features: list[str] | None
    item_features: list[str] | None
    interaction_features: list[str] | None
    history_feedback: str | None


def check_feature_options(choice: FeatureChoice) -> None:
    """
    Raises:
        ValueError: `features` or `history_feedback` with a value that they do not have.

    Example:
        >>> from onerec_hf.workflows import DataSettings
        >>> check_feature_options(DataSettings(features="on"))
        Traceback (most recent call last):
        ...
        ValueError: --features on: choose auto or none, or name columns with --user_features, --item_features and --interaction_features
    """
    if choice.features not in (None, "auto", "none"):
        raise ValueError(
            f"--features {choice.features}: choose auto or none, or name columns with --user_features, --item_features and --interaction_features"
        )
    if choice.history_feedback not in (None, "positive", "all"):
        raise ValueError(f"--history_feedback {choice.history_feedback}: choose positive or all")


def feature_options(choice: FeatureChoice, users: bool, items: bool, everything: bool | None) -> dict[str, Any]:
    """
    The single options of features: those that were given, and for the others what `features` stands for.

    Args:
        users, items: whether there are such tables.
        everything: whether there are interactions that are not positive; None where that is not known yet.

    Example:
        >>> from onerec_hf.workflows import DataSettings
        >>> feature_options(DataSettings(features="auto", item_features=["genre"]), users=False, items=True, everything=True)
        {'user_features': None, 'item_features': ['genre'], 'interaction_features': ['auto'], 'history_feedback': 'all'}
    """
    from onerec_hf.data.feature_tables import AUTO

    given = {name: getattr(choice, name) for name in FEATURE_OPTIONS}
    chosen: dict[str, Any] = {"history_feedback": "positive"}
    if choice.features == "auto":
        tables = {"user_features": users, "item_features": items, "interaction_features": True}
        chosen = {name: [AUTO] for name, is_there in tables.items() if is_there}
        chosen["history_feedback"] = None if everything is None else "all" if everything else "positive"
    return {name: chosen.get(name) if value is None else value for name, value in given.items()}


def options_on(choice: FeatureChoice, source: RecommendationData, positive: Sequence[np.ndarray]) -> dict[str, Any]:
    """
    `feature_options` on tables in memory.

    Args:
        source: the tables of users and items.
        positive: (rows,) bool of each table of interactions.
    """
    everything = not all(rows.all() for rows in positive)
    return feature_options(choice, source.users is not None, _items(source) is not None, everything)


def feature_tables(
    source: RecommendationData,
    parts: Sequence[pd.DataFrame],
    positive: Sequence[np.ndarray],
    choice: FeatureChoice,
    schema: FeatureSchema | None = None,
) -> FeatureTables | None:
    """
    The tables with the columns of features; None without features, where histories hold positive interactions.

    Args:
        parts: tables of given targets.
        positive: (rows,) bool of the source's interactions and of each part.
        choice: the single options, as `options_on` has them.
        schema: of a saved model.

    Raises:
        ValueError, DataError: as [`~onerec_hf.data.feature_tables.FeatureTables`].
    """
    from onerec_hf.data.feature_tables import FeatureTables

    names = {side: getattr(choice, f"{side}_features") or () for side in ("user", "interaction", "item")}
    everything = choice.history_feedback == "all"
    if schema is None and not everything and not any(names.values()):
        return None
    return FeatureTables(
        [source.interactions, *parts], positive, source.users, _items(source), names, everything, schema
    )


def _items(source: RecommendationData) -> ItemTable | None:
    return source.items if source.item_features is None else source.item_features
