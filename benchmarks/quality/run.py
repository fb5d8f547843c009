"""
The quality benchmark: sequential recommenders and OneRec under one protocol. Leave-one-out, the whole catalogue ranked for every test user
without the items of the history, the same checkpoint selection by NDCG@10 on validation users; each seed fits semantic IDs, initialises and
shuffles anew. Experiments are the YAML files under benchmarks/quality/experiments.

    python benchmarks/quality/run.py --rows sasrec onerec --seeds 0 1 2 --json benchmarks/results/quality.json

Rows of the file that --json names are kept unless they are measured again; they must be of the same protocol.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/quality/run.py`

from benchmarks.harness import RECIPES, dataset_options, finish, parser, recipe_of, say, train_options
from benchmarks.quality import experiment as experiments
from benchmarks.quality.alignment import DEFAULTS as ALIGNMENT
from benchmarks.quality.results import joined, merged, new_results
from benchmarks.quality.runs import (
    EVALUATION,
    Benchmark,
    Measured,
    ensemble,
    evaluate_folder,
    parsed,
    run_experiment,
    with_text,
)


def arguments():
    options = parser(__doc__)
    dataset_options(options)
    options.add_argument("--recipe", help="a recipe file; each experiment's, or that of another --dataset, by default")
    names = experiments.names()
    options.add_argument(
        "--data",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="data options over the recipe's, such as ties=shuffle",
    )
    options.add_argument(
        "--rows", nargs="+", default=["popularity", "item_knn", "onerec"], choices=names, metavar="NAME"
    )
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument(
        "--split", default="test", choices=("test", "validation"), help="validation to choose settings; test has both"
    )
    options.add_argument(
        "--selection_users",
        type=int,
        default=5000,
        help="validation users for checkpoint selection; 0 keeps the last weights",
    )
    options.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings over the experiment's")
    options.add_argument("--label", help="another name for the row, for a run with --set")
    options.add_argument("--keep", help="folder for generators, and for the rankings of trained models")
    options.add_argument(
        "--evaluate",
        nargs="+",
        metavar="FOLDER",
        help="no training: evaluate generators that --keep saved, one for each of --seeds, with the settings of --set; needs --label",
    )
    options.add_argument(
        "--align",
        action="store_true",
        help="with --evaluate: preference alignment first; --set takes its settings too",
    )
    options.add_argument(
        "--ensemble",
        nargs="+",
        metavar="FILES",
        help="no training: reciprocal rank fusion of the rankings FILES-SPLIT.npz that --keep saved; needs --label. "
        "{seed} in the names: one ensemble for each of --seeds",
    )
    options.add_argument("--join", nargs="+", metavar="JSON", help="no runs: join result files of the same protocol")
    return options.parse_args()


def check(options) -> None:
    """
    Raises:
        ValueError: options that contradict each other, before anything is trained.
    """
    if (options.ensemble or options.evaluate) and not options.label:
        raise ValueError("--ensemble and --evaluate need --label: the name of the row")
    if options.ensemble and len(options.seeds) > 1 and not any("{seed}" in files for files in options.ensemble):
        raise ValueError("--ensemble has the same files for each of --seeds: pass one seed, or {seed} in the names")
    if options.align and not options.evaluate:
        raise ValueError("--align needs --evaluate: the generators to align")
    if options.label and not (options.ensemble or options.evaluate) and len(options.rows) > 1:
        raise ValueError("--label names one row: pass one experiment to --rows")
    if options.evaluate:
        if len(options.evaluate) != len(options.seeds):
            raise ValueError(
                f"--evaluate has {len(options.evaluate)} folders and --seeds {len(options.seeds)}: pass one for each"
            )
        known = (*EVALUATION, *(ALIGNMENT if options.align else ()))
        others = [setting for setting in options.set if setting.split("=")[0] not in known]
        if others:
            raise ValueError(f"--set {' '.join(others)}: a saved generator takes {', '.join(known)}")


def main() -> None:
    options = arguments()
    check(options)
    if options.join:
        results = joined(options.join)
        finish(results.pop("rows"), options.json, **results)
        return
    import torch

    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    if options.keep:
        Path(options.keep).mkdir(parents=True, exist_ok=True)
    if options.quick:
        options.selection_users = min(options.selection_users, 100)
    results: dict[str, Any] = {"protocol": {}, "experiments": {}, "rows": []}
    for name, how, config, run in planned(options):
        data, exclude_seen = prepared(config, options.quick)
        merged(
            options.json, {**results, "protocol": {options.dataset: data.split.description}}
        )  # refused before training
        measured = []
        for seed in options.seeds:
            benchmark = Benchmark(data, exclude_seen, seed, options.selection_users, options.quick)
            measured.append(run(benchmark, options.keep and f"{options.keep}/{name}-{seed}"))
            say(f"{name}, seed {seed}: {measured[-1]}")
        new = new_results(options.dataset, data.split.description, name, options.seeds, measured, how)
        results = {key: results[key] + new[key] if key == "rows" else results[key] | new[key] for key in results}
    results = merged(options.json, results)
    finish(results.pop("rows"), options.json, **results)


Run = Callable[[Benchmark, "str | None"], Measured]


def planned(options) -> list[tuple[str, dict[str, Any], tuple[str, ...], Run]]:
    """Per row its name, how it is measured, the options of `onerec-hf train` that name recipe and data, and the run of one seed."""
    splits = ["validation"] if options.split == "validation" else ["validation", "test"]
    over = dict(setting.split("=", 1) for setting in options.set)
    if options.ensemble:
        files, config = options.ensemble, recipe_config(options, None)

        def fuse(benchmark: Benchmark, keep: str | None) -> Measured:
            return ensemble(benchmark, [name.replace("{seed}", str(benchmark.seed)) for name in files], splits)

        return [(options.label, described({"ensemble": [Path(name).name for name in files]}), config, fuse)]
    if options.evaluate:
        config, folders = recipe_config(options, None), dict(zip(options.seeds, options.evaluate, strict=True))
        evaluation = {name: value for name, value in over.items() if name in EVALUATION}
        alignment = {name: yaml.safe_load(value) for name, value in over.items() if name not in EVALUATION}
        settings = {"evaluated": [Path(folder).name for folder in options.evaluate], **evaluation}
        settings |= {"alignment": {**ALIGNMENT, **alignment}} if options.align else {}

        def evaluate(benchmark: Benchmark, keep: str | None) -> Measured:
            folder = folders[benchmark.seed]
            return evaluate_folder(
                benchmark, folder, evaluation, list(config), splits, keep, alignment if options.align else None
            )

        return [(options.label, described(settings, config), config, evaluate)]
    return [_trained(options, experiments.load(name), over, splits) for name in options.rows]


def _trained(options, experiment: experiments.Experiment, over: dict[str, str], splits: list[str]):
    config = recipe_config(options, experiment)
    settings = {**experiment.settings, **{name: yaml.safe_load(value) for name, value in over.items()}}
    experiment = with_text(replace(experiment, settings=settings), prepared(config, options.quick)[0].items)
    settings = {
        **experiment.settings,
        **({"alignment": experiment.alignment} if experiment.alignment is not None else {}),
    }
    users = None if experiment.kind == "ranking" else options.selection_users

    def train(benchmark: Benchmark, keep: str | None) -> Measured:
        return run_experiment(benchmark, experiment, list(config), splits, keep)

    return options.label or experiment.name, described(settings, config, users), config, train


def recipe_config(options, experiment: experiments.Experiment | None) -> tuple[str, ...]:
    """The options of `onerec-hf train` that name the data and the recipe: --recipe, the experiment's, or that of another data set."""
    recipe, own = options.recipe, experiment and experiment.recipe
    if recipe is None and own is not None:
        same = own.startswith(options.dataset.replace("-", "_"))
        recipe = RECIPES / own if same else recipe_of(options.dataset, own)
    over = [part for setting in options.data for part in f"--{setting}".split("=", 1)]
    return (*train_options(options, recipe and Path(recipe)), *over)


@cache
def prepared(config: tuple[str, ...], quick: bool) -> tuple[Any, bool]:
    """The data set, with --quick 300 validation and test users, and whether the items of a history are left out of rankings."""
    from onerec_hf.workflows import load_in_memory

    data_args, *_, training_args = parsed(list(config), {})
    data = load_in_memory(data_args)
    if quick:
        few = {name: getattr(data.split, name).select(range(300)) for name in ("validation", "test")}
        data = replace(data, split=replace(data.split, **few))
    return data, training_args.eval_exclude_seen


def described(
    settings: dict[str, Any], config: tuple[str, ...] | None = None, selection_users: int | None = None
) -> dict[str, Any]:
    """How a row was measured."""
    import torch

    from onerec_hf.evaluation.results import machine

    return {
        "settings": settings,
        "recipe": config and Path(config[1]).name,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else machine(),
        "selection_users": selection_users,
    }


if __name__ == "__main__":
    main()
