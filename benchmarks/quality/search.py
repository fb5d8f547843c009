"""
An equal search for every family of the contest: as many settings each, drawn at random from spaces that stand in _search_spaces.py, one seed, the same
validation users to say which weights stay; the one that all validation users like best is then trained anew with each seed of `--winners` and judged on test.

    python benchmarks/quality/search.py --data_dir ../shared/data/amazon_beauty --runs runs/search --json benchmarks/results/quality_search.json
    python benchmarks/quality/search.py --data_dir ../shared/data/amazon_beauty --runs runs/search --winners 0 1 2 --json searched.json

Every run is one of benchmarks/quality/run.py and leaves a file in the folder `--runs`; those that are there are not run again, so that a search can be cut
off and gone on with, and drawn longer. 16 draws of all families take half an hour of an H200 that 18 runs share.
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

from benchmarks.harness import RECIPES, parser, say
from benchmarks.quality.search_spaces import FAMILIES, METRIC, drawn, name_of, winner

QUALITY = Path(__file__).with_name("quality.py")


@dataclass(frozen=True)
class Run:
    """A run of benchmarks/quality/run.py: a family's draw with a seed, as a row of this name, and the file that it leaves."""

    family: str
    name: str
    trial: int
    seed: int
    path: Path


def arguments():
    options = parser(__doc__)
    options.add_argument("--data_dir", default="../shared/data/amazon_beauty", help="folder of the data set's files")
    options.add_argument("--runs", required=True, help="folder for a file per run, and their logs")
    options.add_argument("--families", nargs="+", choices=list(FAMILIES), help="all when not given")
    options.add_argument("--trials", type=int, default=16, help="settings drawn for each family (16)")
    options.add_argument(
        "--winners",
        type=int,
        nargs="+",
        metavar="SEED",
        help="train each family's best with these, and judge it on test",
    )
    options.add_argument(
        "--judged_users", type=int, default=5000, help="validation users that say which weights stay (5000)"
    )
    options.add_argument("--keep", help="with --winners: folder for their rankings and generators")
    options.add_argument("--recipes", default=str(RECIPES), help="folder of the recipes")
    options.add_argument("--jobs", type=int, default=1, help="runs at once (1)")
    asked = options.parse_args()
    if asked.keep and not asked.winners:
        options.error("--keep needs --winners: draws are not kept")
    if asked.quick:  # in a folder of its own: it says nothing of the settings
        asked.families, asked.trials, asked.judged_users = asked.families or ["hstu", "onerec"], 1, 100
        asked.runs = f"{asked.runs}/quick"
    return asked


def main() -> None:
    options = arguments()
    runs, families = Path(options.runs), options.families or list(FAMILIES)
    runs.mkdir(parents=True, exist_ok=True)
    draws = [
        Run(family, name_of(family, trial), trial, 0, runs / f"{name_of(family, trial)}.json")
        for family in families
        for trial in range(options.trials)
    ]
    wanted = draws if options.winners is None else winners(draws, options.winners, runs)
    for run in (*draws, *wanted):  # before anything is trained
        if run.path.is_file():
            check(run.path, drawn(run.family, run.trial), options.judged_users)
    with ThreadPoolExecutor(options.jobs) as pool:
        failed = [log for log in pool.map(lambda run: one(options, run), wanted) if log]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(wanted)} runs failed; the first of their logs: {failed[0]}")
    files = [str(run.path) for run in wanted]
    join = [sys.executable, str(QUALITY), "--join", *files, *(["--json", options.json] if options.json else [])]
    raise SystemExit(subprocess.run(join).returncode)


def winners(draws: list[Run], seeds: list[int], runs: Path) -> list[Run]:
    """
    The runs of each family's best draw.

    Raises:
        SystemExit: a draw has not run.
    """
    missing = [run.name for run in draws if not run.path.is_file()]
    if missing:
        raise SystemExit(
            f"--winners needs all draws, and {len(missing)} of {len(draws)} have not run ({missing[0]} is one): "
            "the same command without --winners runs them"
        )
    found = []
    for family in dict.fromkeys(run.family for run in draws):
        trial = max((run for run in draws if run.family == family), key=lambda run: measured(run.path)).trial
        name = winner(family)
        found += [Run(family, name, trial, seed, runs / f"{name}_{trial:02d}-{seed}.json") for seed in seeds]
    return found


def one(options, run: Run) -> Path | None:
    """Runs one setting, unless its file is there (and what is kept of it); the log where it failed."""
    about, settings, log = FAMILIES[run.family], drawn(run.family, run.trial), run.path.with_suffix(".log")
    kept = f"{options.keep}/{run.name}-{run.seed}-test.npz" if options.keep else None
    if run.path.is_file() and (kept is None or Path(kept).is_file()):
        return None
    command = [sys.executable, str(QUALITY), "--data_dir", options.data_dir]
    command += ["--recipe", f"{options.recipes}/{about.recipe}", "--rows", about.row, "--label", run.name]
    command += ["--judged_users", str(options.judged_users), "--seeds", str(run.seed), "--json", str(run.path)]
    command += ["--split", "test" if options.winners else "validation"]
    command += ["--keep", options.keep] if options.keep else []
    command += ["--quick"] if options.quick else []
    command += ["--set", *(f"{key}={value}" for key, value in settings.items())]
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    with log.open("w") as said:
        done = subprocess.run(command, stdout=said, stderr=said, env={"OMP_NUM_THREADS": threads, **os.environ})
    say(f"{run.name}, seed {run.seed}: {f'failed, {log}' if done.returncode else measured(run.path)}")
    return log if done.returncode else None


def check(path: Path, settings: dict[str, Any], judged_users: int) -> None:
    """
    Checks that a file is of these settings and as many users.

    Raises:
        SystemExit: it is not.
    """
    row = json.loads(path.read_text())["rows"][0]
    differ = [key for key, value in settings.items() if str(row["settings"].get(key)) != str(value)]
    differ += ["--judged_users"] if row["chosen_on"] != judged_users else []
    if differ:
        raise SystemExit(f"{path} is there, measured with another {', '.join(differ)}: give --runs another folder")


def measured(path: Path) -> float:
    """What all validation users say, NDCG@10."""
    return next(row["value"] for row in json.loads(path.read_text())["rows"] if row["name"].endswith(METRIC))


if __name__ == "__main__":
    main()
