"""What a run says while it trains: a line per evaluation, and in the end the training's own cost."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from onerec_hf.workflows.compare.ranking import METRIC


class Progress(TrainerCallback):
    """
    Writes a line for each evaluation during training: its number, the metric, and the CPU seconds so far. The comparison reads them to end a trial
    that falls behind. Also holds what the training itself took.

    Args:
        path: of the lines.
    """

    def __init__(self, path: Path):
        self.path, self.evaluations, self.epochs = path, 0, None
        self.began, self.ended = (cpu_seconds(), time.perf_counter()), None
        path.unlink(missing_ok=True)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        value = (metrics or {}).get(f"eval_{METRIC}")
        if value is not None and self.ended is None:
            self.evaluations += 1
            line = {"step": self.evaluations, "value": value, "cpu_seconds": cpu_seconds() - self.began[0]}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def on_train_end(self, args, state, control, **kwargs):
        self.epochs = state.epoch
        self.ends()

    def ends(self) -> None:
        """The training has ended: evaluations and files that follow are not part of its cost."""
        self.ended = (cpu_seconds(), time.perf_counter())

    def cost(self) -> dict[str, Any]:
        """CPU and wall seconds of the training, and its epochs."""
        assert self.ended is not None
        cpu, wall = (after - before for before, after in zip(self.began, self.ended, strict=True))
        return {"train_cpu_seconds": cpu, "train_seconds": wall, "epochs": self.epochs}


def cpu_seconds() -> float:
    """User and system time of this process and the ones it started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
