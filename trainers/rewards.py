"""Reward functions of the preference trainers: functions, reward models, or their paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from onerec_hf.modeling.catalogue import ItemCatalogue
from onerec_hf.modeling.files import short
from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward

RewardFunction = Callable[..., list[float]]
# Squares of larger rewards overflow float32, and with them the spread within a group.
_TOO_LARGE = 1e18


def as_function(reward: Any) -> RewardFunction:
    """
    A reward function `(histories, sessions) -> list of floats` of a function, a reward model or its path or Hub id.

    Raises:
        ValueError: none of these.

    Example:
        >>> def length(histories, sessions):
        ...     return [float(len(session)) for session in sessions]
        >>> as_function(length) is length
        True
    """
    if isinstance(reward, str):
        reward = AutoModelForSequenceClassification.from_pretrained(reward)
    if isinstance(reward, PreTrainedModel):
        return reward.eval().reward  # type: ignore[operator]
    if not callable(reward):
        raise ValueError(f"reward_funcs must be functions, reward models or their paths; got {type(reward).__name__}")
    return reward


def as_functions(rewards: Any) -> list[RewardFunction]:
    """
    [`as_function`] of one reward, of a list of them, or of none.

    Example:
        >>> as_functions(None), as_functions([len]) == as_functions(len) == [len]
        ([], True)
    """
    if rewards is None:
        return []
    return [as_function(reward) for reward in (rewards if isinstance(rewards, list) else [rewards])]


def check_reward_items(function: RewardFunction, catalogue: ItemCatalogue) -> None:
    """
    Checks that a reward model can score every item that the generator may write.

    Raises:
        ValueError: a reward model of another catalogue.

    Example:
        >>> check_reward_items(lambda histories, sessions: [0.0] * len(sessions), None)  # functions score anything
    """
    model = getattr(function, "__self__", None)
    if not isinstance(model, OneRecForSessionReward) or model.items is None:
        return
    known, active = set(model.items.item_ids), catalogue.ids(catalogue.trie.leaf_to_index.numpy())
    unknown = [item for item in active if item not in known]
    if unknown:
        raise ValueError(
            f"the reward model was made for other items: it lacks {len(unknown)} of the catalogue's {len(active)} (first: {unknown[0]!r}). "
            "Train one for this catalogue (onerec-hf reward)"
        )


def reward_values(function: RewardFunction, name: str, histories: list, sessions: list, **columns: list) -> np.ndarray:
    """
    (sessions,) float64 rewards, NaN where the function returned None: it does not apply there.

    Args:
        columns: further columns of the dataset, by name.

    Raises:
        ValueError: another number of rewards, or rewards that are no finite numbers.

    Example:
        >>> reward_values(lambda histories, sessions: [1.0, None], "first", [["m1"]] * 2, [["m2"], ["m3"]])
        array([ 1., nan])
    """
    values = function(histories, sessions, **columns)
    try:
        given = np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"reward function {name!r} must return one finite number, or None, per session; got {short(repr(values))}"
        ) from error
    wrong = sum(value is not None and not abs(given[place]) < _TOO_LARGE for place, value in enumerate(values))
    if len(given) != len(sessions) or wrong:
        raise ValueError(
            f"reward function {name!r} must return one finite number, or None, per session: {len(sessions)} sessions, got {len(given)} "
            f"values, {wrong} not finite, or {_TOO_LARGE:g} and above"
        )
    return given
