"""The report of an alignment: margins of the pairs, and reward, recall and variety of what validation users get, by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.workflows.dataset import sample
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.pictures import Panel
from onerec_hf.workflows.training_report import log_panels

if TYPE_CHECKING:
    from onerec_hf.trainers.guards import GuardCallback
    from onerec_hf.workflows.dataset import RecommendationDataset

#: Users of a measurement.
WATCHED_USERS = 200


def watch(
    trainer: Any, judges: Mapping[str, list], data: RecommendationDataset, exclude_seen: bool
) -> GuardCallback | None:
    """
    Makes a trainer measure, before, during and after an alignment, what the model recommends to validation users, and stop by the guards of its arguments
    ([`~onerec_hf.trainers.guards.GuardCallback`]): the kept weights are the best by the held-out judge, without one by the reward itself.

    Args:
        judges: reward models by name, "heldout_reward" for held-out ones.
        data: with validation users.
        exclude_seen: whether items of the history are left out.

    Raises:
        ValueError: a held-out judge, but no validation users whom it can judge.
    """
    from onerec_hf.trainers.guards import GuardCallback

    value = next((name for name in ("heldout_reward", "reward") if name in judges), None)
    functions = {name: [model.reward for model in models] for name, models in judges.items()}
    rows = sample(data.validation, WATCHED_USERS).to_list()
    try:
        guard = GuardCallback(trainer, rows, functions, value, exclude_seen)
    except ValueError as error:
        if "heldout_reward" in judges:
            raise
        say(f"no guards: {error}")
        return None
    trainer.add_callback(guard)
    return guard


def alignment_panels(history: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """
    The panels that the logs of an alignment fill.

    Args:
        history: `trainer.state.log_history`.

    Example:
        >>> logs = [{"step": 5, "loss": 1.0, "rewards/margins": 0.2}, {"step": 5, "watched/heldout_reward": 1.1, "watched/recall@10": 0.3}]
        >>> [(panel.title, dict(panel.series)) for panel in alignment_panels(logs)[1:]]
        [('Margin of the pairs', {'margin': [(5, 0.2)]}), ('Reward', {'heldout_reward': [(5, 1.1)]}), ('Recall and variety', {'recall@10': [(5, 0.3)]})]
    """

    from onerec_hf.trainers.guards import WATCHED

    def points(name: str) -> list[tuple[float, float]]:
        return [(row["step"], row[name]) for row in history if row.get(name) is not None and np.isfinite(row[name])]

    watched = dict.fromkeys(name for row in history for name in row if name.startswith(WATCHED))
    named = {name: name.removeprefix(WATCHED) for name in watched}
    shares = [name for name in watched if named[name].startswith(("recall@", "variety"))]
    distances = [name for name in watched if named[name] in ("ntp", "kl")]
    panels = [
        Panel(
            "Margin of the pairs",
            "curves",
            {"margin": points("rewards/margins")},
            "step",
            "margin",
            note="Implicit reward of chosen sessions minus that of rejected ones, relative to the reference model.",
        ),
        Panel(
            "Reward",
            "curves",
            {named[name]: points(name) for name in watched if name not in (*shares, *distances)},
            "step",
            "reward",
            note="Mean reward of the sessions that validation users get. The reward that picks the pairs rises in any case; a held-out one shows whether "
            "sessions are better.",
        ),
        Panel(
            "Recall and variety",
            "curves",
            {named[name]: points(name) for name in shares},
            "step",
            "share",
            note="Of validation users: recall of their held-out items, and the share of distinct items in all sessions.",
        ),
        Panel(
            "Next-session loss",
            "curves",
            {named[name]: points(name) for name in distances},
            "step",
            "nats",
            note="Of validation users: loss per code of the sessions that they had, and with a limit on it the divergence from the first policy.",
        ),
    ]
    return [*log_panels(history), *(panel for panel in panels if any(panel.series.values()))]
