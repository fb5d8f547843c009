"""A schedule that validation ends: a constant learning rate, and a decay to 0 once the metric gets no better."""

from __future__ import annotations

import math

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

# Share of all steps in which the learning rate decays.
DECAY_SHARE = 0.25


class PlateauDecayCallback(TrainerCallback, ExportableState):
    """
    Ends a training where validation says so. The learning rate is that of the trainer's schedule (constant after a warmup) until `patience`
    evaluations in a row bring no better `metric_for_best_model`, or until three quarters of `max_steps`; then it decays linearly to 0, over a
    quarter of all steps, and the training ends. Weights of a learning rate that has decayed are better than the best of a constant one, so that
    early stopping alone leaves quality behind. Checkpoints hold the state; a resumed run goes on from it.

    Args:
        patience: evaluations.

    Attributes:
        decay: (first step, last step) of the decay, in steps of the schedule; None before the training.

    Raises:
        ValueError: a schedule that does not follow the number of steps.

    Example:
        >>> trainer = OneRecTrainer(..., callbacks=[PlateauDecayCallback(2)])  # doctest: +SKIP
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.decay: tuple[int, int] | None = None
        self.best: float | None = None
        self.waited = self.step = 0

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        if not isinstance(lr_scheduler, LambdaLR):
            raise ValueError(
                f"lr_scheduler_type={args.lr_scheduler_type} does not follow the number of steps, so it cannot end on a plateau; use "
                "constant_with_warmup"
            )
        steps = state.max_steps
        self.decay = (min(math.ceil((1 - DECAY_SHARE) * steps), steps - 1), steps)
        self.best, self.waited, self.step = None, 0, state.global_step
        # Missing in checkpoints of other trainers.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        if state.global_step:
            self.decay, self.best = tuple(saved["decay"]), saved["best"]
            self.waited, self.step = saved["waited"], saved["step"]

        def decaying(schedule):
            # A budget of time may call the schedule with a later step than the trainer's, so that its clock is the schedule's.
            def decayed(step):
                self.step = step
                return schedule(step) * self._factor(step)

            return decayed

        lr_scheduler.lr_lambdas = [decaying(schedule) for schedule in lr_scheduler.lr_lambdas]

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        assert self.decay is not None
        if self.step >= self.decay[0]:
            return
        value = metrics["eval_" + args.metric_for_best_model.removeprefix("eval_")]
        sign = 1 if args.greater_is_better else -1
        if self.best is None or sign * value > sign * self.best:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            first = math.floor(self.step)
            self.decay = (first, first + max(round(first * DECAY_SHARE / (1 - DECAY_SHARE)), 1))

    def on_step_end(self, args, state, control, **kwargs):
        assert self.decay is not None
        if self.step >= self.decay[1]:
            control.should_training_stop = True

    def _factor(self, step: float) -> float:
        assert self.decay is not None
        first, last = self.decay
        return min(max((last - step) / (last - first), 0.0), 1.0)

    def state(self) -> dict:
        """The callback's state in checkpoints, in Trainer's format."""
        return {
            "args": {"patience": self.patience},
            "attributes": {"decay": self.decay, "best": self.best, "waited": self.waited, "step": self.step},
        }
