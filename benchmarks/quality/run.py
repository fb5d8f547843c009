"""
The contest: models of the field and OneRec under one protocol. Leave-one-out, the whole catalogue ranked for every test user, the same items left
out (those of the history), the same stopping by NDCG@10 on validation users (or none, `--judged_users 0`); each seed fits semantic IDs,
initialises and shuffles anew. A row trains for the epochs of its settings, or all rows for the same `--minutes`. The rows are those of
_quality_rows.py.

    python benchmarks/quality/run.py --dataset amazon-beauty --data_dir ../shared/data/amazon_beauty --rows sasrec_ce onerec --seeds 0 1 2 \\
        --json benchmarks/results/quality.json

A file that `--json` names keeps its other rows, which must be of the same protocol: rows can be measured one by one.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import dataset_options, finish, parser, recipe_and_folder, say
from benchmarks.quality.alignment import SHARED as ALIGNMENT_SETTINGS
from benchmarks.quality.experiments import ROWS
from benchmarks.quality.runs import ASKED, Contest, for_items, fused, judge_kept, parsed, run_row

PROTOCOL = ("split", "protocol")
QUICK_ALIGNMENT = {"examples": 200, "num_train_epochs": 1, "reward_epochs": 1}


def arguments():
    options = parser(__doc__)
    dataset_options(options)
    options.add_argument("--recipe", help="sizes of the generators; recipes/DATASET.yaml when not given")
    options.add_argument("--rows", nargs="+", default=["popularity", "item_knn", "onerec"], choices=[*ROWS, "all"])
    options.add_argument(
        "--minutes",
        type=float,
        help="of training, for every row, in place of its epochs: CPU time of all threads, wall time on a GPU",
    )
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument(
        "--split", default="test", choices=("test", "validation"), help="validation to choose settings; test has both"
    )
    options.add_argument(
        "--judged_users",
        type=int,
        default=3000,
        help="validation users that decide when to stop; 0: the last weights stay",
    )
    options.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings over the row's")
    options.add_argument("--label", help="another name for the row, for a run with --set")
    options.add_argument("--keep", help="folder for generators, and for the rankings of trained models")
    options.add_argument(
        "--judge",
        nargs="+",
        metavar="FOLDERS",
        help="no training: judge the generators that --keep wrote, a folder for each of --seeds, asked as --set says; needs --label",
    )
    options.add_argument(
        "--align",
        action="store_true",
        help="with --judge: go on training them by preference alignment first, as the row codes_ipa does; --set also says how",
    )
    options.add_argument(
        "--fuse",
        nargs="+",
        metavar="FILES",
        help="no training: fuse the rankings of FILES-SPLIT.npz that --keep wrote; needs --label. With {seed} in the names: for each of --seeds",
    )
    options.add_argument(
        "--rescore",
        action="store_true",
        help="with --fuse: the items of the first of FILES alone, in the order of all",
    )
    options.add_argument("--join", nargs="+", metavar="JSON", help="no runs: join files of the same protocol")
    return options.parse_args()


def main() -> None:
    options = arguments()
    if "all" in options.rows:
        options.rows = [name for name in ROWS if not options.judged_users or "averaged" not in ROWS[name].settings]
    if options.join:
        join(options.join, options.json)
        return
    import torch

    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    minutes, small = options.minutes, []
    _check(options)
    recipe, folder = recipe_and_folder(options)
    recipe = options.recipe or recipe
    if options.quick:
        minutes, small = 0.1, ["--hidden_size", "32", "--decoder_layers", "1", "--kmeans_iterations", "4"]
        options.judged_users = min(options.judged_users, 100)
    config = ["--config", str(recipe), "--data_dir", folder, *small]
    from onerec_hf.workflows import load_in_memory

    data_args, *_, training_args = parsed(config, {})
    if options.recipe and data_args.dataset != options.dataset:
        raise ValueError(
            f"{recipe} is of {data_args.dataset}: give --dataset {data_args.dataset}, not {options.dataset}"
        )
    data = load_in_memory(data_args)
    if options.quick:
        few = {name: getattr(data.split, name).select(range(300)) for name in ("validation", "test")}
        data = replace(data, split=replace(data.split, **few))
    splits = ["validation"] if options.split == "validation" else ["validation", "test"]
    about = {"split": options.split, "protocol": data.split.description}
    _kept(options.json, [], about)  # refused before anything is trained

    def contest(seed: int) -> Contest:
        return Contest(data, training_args.eval_exclude_seen, seed, options.judged_users)

    said = [setting.split("=", 1) for setting in options.set]
    if options.fuse:
        rescored = {"rescored": True} if options.rescore else {}
        how = _how({"fused": [Path(files).name for files in options.fuse], **rescored})
        measured = [
            fused(
                contest(seed), [files.replace("{seed}", str(seed)) for files in options.fuse], splits, options.rescore
            )
            for seed in options.seeds
        ]
        rows = _rows_of(f"{options.dataset}/{options.label}", options.seeds, measured, how)
    elif options.judge:
        asked = {key: _value("onerec", value) for key, value in said if key in ASKED}
        settings, alignment = {"judged": [Path(kept).name for kept in options.judge], **asked}, None
        if options.align:
            over = {key: _value("alignment", value) for key, value in said if key not in ASKED}
            alignment = {**ALIGNMENT_SETTINGS, **(QUICK_ALIGNMENT if options.quick else {}), **over}
            settings["alignment"] = alignment
        how = _how(settings, Path(recipe).name)
        measured = [
            judge_kept(contest(seed), kept, asked, config, splits, _kept_as(options, options.label, seed), alignment)
            for seed, kept in zip(options.seeds, options.judge, strict=True)
        ]
        rows = _rows_of(f"{options.dataset}/{options.label}", options.seeds, measured, how)
    else:
        chosen, rows = [], []
        for name in options.rows:
            over = {key: _value(ROWS[name].kind, value) for key, value in said}
            row = replace(ROWS[name], settings={**ROWS[name].settings, **over})
            chosen.append(for_items(name, row, data.source.items))
        for name, row in zip(options.rows, chosen, strict=True):
            label, measured = options.label or name, []
            if options.quick and "alignment" in row.settings:
                row.settings["alignment"] = {**row.settings["alignment"], **QUICK_ALIGNMENT}
            for seed in options.seeds:
                keep = _kept_as(options, label, seed)
                measured.append(run_row(contest(seed), row, config, minutes, splits, keep))
                say(f"{name}, seed {seed}: {measured[-1]}")
            how = _how(row.settings, Path(recipe).name, minutes, options.judged_users)
            rows += _rows_of(f"{options.dataset}/{label}", options.seeds, measured, how)
    finish([*_kept(options.json, rows, about), *rows], options.json, **about)


def _check(options) -> None:
    """
    What would otherwise end a run after its first training.

    Raises:
        ValueError: options that do not go together.
    """
    if (options.fuse or options.judge) and not options.label:
        raise ValueError("--fuse and --judge need --label: the name of the row")
    if options.fuse and len(options.seeds) > 1 and not any("{seed}" in files for files in options.fuse):
        raise ValueError("--fuse the same files for each of --seeds: give one seed, or {seed} in their names")
    if options.rescore and len(options.fuse or ()) < 2:
        raise ValueError("--rescore needs --fuse and two of its files: whose items, and who orders them")
    if options.align and not options.judge:
        raise ValueError("--align needs --judge: the generators that are aligned")
    if options.judge:
        if len(options.judge) != len(options.seeds):
            raise ValueError(
                f"--judge has {len(options.judge)} folders and --seeds {len(options.seeds)}: give one each"
            )
        settings = (*ASKED, *(ALIGNMENT_SETTINGS if options.align else ()))
        others = [setting for setting in options.set if setting.split("=")[0] not in settings]
        if others:
            raise ValueError(f"--set {' '.join(others)}: of a kept generator {', '.join(settings)} can be set")
    elif not options.fuse and options.judged_users:
        averaged = [name for name in options.rows if "averaged" in ROWS[name].settings]
        if averaged:
            raise ValueError(f"{averaged[0]} keeps the average of its last weights, nobody is asked: --judged_users 0")
    if options.keep:
        Path(options.keep).mkdir(parents=True, exist_ok=True)


def _kept_as(options, label: str, seed: int) -> str | None:
    return options.keep and f"{options.keep}/{label}-{seed}"


def _how(
    settings: dict, recipe: str | None = None, minutes: float | None = None, chosen_on: int | None = None
) -> dict:
    """How a row was measured."""
    return {
        "settings": settings,
        "recipe": recipe,
        "minutes": minutes,
        "chosen_on": chosen_on,
        "device": device(),
    }


def device() -> str:
    """What trains the models: the GPU, or the machine."""
    import torch

    from onerec_hf.evaluation.results import machine

    return torch.cuda.get_device_name() if torch.cuda.is_available() else machine()


HOW = ("settings", "recipe", "minutes", "chosen_on", "device")
UNITS = {"train_seconds": "s", "align_seconds": "s", "parameters": "weights", "item_score_weight": "factor"}


def _rows_of(name: str, seeds: Sequence[int], measured: Sequence[dict[str, float]], how: dict) -> list[dict]:
    """A result row per metric, of each seed's metrics."""
    return [
        _row(f"{name}/{metric}", dict(zip(seeds, (run[metric] for run in measured), strict=True)), how)
        for metric in measured[0]
    ]


def _row(name: str, values: dict[int, float], how: dict) -> dict:
    """The result row of a metric: mean, smallest and largest value over seeds, deviation, each seed's, and how they were measured."""
    from onerec_hf.evaluation.results import result_row

    of = list(values.values())
    unit = UNITS.get(name.rsplit("/", 1)[1], "share")
    return {
        **result_row(name, statistics.mean(of), unit, spread=[min(of), max(of)]),
        "deviation": statistics.stdev(of) if len(of) > 1 else None,
        "seeds": {str(seed): value for seed, value in values.items()},
        **{name: how[name] for name in HOW},
    }


def join(paths: list[str], json_path: str | None) -> None:
    """
    Joins the rows of files, seeds of the same row with the same settings into one.

    Raises:
        ValueError: two files differ in protocol, or have other settings or values for the same row.
    """
    files = [json.loads(Path(path).read_text()) for path in paths]
    joined: dict[str, dict] = {}
    for path, file in zip(paths, files, strict=True):
        differing = [name for name in PROTOCOL if file.get(name) != files[0].get(name)]
        if differing:
            raise ValueError(f"{path} was measured under another protocol than {paths[0]}: {', '.join(differing)}")
        for row in file["rows"]:
            before = joined.setdefault(row["name"], row)
            differing = [name for name in HOW if before[name] != row[name]]
            if differing:
                raise ValueError(f"{path} has {row['name']} measured otherwise: {', '.join(differing)}")
            seeds = {int(seed): value for seed, value in {**before["seeds"], **row["seeds"]}.items()}
            joined[row["name"]] = _row(row["name"], dict(sorted(seeds.items())), row)
    about = {name: files[0][name] for name in PROTOCOL} | {
        "versions": files[0]["versions"],
        "machine": files[0]["machine"],
    }
    finish(list(joined.values()), json_path, **about)


def _value(kind: str, value: str):
    """A setting's value: the command line's own parser reads those of a generator."""
    if kind == "onerec":
        return value.split(",") if "," in value else value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _kept(path: str | None, rows: list[dict], about: dict) -> list[dict]:
    """
    Rows of an earlier run that this one has not measured anew.

    Raises:
        ValueError: they are of another protocol.
    """
    if path is None or not Path(path).is_file():
        return []
    earlier = json.loads(Path(path).read_text())
    if any(earlier.get(name) != value for name, value in about.items()):
        raise ValueError(f"{path} holds rows of another protocol (split, sessions, history): name another file")
    new = {row["name"] for row in rows}
    return [row for row in earlier["rows"] if row["name"] not in new]


if __name__ == "__main__":
    main()
