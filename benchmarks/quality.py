"""
The contest: models of the field and OneRec under one protocol. Leave-one-out, the whole catalogue ranked for every test user, the same items left
out (those of the history), the same budget of CPU minutes for training, the same stopping by NDCG@10 on validation users; each seed fits semantic
IDs, initialises and shuffles anew. The rows are those of _quality_rows.py.

    python benchmarks/quality.py --dataset amazon-beauty --data_dir ../shared/data/amazon_beauty --rows sasrec_ce onerec --seeds 0 1 2 \\
        --json benchmarks/results/quality.json

A file that `--json` names and that has rows of the same protocol keeps them: rows can be measured one by one.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

from _harness import finish, parser, say
from _quality_rows import ROWS
from _quality_runs import Contest, parsed, run_row

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")


def arguments():
    options = parser(__doc__)
    options.add_argument("--dataset", default="amazon-beauty", help="a recipe's name, '-' or '_' inside")
    options.add_argument("--data_dir", help="folder of the data set's files; ../shared/data/NAME when not given")
    options.add_argument("--rows", nargs="+", default=["popularity", "item_knn", "onerec"], choices=[*ROWS, "all"])
    options.add_argument(
        "--cpu_minutes", type=float, default=30, help="training budget: user + system time, all threads"
    )
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument(
        "--split", default="test", choices=("test", "validation"), help="validation to choose settings"
    )
    options.add_argument("--judged_users", type=int, default=3000, help="validation users that decide when to stop")
    options.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings over the row's")
    return options.parse_args()


def main() -> None:
    options = arguments()
    names = list(ROWS) if "all" in options.rows else options.rows
    minutes, small = options.cpu_minutes, []
    recipe = RECIPES / f"{options.dataset.replace('-', '_')}.yaml"
    folder = options.data_dir or f"../shared/data/{options.dataset.replace('-', '_')}"
    if options.quick:
        minutes, small = 0.1, ["--hidden_size", "32", "--decoder_layers", "1", "--kmeans_iterations", "4"]
        options.judged_users = 100
    config = ["--config", str(recipe), "--data_dir", folder, *small]
    from onerec_hf.cli.steps import prepare_data
    from onerec_hf.evaluation.results import result_row

    data_args, *_, training_args = parsed(config, {})
    data = prepare_data(data_args)
    if options.quick:
        few = {name: getattr(data.split, name).select(range(300)) for name in ("validation", "test")}
        data = replace(data, split=replace(data.split, **few))
    said = [setting.split("=", 1) for setting in options.set]
    rows = []
    for name in names:
        row = ROWS[name]
        row = replace(row, settings={**row.settings, **{key: _value(row.kind, value) for key, value in said}})
        measured = []
        for seed in options.seeds:
            contest = Contest(data, training_args.eval_exclude_seen, seed, options.judged_users)
            measured.append(run_row(contest, row, config, minutes, options.split))
            say(f"{name}, seed {seed}: {measured[-1]}")
        for metric in (*METRICS, *(extra for extra in ("chosen", "illegal_share") if extra in measured[0])):
            values = [run[metric] for run in measured]
            spread = [min(values), max(values)]
            rows.append(
                {
                    **result_row(
                        f"{options.dataset}/{name}/{metric}", statistics.mean(values), "share", spread=spread
                    ),
                    "deviation": statistics.stdev(values) if len(values) > 1 else None,
                    "seeds": options.seeds,
                    "settings": row.settings,
                }
            )
    protocol = {"cpu_minutes": minutes, "split": options.split, "chosen_on": options.judged_users}
    about = {**protocol, "protocol": data.split.description}
    finish([*_kept(options.json, rows, about), *rows], options.json, **about)


def _value(kind: str, value: str):
    """A setting's value: the command line's own parser reads those of a generator."""
    if kind == "onerec":
        return value.split(",") if "," in value else value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _kept(path: str | None, rows: list[dict], about: dict) -> list[dict]:
    """Rows of an earlier run of the same protocol that this one has not measured anew."""
    if path is None or not Path(path).is_file():
        return []
    earlier = json.loads(Path(path).read_text())
    if any(earlier.get(name) != value for name, value in about.items()):
        return []
    new = {row["name"] for row in rows}
    return [row for row in earlier["rows"] if row["name"] not in new]


if __name__ == "__main__":
    main()
