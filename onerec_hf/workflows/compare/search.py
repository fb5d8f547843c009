"""
The trials of a comparison: one Optuna study per family, filled from the files of finished runs, so that a comparison that was killed goes on where it
was. Trials go round the families: whenever time is up, every family has had as many as the others, or one fewer.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import TrialState

from onerec_hf.workflows.compare.families import Family
from onerec_hf.workflows.compare.processes import POLL, Processes, Run
from onerec_hf.workflows.compare.ranking import METRIC
from onerec_hf.workflows.distributed import say

VALUE = f"validation/{METRIC}"
STOPPED = "the budget ended"
_STATES = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "stopped": TrialState.FAIL,
}


@dataclass
class Search:
    """
    The trials of one family.

    Args:
        family: with its search space; a family without one has a single trial.
        trials: how many.
        seed: of the sampler.
        make_run: a run from the number of a trial and its settings.
    """

    family: Family
    trials: int
    seed: int
    make_run: Callable[[Family, int, dict[str, Any]], Run]
    found: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        self.trials = self.trials if self.family.space else 1
        self._open: dict[int, optuna.Trial] = {}
        self._reported: dict[int, int] = {}
        self.started = 0
        # The median is of three finished trials at least, and the first two evaluations of a trial are not compared.
        pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=3)
        self.study = optuna.create_study(direction="maximize", pruner=pruner)

    def next_run(self) -> Run | None:
        """The next trial; None where its file is there already, from which the study takes it."""
        number, self.started = self.started, self.started + 1
        self.study.sampler = self._sampler(number)
        if number == 0 and (first := self.family.first_params()):
            self.study.enqueue_trial(first)
        trial = self.study.ask(self.family.distributions())
        run = self.make_run(self.family, number, {**self.family.settings, **self.family.drawn(trial.params)})
        found = run.found()
        if found is None:
            self._open[number] = trial
            return run
        self._tell(number, trial, found)
        return None

    def report(self, run: Run, line: dict[str, Any]) -> bool:
        """Takes an evaluation of a running trial; True where it falls behind the median of the others."""
        trial = self._open[run.number]
        self._report(run.number, trial, [line])
        return trial.should_prune()

    def tell(self, run: Run, found: dict[str, Any]) -> None:
        """Takes the end of a trial."""
        self._tell(run.number, self._open.pop(run.number), found)
        best = self.best()
        finished = found["state"] == "finished"
        value = f"{VALUE} {found['metrics'][VALUE]:.4f}" if finished else f"{found['state']}: {found['reason']}"
        so_far = "" if best is None else f"; best {self.found[best]['metrics'][VALUE]:.4f}"
        say(f"{self.family.name}, trial {run.number + 1} of {self.trials}: {value} ({found['seconds']:.0f} s){so_far}")

    def _tell(self, number: int, trial: optuna.Trial, found: dict[str, Any]) -> None:
        self.found[number] = found
        self._report(number, trial, found.get("evaluations", []))
        finished = found["state"] == "finished"
        self.study.tell(trial, found["metrics"][VALUE] if finished else None, _STATES[found["state"]])

    def _report(self, number: int, trial: optuna.Trial, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["step"] > self._reported.get(number, 0):
                trial.report(line["value"], line["step"])
                self._reported[number] = line["step"]

    def _sampler(self, number: int) -> optuna.samplers.TPESampler:
        """A sampler for one trial: what it draws depends on the trials before it alone, in a comparison that is resumed too."""
        seed = zlib.crc32(f"{self.seed} {self.family.name} {number}".encode())
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(2, self.trials // 2)))

    def best(self, first: int | None = None) -> int | None:
        """The number of the trial with the best validation metric, among the first so many; None where none has finished."""
        finished = [
            number
            for number, found in self.found.items()
            if found["state"] == "finished" and (first is None or number < first)
        ]
        return max(finished, key=lambda number: (self.found[number]["metrics"][VALUE], -number), default=None)

    def reason(self) -> str:
        """Why no trial has finished."""
        reasons = [found["reason"] for _, found in sorted(self.found.items()) if found["state"] != "finished"]
        return reasons[0] if reasons else STOPPED

    def count(self) -> int:
        """Trials that have ended by themselves or by the pruner: not those that the budget cut off."""
        return sum(found["state"] != "stopped" for found in self.found.values())

    def seconds(self) -> float:
        """Wall seconds of a trial, the mean so far."""
        times = [found["seconds"] for found in self.found.values()]
        return sum(times) / len(times) if times else 0.0


def run_trials(searches: list[Search], processes: Processes, seeds: int, until: float | None) -> int:
    """
    Runs the trials of all families, round by round.

    Args:
        seeds: trainings of each winner that still follow, for which time is kept.
        until: `time.monotonic()` at which the budget ends; None without one.

    Returns:
        the number of trials that every family with a search space had, those left out that had none.
    """
    by_name = {search.family.name: search for search in searches}
    waiting: list[Search] = []
    rounds, ends = 0, False
    while True:
        for run, found in processes.ended():
            by_name[run.family].tell(run, found)
        for run, line in processes.progress():
            behind = run in processes.runs and by_name[run.family].report(run, line)
            if behind and not run.path.is_file():
                found = processes.stop(
                    run, "pruned", f"behind the median of the other trials at evaluation {line['step']}"
                )
                by_name[run.family].tell(run, found)
        if until is not None and time.monotonic() > until:
            ends = True
            for run in processes.runs:
                by_name[run.family].tell(run, processes.stop(run, "stopped", STOPPED))
        while processes.free and not ends:
            if not waiting:
                waiting = [search for search in searches if rounds < search.trials]
                if not waiting or not _fits(searches, rounds, seeds, processes.jobs, until):
                    ends = True
                    break
                rounds += 1
            run = waiting.pop(0).next_run()
            if run is not None:
                processes.start(run)
        if ends and not processes.runs:
            break
        time.sleep(POLL)
    return min((search.count() for search in searches if search.family.space and search.count()), default=1)


def _fits(searches: list[Search], rounds: int, seeds: int, jobs: int, until: float | None) -> bool:
    """Whether one more round fits into the budget, beside the winners' trainings; the first round is always begun."""
    if until is None or not rounds:
        return True
    trial = sum(search.seconds() for search in searches if rounds < search.trials)
    winners = sum(search.seconds() for search in searches) * seeds
    return time.monotonic() + (trial + winners) / jobs <= until


def quiet_optuna() -> None:
    """No line per trial from Optuna: the comparison has its own."""
    optuna.logging.set_verbosity(logging.WARNING)
