"""
An equal search for every family of the contest: as many settings each, drawn at random from spaces that stand in _search_spaces.py, one seed, the same
stop; the one that validation likes best is then trained with each of `--seeds` and judged on test, once.

    python benchmarks/search.py --data_dir ../shared/data/amazon_beauty --runs runs/search --json benchmarks/results/quality_search.json
    python benchmarks/search.py --data_dir ../shared/data/amazon_beauty --runs runs/search --winners --seeds 0 1 2 --json searched.json

Every run is one of benchmarks/quality.py and leaves a file in the folder `--runs`; those that are there are not run again, so that a search can be cut
off and gone on with, and drawn longer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _harness import RECIPES, parser, say
from _search_spaces import FAMILIES, drawn, name_of, winner

METRIC = "validation/ndcg@10"
QUALITY = Path(__file__).with_name("quality.py")


def arguments():
    options = parser(__doc__)
    options.add_argument("--data_dir", default="../shared/data/amazon_beauty", help="folder of the data set's files")
    options.add_argument("--runs", required=True, help="folder for a file per run, and their logs")
    options.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    options.add_argument("--trials", type=int, default=16, help="settings drawn for each family")
    options.add_argument("--winners", action="store_true", help="train each family's best anew and judge it on test")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of --winners")
    options.add_argument("--judged_users", type=int, default=5000, help="validation users that decide when to stop")
    options.add_argument("--keep", help="folder for the winners' rankings and generators")
    options.add_argument("--recipes", default=str(RECIPES), help="folder of the generators' recipes")
    options.add_argument("--jobs", type=int, default=1, help="runs at once")
    return options.parse_args()


def main() -> None:
    options = arguments()
    if options.quick:
        options.trials, options.seeds = min(options.trials, 2), options.seeds[:1]
    runs = Path(options.runs)
    runs.mkdir(parents=True, exist_ok=True)
    if options.winners:
        wanted = [
            (family, winner(family), seed, settings_of(best(runs, family, options.trials)))
            for family in options.families
            for seed in options.seeds
        ]
        files = [runs / f"{name}-{seed}.json" for _, name, seed, _ in wanted]
    else:
        wanted = [
            (family, name_of(family, trial), 0, drawn(family, trial))
            for family in options.families
            for trial in range(options.trials)
        ]
        files = [runs / f"{name}.json" for _, name, _, _ in wanted]
    with ThreadPoolExecutor(options.jobs) as pool:
        failed = [path for path in pool.map(lambda run, path: one(options, *run, path), wanted, files) if path]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(wanted)} runs failed; the first of their logs: {failed[0]}")
    join = [
        sys.executable,
        str(QUALITY),
        "--join",
        *map(str, files),
        *(["--json", options.json] if options.json else []),
    ]
    raise SystemExit(subprocess.run(join).returncode)


def one(options, family: str, name: str, seed: int, settings: dict[str, Any], path: Path) -> Path | None:
    """Runs one setting, unless its file is there; the log where it failed."""
    if path.is_file():
        return None
    row, log = FAMILIES[family], path.with_suffix(".log")
    command = [
        sys.executable,
        str(QUALITY),
        "--data_dir",
        options.data_dir,
        "--recipe",
        f"{options.recipes}/{row.recipe}",
    ]
    command += ["--rows", row.row, "--label", name, "--judged_users", str(options.judged_users), "--seeds", str(seed)]
    command += ["--split", "test" if options.winners else "validation", "--json", str(path)]
    command += ["--keep", options.keep] if options.keep and options.winners else []
    command += ["--quick"] if options.quick else []
    command += ["--set", *(f"{key}={value}" for key, value in settings.items())]
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    with log.open("w") as said:
        done = subprocess.run(command, stdout=said, stderr=said, env={"OMP_NUM_THREADS": threads, **os.environ})
    say(f"{name}, seed {seed}: {'failed, ' + str(log) if done.returncode else measured(path)}")
    return log if done.returncode else None


def measured(path: Path) -> float:
    """What all validation users say, NDCG@10."""
    return next(row["value"] for row in json.loads(path.read_text())["rows"] if row["name"].endswith(METRIC))


def best(runs: Path, family: str, trials: int) -> Path:
    """
    The file of the family's draw that validation likes best.

    Raises:
        FileNotFoundError: a draw has not run.
    """
    return max((runs / f"{name_of(family, trial)}.json" for trial in range(trials)), key=measured)


def settings_of(path: Path) -> dict[str, Any]:
    """What was drawn for this file's row."""
    family, trial = path.stem.removeprefix("search_").rsplit("_", 1)
    return drawn(family, int(trial))


if __name__ == "__main__":
    main()
