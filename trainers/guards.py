"""
Guards of an alignment against reward hacking. A policy that is optimised against a reward model ends where the model errs: its own reward rises,
a held-out judge turns, recall and variety fall. The guards measure what held-out users get, stop the training there, and keep the best weights before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from onerec_hf.modeling.processing_onerec import OneRecProcessor
from onerec_hf.trainers.inputs import plain_rows
from onerec_hf.trainers.rewards import RewardFunction, as_functions
from onerec_hf.trainers.sharding import is_sharded, unsharded_model
from onerec_hf.trainers.watching import TOP_K, draw_sessions, measured, session_log_probs, with_items_left

logger = logging.get_logger(__name__)

#: Prefix of the measurements in a trainer's `log_history`.
WATCHED = "watched/"


@dataclass
class GuardOptions:
    """
    Guards against reward hacking

    They act on measurements of held-out users, against the one before the first step; the trainers measure where `guard_dataset` is given.

    Args:
        guards: keep the best weights within the limits below, and stop where there are no better ones. False measures only.
        guard_measurements: measurements during the training, beside the one before it.
        guard_patience: stop after this number of measurements in a row without better weights: a higher judge within the limits; 0 does not stop.
        max_ntp_rise: largest rise of the next-session loss, as a share of its value before; negative leaves the limit out.
        max_variety_drop: largest fall of variety (distinct items in all sessions), as a share; 1 leaves the limit out.
        max_kl: largest KL divergence of the first policy from the current one, in nats per session; None leaves the limit out.
        variety_weight: reward for items that few other users of the same batch get, added to the reward of a session.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> GuardOptions().guard_patience
        4
    """

    guards: bool = field(default=True, metadata={"help": "Keep the best weights within the limits below."})
    guard_measurements: int = field(default=10, metadata={"help": "Measurements of held-out users in a training."})
    guard_patience: int = field(
        default=4,
        metadata={"help": "Stop after so many measurements without better weights within the limits; 0: do not."},
    )
    max_ntp_rise: float = field(
        default=0.02, metadata={"help": "Largest rise of the held-out next-session loss, as a share; negative: any."}
    )
    max_variety_drop: float = field(
        default=0.2, metadata={"help": "Largest fall of the share of distinct items, as a share; 1: any."}
    )
    max_kl: float | None = field(
        default=None, metadata={"help": "Largest divergence from the first policy, in nats per session."}
    )
    variety_weight: float = field(
        default=0.0, metadata={"help": "Reward for items that few users of the same batch get."}
    )

    def check_guards(self) -> None:
        if self.guard_measurements < 1 or self.guard_patience < 0:
            raise ValueError(
                f"guard_measurements must be at least 1 and guard_patience at least 0; got {self.guard_measurements} and {self.guard_patience}"
            )
        if not 0 <= self.max_variety_drop <= 1 or self.variety_weight < 0 or (self.max_kl or 0) < 0:
            raise ValueError(
                "max_variety_drop must be between 0 and 1, variety_weight and max_kl not negative; got "
                f"{self.max_variety_drop}, {self.variety_weight} and {self.max_kl}"
            )


@dataclass(frozen=True)
class Verdict:
    """
    Args:
        best: the step whose weights are kept.
        stop: why the training ends here; None where it goes on.
    """

    best: int
    stop: str | None = None


def verdict(rows: Sequence[Mapping[str, float]], limits: GuardOptions, value: str | None) -> Verdict:
    """
    What the measurements so far say; it depends on nothing else, so that a resumed run decides as an uninterrupted one.

    Args:
        rows: measurements in order, the first one before the training: `step`, `ntp`, `variety`, `kl` and `value`.
        value: the measurement that the kept weights have the largest of; None for the latest weights within the limits.

    Example:
        >>> rows = [{"step": s, "ntp": n, "variety": 0.5, "judge": j} for s, n, j in [(0, 2.0, 0.1), (5, 2.0, 0.3), (10, 2.5, 0.4)]]
        >>> verdict(rows, GuardOptions(guard_patience=1), "judge").best
        5
    """
    start, best, waited = rows[0], rows[0], 0
    for row in rows[1:]:
        beyond = _beyond(row, start, limits)
        if beyond is None and (value is None or row[value] > best[value]):
            best, waited = row, 0
            continue
        waited += 1
        if limits.guard_patience and waited >= limits.guard_patience:
            why = beyond or f"{value} is {row[value]:.4g} after {best[value]:.4g}"
            return Verdict(
                int(best["step"]), f"{waited} measurements without better weights (guard_patience={waited}); {why}"
            )
    return Verdict(int(best["step"]))


def _beyond(row: Mapping[str, float], start: Mapping[str, float], limits: GuardOptions) -> str | None:
    """The limit that a measurement is beyond."""
    if limits.max_ntp_rise >= 0 and row["ntp"] > start["ntp"] * (1 + limits.max_ntp_rise):
        return f"the next-session loss rose from {start['ntp']:.4g} to {row['ntp']:.4g} (max_ntp_rise={limits.max_ntp_rise})"
    if row["variety"] < start["variety"] * (1 - limits.max_variety_drop):
        return f"variety fell from {start['variety']:.4g} to {row['variety']:.4g} (max_variety_drop={limits.max_variety_drop})"
    if limits.max_kl is not None and row["kl"] > limits.max_kl:
        return f"the divergence from the first policy is {row['kl']:.4g} nats (max_kl={limits.max_kl})"
    return None


class GuardCallback(TrainerCallback, ExportableState):
    """
    Measures what held-out users get before, during and after a training, into the trainer's `log_history`, and with `args.guards` applies
    [`GuardOptions`]: the training stops where a limit is passed, and the trainer ends with the best weights that kept within the limits, as with
    `load_best_model_at_end`. They stand in checkpoints, the first one before the first step. The first rank measures and decides.

    Args:
        trainer: of a OneRec, with `args` that are [`GuardOptions`].
        examples: held-out rows of `history` and `session`.
        judges: reward functions by name; those of a name are summed.
        value: the name whose largest value is kept; None for the latest weights within the limits.
        exclude_seen: whether recall is of rankings without the items of the history.

    Attributes:
        verdict: [`Verdict`] of the last measurement.

    Raises:
        ValueError: no held-out users, a judge that returns no finite number, or `load_best_model_at_end`, which would keep other weights.

    Example:
        >>> guard = GuardCallback(trainer, held_out, {"judge": [judge.reward]}, "judge")  # doctest: +SKIP
        >>> trainer.add_callback(guard)  # doctest: +SKIP
    """

    def __init__(
        self,
        trainer: Any,
        examples: Sequence[Mapping[str, Any]],
        judges: Mapping[str, list[RewardFunction]],
        value: str | None,
        exclude_seen: bool = True,
    ):
        self._trainer, self._judges, self._value = trainer, judges, value
        self._limits: GuardOptions = trainer.args
        if self._limits.guards and trainer.args.load_best_model_at_end:
            raise ValueError(
                "the guards keep the best weights by themselves: leave load_best_model_at_end out, or pass guards=False"
            )
        self._exclude_seen = exclude_seen
        processor, length = trainer.processing_class, trainer.model.config.session_length
        if examples and "session" not in examples[0]:
            raise ValueError(
                f"the guards' held-out users lack 'session' (found: {', '.join(examples[0])}); pass rows of history and session"
            )
        left = with_items_left([dict(row) for row in examples], processor, max(length, TOP_K))
        self._examples = [row for row in left if len(row["session"])]
        if not self._examples and self._limits.guards:
            raise ValueError(
                f"the guards need held-out users with a session and {max(length, TOP_K)} items left to recommend: none of {len(examples)} is one. "
                "Pass other held-out users, or guards=False"
            )
        self._real = _sessions_of_catalogue(self._examples, processor, length)
        if self._examples and not self._real[0] and self._limits.guards and self._limits.max_ntp_rise >= 0:
            raise ValueError(
                f"the guards need held-out sessions with items of the catalogue: none of {len(self._examples)} has one. Pass other held-out users, or "
                "max_ntp_rise=-1"
            )
        self._drawn: dict[str, list] = {}
        self.verdict = Verdict(0)

    def on_train_begin(self, args, state, control, **kwargs):
        self._drawn = {}  # of a former training
        state.stateful_callbacks = state.stateful_callbacks or {}
        if any(f"{WATCHED}variety" in row for row in state.log_history):  # a resumed run
            self._drawn = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("drawn", {})
        state.stateful_callbacks[type(self).__name__] = self.state()
        self._measure(state, control)
        if not self._limits.guards:
            return
        if not state.global_step:
            state.best_model_checkpoint, state.best_global_step = self._folder(0), 0
            self._trainer._save_checkpoint(self._trainer.model, trial=None)
        args.load_best_model_at_end = not is_sharded(self._trainer.model)

    def on_step_end(self, args, state, control, **kwargs):
        if self._is_due(state):
            self._measure(state, control)

    def _is_due(self, state) -> bool:
        every = -(-state.max_steps // self._limits.guard_measurements)
        return state.global_step % every == 0 or state.global_step == state.max_steps

    def on_train_end(self, args, state, control, **kwargs):
        if not self._limits.guards or not self._trainer.is_world_process_zero():
            return
        best, stop, last = self.verdict.best, self.verdict.stop, state.global_step
        why = f": {stop}" if stop else ""
        if is_sharded(self._trainer.model) and best != last:
            logger.warning(
                f"a sharded model ends with the weights of step {last}, the best within the guards were those of step {best}{why}"
            )
        elif not best:
            logger.warning(f"nothing was gained within the guards: the weights are those before the first step{why}")
        elif best != last:
            logger.warning(
                f"the weights of step {best} are kept, the best within the guards; step {last} was the last{why}"
            )

    def _folder(self, step: int) -> str:
        return os.path.join(str(self._trainer.args.output_dir), f"checkpoint-{step}")

    def _measure(self, state, control) -> None:
        """Adds a measurement to the log, and does on all ranks what the first one decides."""
        trainer = self._trainer
        told: list[Any] = [None]
        failed: Exception | None = None
        with unsharded_model(trainer.model) as model:
            if trainer.is_world_process_zero():
                was_training = model.training
                try:
                    told = [self._decide(model, state)]
                except Exception as error:  # the other ranks wait for the decision
                    failed, told = error, [f"{type(error).__name__}: {error}"]
                model.train(was_training)
        broadcast_object_list(told)
        if isinstance(told[0], str):
            raise failed or ValueError(f"the first rank could not measure held-out users: {told[0]}")
        if told[0] is None or not self._limits.guards:
            return
        before, self.verdict = self.verdict.best, told[0]
        if self.verdict.best != before:
            state.best_model_checkpoint, state.best_global_step = self._folder(self.verdict.best), self.verdict.best
            control.should_save = state.global_step > before and self.verdict.best == state.global_step
        if self.verdict.stop is not None:
            control.should_training_stop = True

    def _decide(self, model: Any, state: Any) -> Verdict | None:
        if not self._examples:
            return None
        rows = [row for row in state.log_history if f"{WATCHED}variety" in row]
        # A resumed run measures at the steps of an uninterrupted one.
        if not rows or (rows[-1]["step"] < state.global_step and self._is_due(state)):
            values = self._values(model)
            rows.append({"step": state.global_step} | {f"{WATCHED}{name}": value for name, value in values.items()})
            state.log_history.append(rows[-1])
        return verdict(
            [{name.removeprefix(WATCHED): value for name, value in row.items()} for row in rows],
            self._limits,
            self._value,
        )

    def _values(self, model: Any) -> dict[str, float]:
        processor = self._trainer.processing_class
        values = measured(model, processor, self._examples, self._judges, self._exclude_seen)
        users, sessions = self._real
        if users:
            values["ntp"] = -float(np.concatenate(session_log_probs(model, processor, users, sessions)).mean())
        if self._limits.max_kl is not None:
            values["kl"] = self._divergence(model)
        if not math.isfinite(sum(values.values())):
            raise ValueError(
                f"a measurement of held-out users is not finite: {values}; leave the judge out that returns it"
            )
        return values

    def _divergence(self, model: Any) -> float:
        """
        KL divergence of the decoder before the first step from the current one, over a session for each held-out user that the first one drew: of the first
        decoder only these sessions and their log-probabilities are kept.
        """
        processor = self._trainer.processing_class
        if not self._drawn:
            sessions = draw_sessions(model, processor, self._examples, self._trainer.args.seed)
            before = session_log_probs(model, processor, self._examples, sessions, constrained=True)
            self._drawn = {"sessions": sessions, "log_probs": [each.tolist() for each in before]}
        now = session_log_probs(model, processor, self._examples, self._drawn["sessions"], constrained=True)
        rises = [each - np.array(first) for each, first in zip(now, self._drawn["log_probs"], strict=True)]
        # Of little variance and never negative, as TRL's.
        return float(np.mean([np.sum(np.expm1(rise) - rise) for rise in rises]))

    def state(self) -> dict:
        """The callback's state in checkpoints, in Trainer's format."""
        return {"args": {}, "attributes": {"drawn": self._drawn}}


def _sessions_of_catalogue(
    examples: Sequence[Mapping[str, Any]], processor: OneRecProcessor, length: int
) -> tuple[list[Mapping[str, Any]], list[list]]:
    """The users with at least one item of their session in the catalogue, and these items, at most a session's length."""
    catalogue: Any = processor.catalogue
    known = set(catalogue.ids(catalogue.trie.leaf_to_index.numpy()))
    sessions = [[item for item in row["session"] if item in known][:length] for row in examples]
    kept = [place for place, session in enumerate(sessions) if session]
    return [examples[place] for place in kept], [sessions[place] for place in kept]


def guard(trainer: Any, guard_dataset: Any, judge_funcs: Any) -> None:
    """
    Adds the guards of a trainer's arguments `guard_dataset` and `judge_funcs`.

    Raises:
        ValueError: judges without held-out users, or judges that are no reward functions.
    """
    if guard_dataset is None:
        if judge_funcs:
            raise ValueError(
                "judge_funcs score the sessions of held-out users: pass guard_dataset, rows of history and session, or leave them out"
            )
        return
    functions, rows = as_functions(judge_funcs), list(plain_rows(guard_dataset))
    trainer.add_callback(
        GuardCallback(trainer, rows, {"judge": functions} if functions else {}, "judge" if functions else None)
    )


def variety_reward(histories: Sequence[list], sessions: Sequence[list]) -> list[float]:
    """
    A reward in [0, 1] for items that few users get: per session, the mean over its items of the share of other users of the batch whose sessions do not hold
    the item. Users are told apart by their histories.

    Example:
        >>> variety_reward([["m1"], ["m2"]], [["a", "b"], ["a", "c"]])
        [0.5, 0.5]
    """
    users = [tuple(history) for history in histories]
    holders: dict[Any, set] = {}
    for session, user in zip(sessions, users, strict=True):
        for item in session:
            holders.setdefault(item, set()).add(user)
    others = max(1, len(set(users)) - 1)
    shares = [[(len(holders[item]) - 1) / others for item in session] for session in sessions]
    return [1 - float(np.mean(each)) if each else 0.0 for each in shares]
