"""How long a training takes: its budget, the users of its evaluations, and what is kept for the evaluation after it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from onerec_hf.workflows.dataset import InMemoryDataset, RecommendationDataset, sample
from onerec_hf.workflows.distributed import is_first, say
from onerec_hf.workflows.evaluation import baseline_rankings
from onerec_hf.workflows.features import WORTH_USERS
from onerec_hf.workflows.small_sasrec import LEAST_SECONDS, SHARE

if TYPE_CHECKING:
    import datasets

    from onerec_hf.trainers import Budget, OneRecTrainer, OneRecTrainingArguments, RunProgress

# Users of the two evaluations that the time of the final one is estimated from, and the least share of a budget that is kept for it.
_FEW, _MORE = 32, 256
_LEAST_SHARE = 0.1
# Of a budget the small SASRec gets what is a share of the rest.
_OF_BUDGET = SHARE / (1 + SHARE)
# Of a budget that goes at most into what features are worth; of fewer users than these, single features are noise.
_WORTH_SHARE, _FEWEST_OF_WORTH = 0.1, 50


class Evaluation(NamedTuple):
    """Seconds of an evaluation on the test users, and of one user by the model alone."""

    seconds: float
    per_user: float


class TimeLimit(NamedTuple):
    """Seconds of a clock."""

    seconds: float
    clock: Callable[[], float]


@dataclass
class Pace:
    """
    The time of a training and of what follows it.

    Args:
        budget: of the whole run, started; None for no limit.
        progress: shows the time left; None for the bars and logs of transformers.
        validation_users: users of evaluations during training, a random sample; all when None.
        baselines: whether the evaluation after the training also ranks with the baselines.
        refit: interactions of a second training after the evaluation, relative to the first; 0 for none.
        sasrec: whether a small SASRec is trained after the evaluation.
        features: whose worth is measured after the evaluation.
    """

    budget: Budget | None = None
    progress: RunProgress | None = None
    validation_users: int | None = None
    baselines: bool = True
    refit: float = 0.0
    sasrec: bool = False
    features: int = 0
    # Of the worth of features: users that time is kept for, and seconds of one user.
    _worth: tuple[int, float] = (0, 1.0)

    @classmethod
    def start(cls, budget: str | None, validation_users: int | None, baselines: bool, quiet: bool) -> Pace:
        """
        The time of a run whose clock starts now.

        Args:
            budget: such as "10m" or "10m-cpu"; None for no limit.
            quiet: a line per epoch in place of a bar.

        Raises:
            ValueError: a budget that is not a time, or no validation user.
        """
        from onerec_hf.trainers import Budget, RunProgress

        if validation_users is not None and validation_users < 1:
            raise ValueError(f"--validation_users must be at least 1; got {validation_users}")
        clock = None if budget is None else Budget.parse(budget).start()
        return cls(clock, RunProgress(bar=False if quiet or not is_first() else None), validation_users, baselines)

    def validation(self, data: RecommendationDataset) -> datasets.Dataset:
        """The validation examples of evaluations during training: the same users in each, whatever the seed of the training."""
        return sample(data.validation, self.validation_users)

    def prepare(self, trainer: OneRecTrainer, data: RecommendationDataset) -> None:
        """
        Measures an evaluation, and gives the trainer the end of the budget and the progress.

        Raises:
            ValueError: no step fits into the budget.
        """
        from onerec_hf.trainers import BudgetCallback

        if self.budget is None:
            if self.progress is not None:
                self.progress.attach(trainer)
            return
        if self.progress is not None:
            self.progress.replace_bars(trainer)
        seconds, per_user = estimate_evaluation(trainer, data, self.budget, self.baselines)
        args = cast("OneRecTrainingArguments", trainer.args)
        if args.eval_strategy != "no":  # one more evaluation, of the weights at the end of the budget
            seconds *= 1 + len(cast("Any", trainer.eval_dataset)) / max(len(data.test), 1)
        seconds = max(seconds, _LEAST_SHARE * self.budget.seconds)
        if self.sasrec:
            seconds += _OF_BUDGET * self.budget.seconds
        if self.features:
            per_user = max(per_user * (1 + self.features), 1e-9)  # once with all of them
            most = min(WORTH_USERS, len(data.validation))
            users = min(most, int(_WORTH_SHARE * self.budget.seconds / per_user))
            users = users if users >= min(most, _FEWEST_OF_WORTH) else 0
            self._worth = users, per_user
            seconds += users * per_user
        left = self.budget.seconds - self.budget.spent - seconds
        callback = BudgetCallback(self.budget, seconds + max(left, 0) * self.refit / (1 + self.refit))
        try:
            callback.check()
        except ValueError:  # Trainer has made these, empty, if they were absent
            with contextlib.suppress(OSError):
                folder = Path(str(args.output_dir))
                folder.rmdir()
                folder.parent.rmdir()
            raise
        trainer.add_callback(callback)
        if self.progress is not None:
            self.progress.attach(trainer, after=callback.reserve)

    def of_sasrec(self, run_seconds: float) -> TimeLimit | None:
        """
        Time of the small SASRec: a quarter of the run's so far, at least 5 seconds; with a budget a fifth of it, as far as that is left.

        Args:
            run_seconds: time of the run so far.
        """
        if not self.sasrec:
            return None
        if self.budget is None:
            return TimeLimit(max(SHARE * run_seconds, LEAST_SECONDS), time.perf_counter)
        left = (self.budget.seconds - self.budget.spent) / (1 + self.refit)
        seconds = max(min(_OF_BUDGET * self.budget.seconds, left), 0.0)
        return TimeLimit(seconds, time.process_time if self.budget.cpu else time.perf_counter)

    def worth_users(self) -> int:
        """Users on whom the worth of features is measured, as many as the budget allows; 0, which is said, where they are too few."""
        if self.budget is None or not self.features:
            return WORTH_USERS if self.features else 0
        kept, per_user = self._worth
        left = (self.budget.seconds - self.budget.spent) / (1 + self.refit)
        users = min(kept, int(max(left, 0.0) / per_user))
        if users and users >= min(kept, _FEWEST_OF_WORTH):
            return users
        say(f"--budget {self.budget}: too short to measure what each of {self.features} features is worth")
        return 0

    def report(self, trainer: OneRecTrainer) -> None:
        """Says how far the training came where the budget ended it."""
        from onerec_hf.trainers import BudgetCallback
        from onerec_hf.trainers.callbacks import callback_of

        callback = callback_of(trainer, BudgetCallback)
        if callback is None or not callback.ended:
            return
        state = trainer.state
        epochs = state.epoch or 0.0
        far = f"after {epochs:.3g} of at most {state.num_train_epochs} epochs ({state.global_step:,} steps)"
        say(
            f"--budget {self.budget}: the training ended {far}"
            + (", which is less than one epoch: some training examples were never read" if epochs < 1 else "")
        )


def estimate_evaluation(
    trainer: OneRecTrainer, data: RecommendationDataset, budget: Budget, baselines: bool
) -> Evaluation:
    """
    Seconds (of the budget's clock) of an evaluation on the test users, from evaluations of a few of them. The random numbers of the training stay
    as they are.
    """
    import torch

    few, more = (min(users, len(data.test)) for users in (_FEW, _MORE))
    with torch.random.fork_rng():
        (first, _), (second, of_model) = (_evaluate(trainer, data, users, budget, baselines) for users in (few, more))
    per_user = max(second - first, 0.0) / max(more - few, 1)
    return Evaluation(second + per_user * (len(data.test) - more), of_model / more)


def _evaluate(
    trainer: OneRecTrainer, data: RecommendationDataset, users: int, budget: Budget, baselines: bool
) -> tuple[float, float]:
    """Seconds of an evaluation on some test users, by the model and the baselines, and by the model alone."""
    args, before = cast("OneRecTrainingArguments", trainer.args), budget.spent
    examples = sample(data.test, users)
    loader = trainer.get_eval_dataloader(cast("Any", examples))
    trainer.evaluation_loop(loader, description="estimate", metric_key_prefix="estimate")
    of_model = budget.spent - before
    # Another number of users, the same training sequences.
    if baselines and isinstance(data, InMemoryDataset):
        catalogue = cast("Any", trainer.processing_class).catalogue
        fewer = replace(data, split=replace(data.split, test=examples))
        baseline_rankings(fewer, catalogue, "test", max(args.eval_top_k), args.eval_exclude_seen)
    return budget.spent - before, of_model
