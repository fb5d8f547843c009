"""Trainers within a budget: schedules and stopping follow the time that is spent; generators may also average their weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from benchmarks.harness import say
from benchmarks.quality.runs import CHOSEN_BY, Budget
from onerec_hf.trainers import OneRecTrainer, SequentialTrainer

JUDGED = 10  # how often a generator is judged while it trains


def cosine(share: float, least: float = 0.0) -> float:
    """The share of a learning rate that is left after this share of a training: all of it at 0, `least` at 1, a cosine between them."""
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * share))


def learning_rate_factor(share: float, warmup: float = 0.02) -> float:
    """
    Linear warm-up, times [`cosine`] to 0.

    Args:
        share: of all steps, 0 to 1.
        warmup: share of them in which the learning rate rises.

    Example:
        >>> [round(learning_rate_factor(share), 2) for share in (0.01, 0.02, 0.5, 1)]
        [0.5, 1.0, 0.5, 0.0]
    """
    return min(1.0, share / warmup) * cosine(share)


class FollowBudget(TrainerCallback):
    def __init__(self, trainer):
        self.trainer, self.part = trainer, 1

    def on_step_end(self, args, state, control, **kwargs):
        spent = self.trainer.spent()
        if self.trainer.asked is not None and spent >= self.part / JUDGED:
            self.part = int(spent * JUDGED) + 1
            self.trainer.keep_best()
        control.should_training_stop |= spent >= 1


class AverageWeights(TrainerCallback):
    """At the end the weights are a moving average over steps of their own."""

    def __init__(self, model, decay: float):
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update_parameters(self.model)

    def on_train_end(self, args, state, control, **kwargs):
        with torch.no_grad():
            for weight, average in zip(self.model.parameters(), self.average.module.parameters(), strict=True):
                weight.copy_(average)


class BudgetTrainer(OneRecTrainer):
    """
    Warm-up by steps, then a cosine over the budget or the epochs, whichever ends first.

    Args:
        least_learning_rate: share of the learning rate that is left at the end.
        averaged: decay of the moving average that the weights become.
    """

    model: Any

    def __init__(self, *args, budget: Budget, asked, least_learning_rate: float, averaged: float | None, **kwargs):
        self.budget, self.asked, self.best = budget, asked, (-1.0, {})
        self.least = least_learning_rate
        super().__init__(*args, **kwargs)
        self.add_callback(FollowBudget(self))
        if averaged is not None:
            self.add_callback(AverageWeights(self.model, averaged))

    def spent(self) -> float:
        return max(self.budget.spent(), self.state.global_step / max(1, self.state.max_steps))

    def ask(self) -> float:
        return self.evaluate(self.asked, metric_key_prefix="asked")[f"asked_{CHOSEN_BY}"]

    def keep_best(self) -> None:
        with self.budget.paused():
            value = self.ask()
            self.model.train()
        say(f"  {self.spent():.0%}: {CHOSEN_BY} {value:.4f}")
        if value > self.best[0]:
            self.best = value, copy.deepcopy(self.model.state_dict())

    def restore_best(self) -> float:
        self.model.load_state_dict(self.best[1])
        return self.best[0]

    def best_item_score_weight(self, weights: Sequence[float]) -> tuple[float, float]:
        """What the asked users say with the best of these values of `config.item_score_weight`, and that value, which stays."""
        found = []
        for weight in weights:
            self.model.config.item_score_weight = weight
            found.append((self.ask(), weight))
            say(f"  item_score_weight {weight}: {CHOSEN_BY} {found[-1][0]:.4f}")
        self.model.config.item_score_weight = max(found)[1]
        return max(found)

    def create_scheduler(self, num_training_steps, optimizer=None):
        warmup = max(1, int(self.args.warmup_steps))

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / warmup) * cosine(min(1.0, self.spent()), self.least)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or cast(Any, self.optimizer), factor)
        return self.lr_scheduler


class StopAtBudget(TrainerCallback):
    """Stops a training when its budget is spent."""

    def __init__(self, budget: Budget):
        self.budget = budget

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= self.budget.spent() >= 1


class BudgetSequentialTrainer(SequentialTrainer):
    """A sequence model's trainer: a cosine follows the epochs or the budget, whichever ends first; evaluations and checkpoints are free."""

    def __init__(self, *args, budget: Budget, **kwargs):
        self.budget = budget
        super().__init__(*args, **kwargs)
        self.add_callback(StopAtBudget(budget))

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.args.lr_scheduler_type != "cosine":
            return super().create_scheduler(num_training_steps, optimizer)

        def factor(step: int) -> float:
            return learning_rate_factor(min(1.0, max((step + 1) / num_training_steps, self.budget.spent())))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or cast(Any, self.optimizer), factor)
        return self.lr_scheduler

    def evaluate(self, *args, **kwargs):
        with self.budget.paused():
            metrics = super().evaluate(*args, **kwargs)
        say(f"  after {self.budget.wall_seconds():.0f} s: {CHOSEN_BY} {metrics[f'eval_{CHOSEN_BY}']:.4f}")
        return metrics

    def _save_checkpoint(self, *args, **kwargs):
        with self.budget.paused():
            super()._save_checkpoint(*args, **kwargs)
