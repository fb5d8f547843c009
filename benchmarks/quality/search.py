"""
Random search with the same number of trials for every model: settings from the search spaces of the experiments, one seed, the same validation users
for checkpoint selection. The trial with the best NDCG@10 on all validation users is trained again with each seed of `--winners` and evaluated on test.

    python benchmarks/quality/search.py --runs runs/search --json benchmarks/results/quality_search.json
    python benchmarks/quality/search.py --runs runs/search --winners 0 1 2 --json winners.json

Every run is one of benchmarks/quality/run.py and writes a file into the folder `--runs`; runs whose file exists are skipped, so that an interrupted
search resumes. 16 trials of six models take half an hour of an H200 that 18 runs share.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/quality/search.py`

from benchmarks.harness import DATA, RECIPES, parser, say
from benchmarks.quality.experiment import Experiment, load, names

RUN = Path(__file__).with_name("run.py")
METRIC = "validation/ndcg@10"  # on all validation users: selects the best trial


@dataclass(frozen=True)
class Run:
    """A run of benchmarks/quality/run.py: a trial of an experiment with a seed, the name of its row, and the file that it writes."""

    experiment: Experiment
    name: str
    trial: int
    seed: int
    path: Path

    def settings(self) -> dict[str, Any]:
        assert self.experiment.search is not None
        return self.experiment.search.trial(self.trial)


def searched() -> list[str]:
    """The experiments with a search space."""
    return [name for name in names() if load(name).search is not None]


def trial_name(experiment: str, trial: int) -> str:
    """The row of a trial."""
    return f"{experiment}_trial_{trial:02d}"


def arguments():
    options = parser(__doc__)
    options.add_argument("--data_dir", default=f"{DATA}/amazon_beauty", help="folder of the data set's files")
    options.add_argument(
        "--runs", required="--quick" not in sys.argv, help="folder for a file per run, and their logs"
    )
    options.add_argument("--experiments", nargs="+", choices=searched(), help="all with a search space by default")
    options.add_argument("--trials", type=int, default=16, help="for each experiment (16)")
    options.add_argument(
        "--winners", type=int, nargs="+", metavar="SEED", help="train each best trial with these, and evaluate on test"
    )
    options.add_argument(
        "--selection_users", type=int, default=5000, help="validation users for checkpoint selection (5000)"
    )
    options.add_argument("--keep", help="with --winners: folder for their rankings and generators")
    options.add_argument("--recipes", default=str(RECIPES), help="folder of the recipes")
    options.add_argument("--jobs", type=int, default=1, help="runs at once (1)")
    parsed = options.parse_args()
    if parsed.keep and not parsed.winners:
        options.error("--keep needs --winners: trials are not kept")
    if parsed.quick:  # in a separate folder: these runs say nothing about the settings
        parsed.experiments, parsed.trials, parsed.selection_users = (
            parsed.experiments or ["hstu", "onerec_search"],
            1,
            100,
        )
        parsed.runs = f"{parsed.runs or 'runs/search'}/quick"
    return parsed


def main() -> None:
    options = arguments()
    runs, chosen = Path(options.runs), [load(name) for name in options.experiments or searched()]
    runs.mkdir(parents=True, exist_ok=True)
    trials = [
        Run(
            experiment,
            trial_name(experiment.name, trial),
            trial,
            0,
            runs / f"{trial_name(experiment.name, trial)}.json",
        )
        for experiment in chosen
        for trial in range(options.trials)
    ]
    wanted = trials if options.winners is None else winners(trials, options.winners, runs)
    for run in (*trials, *wanted):  # before anything is trained
        if run.path.is_file():
            check(run.path, run.settings(), options.selection_users)
    with ThreadPoolExecutor(options.jobs) as pool:
        failed = [log for log in pool.map(lambda run: start(options, run), wanted) if log]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(wanted)} runs failed; the first log: {failed[0]}")
    files = [str(run.path) for run in wanted]
    join = [sys.executable, str(RUN), "--join", *files, *(["--json", options.json] if options.json else [])]
    raise SystemExit(subprocess.run(join).returncode)


def winners(trials: list[Run], seeds: list[int], runs: Path) -> list[Run]:
    """
    The runs of each experiment's best trial.

    Raises:
        SystemExit: a trial has not run.
    """
    missing = [run.name for run in trials if not run.path.is_file()]
    if missing:
        raise SystemExit(
            f"--winners needs all trials, and {len(missing)} of {len(trials)} have not run (such as {missing[0]}). "
            "Run the same command without --winners first"
        )
    found = []
    for name in dict.fromkeys(run.experiment.name for run in trials):
        best = max((run for run in trials if run.experiment.name == name), key=lambda run: measured(run.path))
        found += [
            Run(best.experiment, name, best.trial, seed, runs / f"{name}_{best.trial:02d}-{seed}.json")
            for seed in seeds
        ]
    return found


def start(options, run: Run) -> Path | None:
    """Starts one run, unless its file exists (and what is kept of it); returns the log if it failed."""
    kept = f"{options.keep}/{run.name}-{run.seed}-test.npz" if options.keep else None
    if run.path.is_file() and (kept is None or Path(kept).is_file()):
        return None
    command = [sys.executable, str(RUN), "--data_dir", options.data_dir]
    command += ["--recipe", f"{options.recipes}/{run.experiment.recipe}"]
    command += ["--rows", run.experiment.name, "--label", run.name]
    command += ["--selection_users", str(options.selection_users), "--seeds", str(run.seed), "--json", str(run.path)]
    command += ["--split", "test" if options.winners else "validation"]
    command += ["--keep", options.keep] if options.keep else []
    command += ["--quick"] if options.quick else []
    command += ["--set", *(f"{key}={value}" for key, value in run.settings().items())]
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    log = run.path.with_suffix(".log")
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=output, env={"OMP_NUM_THREADS": threads, **os.environ})
    say(f"{run.name}, seed {run.seed}: {f'failed, {log}' if done.returncode else measured(run.path)}")
    return log if done.returncode else None


def check(path: Path, settings: dict[str, Any], selection_users: int) -> None:
    """
    Raises:
        SystemExit: a file was measured with other settings or selection users.
    """
    (how,) = json.loads(path.read_text())["experiments"].values()
    differ = [key for key, value in settings.items() if how["settings"].get(key) != value]
    differ += ["--selection_users"] if how["selection_users"] != selection_users else []
    if differ:
        raise SystemExit(f"{path} was measured with another {', '.join(differ)}. Pass another folder to --runs")


def measured(path: Path) -> float:
    """NDCG@10 on all validation users."""
    return next(row["value"] for row in json.loads(path.read_text())["rows"] if row["name"].endswith(METRIC))


if __name__ == "__main__":
    main()
