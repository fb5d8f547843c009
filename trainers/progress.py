"""Progress of a whole run: one bar with the time left on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from onerec_hf.trainers.budget import BudgetCallback, duration
from onerec_hf.trainers.callbacks import callback_of
from onerec_hf.trainers.plateau import PlateauDecayCallback

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"


class RunProgress(TrainerCallback):
    """
    Shows how far a run is and how much time is left: what comes before the training, the training and what comes after it. On a terminal that is
    one bar of tqdm; elsewhere (pipes, logs, notebooks without a terminal) the end of each epoch is a line on stderr. It replaces the bars and the
    logs of transformers (`attach`); what they show is in `trainer.state.log_history` and goes to trackers as before.

    Args:
        bar: draw a bar (default: where stderr is a terminal).

    Example:
        >>> with RunProgress(bar=False) as progress:
        ...     progress.stage("semantic IDs")
    """

    def __init__(self, bar: bool | None = None):
        self.bar: Any = None
        self._draws = sys.stderr.isatty() if bar is None else bar
        self._started = time.perf_counter()
        self._after = 0.0
        self._others = False
        self._budget: BudgetCallback | None = None
        self._plateau: PlateauDecayCallback | None = None
        self._forget_training()

    def _forget_training(self) -> None:
        self._steps, self._train_seconds, self._evaluations, self._evaluation_seconds = 0, 0.0, 0, 0.0
        self._since: float | None = None
        self._evaluation_since: float | None = None
        self._batches = self._shown_evaluations = 0
        self._shown: dict[str, float] = {}
        self._ended_epoch: float | None = None

    def __enter__(self) -> RunProgress:
        self._others = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # those of saving and loading weights would break the bar and fill logs
        if self._draws:
            self.bar = tqdm(
                desc="data", total=1.0, bar_format=_FORMAT, dynamic_ncols=True, leave=False, file=sys.stderr
            )
        return self

    def __exit__(self, *error) -> None:
        if self._others:
            logging.enable_progress_bar()
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def stage(self, name: str) -> None:
        """Names what the run does now."""
        if self.bar is not None:
            self.bar.set_description_str(name)

    def attach(self, trainer: Any, after: float = 0.0) -> None:
        """
        Shows the progress of this trainer, in place of transformers' own bars and logs.

        Args:
            after: seconds that the run takes after the training, as far as they are known.
        """
        self._after = after
        self._forget_training()
        self.replace_bars(trainer)
        trainer.add_callback(self)
        self._budget = callback_of(trainer, BudgetCallback)
        self._plateau = callback_of(trainer, PlateauDecayCallback)

    def replace_bars(self, trainer: Any) -> None:
        """Removes transformers' own bars and logs, where something runs before `attach`."""
        for former in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(former)

    # -- training ------------------------------------------------------------------------------
    def on_train_begin(self, args, state, control, **kwargs):
        self.stage("training")
        self._since = time.perf_counter()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._line(args, state)

    def on_step_end(self, args, state, control, **kwargs):
        self._steps += 1
        self._tick()
        self._show(self.seconds_left(args, state))

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get(
            "loss", (logs or {}).get("train_loss")
        )  # the mean of the whole training is logged last
        if loss is not None and ("loss" in logs or "loss" not in self._shown):
            self._shown["loss"] = loss

    def on_epoch_end(self, args, state, control, **kwargs):
        self._tick()
        self._ended_epoch = state.epoch

    def on_train_end(self, args, state, control, **kwargs):
        self._line(args, state)
        self._since = None

    def _tick(self) -> None:
        now = time.perf_counter()
        if self._since is not None:
            self._train_seconds += now - self._since
        self._since = now

    def seconds_left(self, args, state) -> float:
        """Seconds until the end of the run, from the mean times of a step and of an evaluation so far."""
        last_step, step = state.max_steps, state.global_step
        if self._plateau is not None and self._plateau.decay is not None:
            step = self._plateau.step
            last_step = max(self._plateau.decay[1], step)  # a budget's clock may be beyond it
        left = (last_step - step) * self._train_seconds / max(self._steps, 1)
        if self._evaluations and state.num_train_epochs and args.eval_strategy == "epoch":
            evaluations = state.num_train_epochs * last_step / state.max_steps - self._evaluations
            left += max(evaluations, 0) * self._evaluation_seconds / self._evaluations
        if self._budget is not None and not self._budget.budget.cpu:
            share = (last_step - step) / max(state.max_steps - step, 1)
            left = min(left, max(self._budget.seconds_left * share, 0.0))
        elif self._budget is not None and self._budget.progress:
            share = 1 - self._budget.progress if self._plateau is None else (last_step - step) / state.max_steps
            left = min(left, self._train_seconds * share / self._budget.progress)
        return left + self._after

    # -- evaluation ----------------------------------------------------------------------------
    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        now = time.perf_counter()
        if self._evaluation_since is None:
            self._evaluation_since = now
        self._batches += 1
        if self._since is None and hasattr(eval_dataloader, "__len__"):  # after the training
            self.stage("evaluation")
            done = self._batches / len(eval_dataloader)
            self._show((now - self._evaluation_since) * (1 / done - 1))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self._since is not None:  # during the training
            now = time.perf_counter()
            self._evaluations += 1
            self._evaluation_seconds += now - self._since
            self._since = now
            best = (args.metric_for_best_model or "ndcg@10").removeprefix("eval_")
            if f"eval_{best}" in (metrics or {}):
                self._shown[f"validation {best}"] = metrics[f"eval_{best}"]
        self._evaluation_since, self._batches = None, 0

    # -- what is shown -------------------------------------------------------------------------
    def _show(self, left: float) -> None:
        if self.bar is None:
            return
        elapsed = time.perf_counter() - self._started
        self.bar.n = elapsed / max(elapsed + left, 1e-9)
        values = [f"{name} {value:.4g}" for name, value in self._shown.items()]
        self.bar.set_postfix_str(", ".join([f"{duration(left)} left", *values]), refresh=False)
        if time.perf_counter() - self.bar.last_print_t >= self.bar.mininterval:
            self.bar.refresh()
            self.bar.last_print_t = time.perf_counter()

    def _line(self, args, state) -> None:
        """The end of an epoch as a line, once its evaluation is over; where evaluations are rarer than epochs, of one with an evaluation."""
        if self._draws or self._ended_epoch is None or not state.is_world_process_zero:
            return
        if args.eval_strategy == "steps" and self._shown_evaluations == self._evaluations and self._since is not None:
            return
        self._shown_evaluations = self._evaluations
        values = "".join(f", {name} {value:.4g}" for name, value in self._shown.items())
        left = duration(self.seconds_left(args, state))
        epoch = f"epoch {self._ended_epoch:.3g} of {state.num_train_epochs}"
        print(f"{epoch}{values}, about {left} left", file=sys.stderr, flush=True)
        self._ended_epoch = None
