"""The report of an alignment: margins of the pairs, and reward, recall and variety of what validation users get, by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.workflows.artefact import catalogue_of
from onerec_hf.workflows.dataset import sample
from onerec_hf.workflows.distributed import is_first
from onerec_hf.workflows.pictures import Panel
from onerec_hf.workflows.training_report import log_panels

if TYPE_CHECKING:
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.workflows.dataset import RecommendationDataset

#: Users of a measurement, and how many measurements a training has behind the one before it.
WATCHED_USERS, TIMES = 200, 5
_TOP_K = 10
_PREFIX = "watched/"


def watch(trainer: Any, judges: Mapping[str, list], data: RecommendationDataset, exclude_seen: bool) -> None:
    """
    Makes a trainer measure, before, during and after an alignment, what the model recommends to validation users: the rewards of sessions, recall@10, and
    variety, the share of distinct items in all sessions. The values stand in the trainer's `log_history`, so that a resumed run keeps them; the first
    rank measures.

    Args:
        judges: reward models by name.
        data: with validation users.
        exclude_seen: whether items of the history are left out.
    """
    from transformers import TrainerCallback

    some = sample(data.validation, WATCHED_USERS).to_list()
    examples = with_items_left(some, trainer.processing_class, max(trainer.model.config.session_length, _TOP_K))

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            _measure(trainer, state, examples, judges, exclude_seen)

        def on_step_end(self, args, state, control, **kwargs):
            every = -(-state.max_steps // TIMES)
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                _measure(trainer, state, examples, judges, exclude_seen)

    trainer.add_callback(Watch())


def with_items_left(examples: list[dict[str, Any]], processor: OneRecProcessor, count: int) -> list[dict[str, Any]]:
    """The examples of users who have this many items left to recommend."""
    from onerec_hf.data.collators import positive_items

    catalogue = catalogue_of(processor)
    return [row for row in examples if catalogue.num_left(catalogue.indices(positive_items(row))) >= count]


def _measure(trainer: Any, state: Any, examples: list, judges: Mapping[str, list], exclude_seen: bool) -> None:
    from onerec_hf.trainers.sharding import unsharded_model

    done = any(row["step"] == state.global_step for row in state.log_history if _has_values(row))
    if not examples or done:
        return
    with unsharded_model(trainer.model) as model:
        if is_first():
            was_training = model.training
            values = measured(model.eval(), trainer.processing_class, examples, judges, exclude_seen)
            model.train(was_training)
            state.log_history.append(
                {"step": state.global_step} | {f"{_PREFIX}{name}": value for name, value in values.items()}
            )


def _has_values(row: Mapping[str, Any]) -> bool:
    return any(name.startswith(_PREFIX) for name in row)


def measured(
    model: Any,
    processor: OneRecProcessor,
    examples: Sequence[Mapping[str, Any]],
    judges: Mapping[str, list],
    exclude_seen: bool,
) -> dict[str, float]:
    """Rewards by judge, `recall@10` and `variety` of what a model recommends to held-out users."""
    from onerec_hf.data.collators import positive_items

    seen = [positive_items(row) for row in examples]
    sessions = recommended_sessions(model, processor, examples)
    rewards = {
        name: float(np.sum([each.reward(seen, sessions) for each in models], axis=0).mean())
        for name, models in judges.items()
    }
    one = {"session_length": 1, "num_beams": max(_TOP_K, 32), "num_return_sequences": _TOP_K}
    ranked = recommended_sessions(model, processor, examples, exclude_seen, **one)
    hits = []
    for place, row in enumerate(examples):
        found = {item for items in ranked[place * _TOP_K : (place + 1) * _TOP_K] for item in items}
        hits.append(len(found & set(row["session"])) / len(set(row["session"])))
    items = [item for session in sessions for item in session]
    return {**rewards, f"recall@{_TOP_K}": float(np.mean(hits)), "variety": len(set(items)) / max(1, len(items))}


def recommended_sessions(
    model: Any,
    processor: OneRecProcessor,
    examples: Sequence[Mapping[str, Any]],
    exclude_seen: bool = True,
    **options: Any,
) -> list[list]:
    """
    The sessions that the model recommends after the histories of examples.

    Args:
        exclude_seen: leave out the history's (positive) items.
        options: of `model.recommend`; by default one session of 10 beams.
    """
    from onerec_hf.data.collators import feature_columns, positive_items

    found: list[list] = []
    with model.eval().packed_experts():
        for start in range(0, len(examples), 64):
            some = examples[start : start + 64]
            inputs = processor([row["history"] for row in some], **feature_columns(processor, some))
            exclude = [positive_items(row) for row in some] if exclude_seen else None
            sequences = model.recommend(**inputs, **{"num_beams": 10, **options}, exclude=exclude)
            found += processor.batch_decode(sequences)
    return found


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

    def points(name: str) -> list[tuple[float, float]]:
        return [(row["step"], row[name]) for row in history if row.get(name) is not None and np.isfinite(row[name])]

    watched = dict.fromkeys(name for row in history for name in row if name.startswith(_PREFIX))
    shares = [name for name in watched if name.startswith((f"{_PREFIX}recall@", f"{_PREFIX}variety"))]
    named = {name: name.removeprefix(_PREFIX) for name in watched}
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
            {named[name]: points(name) for name in watched if name not in shares},
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
    ]
    return [*log_panels(history), *(panel for panel in panels if any(panel.series.values()))]
