"""A budget of wall or CPU time for a run: the learning-rate schedule and the training end where it ends."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

_FORMAT = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?(-cpu)?")
# An absolute number of warmup steps takes at most this share of a budget.
_WARMUP = 0.1


@dataclass
class Budget:
    """
    Time that a run may take. The clock starts with `start()`.

    Args:
        seconds: of wall time, or of CPU time.
        cpu: CPU time of this process, all its threads.

    Example:
        >>> Budget.parse("1h30m"), Budget.parse("90s-cpu")
        (Budget(1h30m), Budget(1m30s-cpu))
    """

    seconds: float
    cpu: bool = False
    _carried: float = field(default=0.0, init=False)
    _origin: float | None = field(default=None, init=False)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """
        From text: hours, minutes and seconds such as `2h`, `10m`, `1h30m` or `90s`, with `-cpu` behind it for CPU time.

        Raises:
            ValueError: another text, or no time at all.

        Example:
            >>> Budget.parse("10 minutes")
            Traceback (most recent call last):
            ...
            ValueError: budget '10 minutes' is not a time: write 2h, 10m or 90s, or 10m-cpu for CPU time
        """
        found = _FORMAT.fullmatch(text.strip())
        hours, minutes, seconds, cpu = (None,) * 4 if found is None else found.groups()
        total = 3600 * float(hours or 0) + 60 * float(minutes or 0) + float(seconds or 0)
        if not total:
            raise ValueError(f"budget {text!r} is not a time: write 2h, 10m or 90s, or 10m-cpu for CPU time")
        return cls(total, cpu is not None)

    def start(self) -> Budget:
        """Starts the clock; returns the budget itself."""
        self._carried, self._origin = 0.0, self._now()
        return self

    def carry(self, seconds: float) -> None:
        """Counts the time of an earlier process of this run, whose checkpoint was resumed."""
        self._carried = seconds

    @property
    def spent(self) -> float:
        """Seconds since `start()`, with those that were carried; 0 before."""
        return 0.0 if self._origin is None else self._carried + self._now() - self._origin

    def _now(self) -> float:
        return time.process_time() if self.cpu else time.perf_counter()

    def __str__(self) -> str:
        return duration(self.seconds) + ("-cpu" if self.cpu else "")

    def __repr__(self) -> str:
        return f"Budget({self})"


def duration(seconds: float) -> str:
    """
    A time as text, as `Budget.parse` reads it.

    Example:
        >>> duration(5400), duration(90), duration(2.5)
        ('1h30m', '1m30s', '2.5s')
    """
    if seconds < 10:
        return f"{seconds:.3g}s"
    whole = round(seconds)
    parts = ((whole // 3600, "h"), (whole // 60 % 60, "m"), (whole % 60, "s"))
    return "".join(f"{value}{unit}" for value, unit in parts if value)


class BudgetCallback(TrainerCallback, ExportableState):
    """
    Ends the training and its learning-rate schedule where a budget ends: the progress of the schedule is that of the steps or of the time,
    whichever is further. Warmup of a number of steps takes at most a tenth of the time. The schedule follows the clock, so that two runs are not
    bit for bit the same. Checkpoints hold the time spent; a resumed run goes on from it.

    Args:
        budget: started before the training.
        reserve: seconds of the budget that are kept for what comes after the training.

    Attributes:
        progress: share of the training's time that is spent, on all ranks that of the slowest.
        ended: whether the budget ended the training.

    Raises:
        ValueError: no time is left for the training, or a schedule that does not follow the number of steps.

    Example:
        >>> trainer = OneRecTrainer(..., callbacks=[BudgetCallback(Budget.parse("10m").start())])  # doctest: +SKIP
    """

    def __init__(self, budget: Budget, reserve: float = 0.0):
        self.budget, self.reserve = budget, reserve
        self.progress, self.ended = 0.0, False
        self._began = 0.0

    @property
    def seconds_left(self) -> float:
        """Seconds that are left for the training."""
        return self.budget.seconds - self.reserve - self.budget.spent

    def check(self) -> None:
        """
        Raises:
            ValueError: the budget is spent before the first step.
        """
        if self.seconds_left <= 0:
            spent = self.budget.spent
            raise ValueError(
                f"--budget {self.budget}: {duration(spent)} are spent before the first training step and the evaluation takes about "
                f"{duration(self.reserve)}, so no step fits. Raise it above {duration(spent + self.reserve)}"
            )

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        if not isinstance(lr_scheduler, LambdaLR):
            raise ValueError(
                f"lr_scheduler_type={args.lr_scheduler_type} does not follow the number of steps, so it cannot end with a budget; use linear, "
                "cosine or constant"
            )
        saved = state.stateful_callbacks.setdefault(
            type(self).__name__, self.state()
        )  # missing in checkpoints of other trainers
        self.progress, self.ended, self._began = 0.0, False, self.budget.spent
        if state.global_step and saved["attributes"]["spent"]:
            self._began = saved["attributes"]["began"]
            self.budget.carry(saved["attributes"]["spent"])
        total, warmup = state.max_steps, min(args.get_warmup_steps(state.max_steps), state.max_steps)
        share = args.warmup_steps if args.warmup_steps < 1 else _WARMUP

        def paced(schedule):
            return lambda step: schedule(self._virtual_step(step, total, warmup, share))

        lr_scheduler.lr_lambdas = [paced(schedule) for schedule in lr_scheduler.lr_lambdas]

    def _virtual_step(self, step: int, total: int, warmup: int, warmup_share: float) -> float:
        """The step at which the schedule stands: further than `step` where the time is further."""
        if warmup and (by_time := warmup * self.progress / warmup_share) < warmup and step < warmup:
            return max(step, by_time)
        return min(max(step, warmup + (total - warmup) * self.progress), total)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        time_of_training = self.budget.seconds - self.reserve - self._began
        progress = (self.budget.spent - self._began) / max(time_of_training, 1e-9)
        if torch.distributed.is_available() and torch.distributed.is_initialized():  # one learning rate for all ranks
            slowest = torch.tensor(progress, device=args.device, dtype=torch.float32)
            torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
            progress = float(slowest)
        self.progress = min(progress, 1.0)

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress < 1 or control.should_training_stop:
            return
        self.ended = control.should_training_stop = True
        # As transformers does at the last step; evaluations of epochs follow at the end of this one.
        if args.eval_strategy == IntervalStrategy.STEPS and args.eval_delay <= state.global_step:
            control.should_evaluate = True
        if args.save_strategy == SaveStrategy.STEPS:
            control.should_save = True

    def state(self) -> dict:
        """The callback's state in checkpoints, in Trainer's format."""
        return {
            "args": {"budget": str(self.budget), "reserve": self.reserve},
            "attributes": {"spent": self.budget.spent, "began": self._began, "progress": self.progress},
        }
