"""Shared by all benchmarks: arguments, CPU time, interleaved repetitions, the printed table and the result file."""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onerec_hf.evaluation.results import result_row, write_results

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
DATA = "../shared/data"  # folder of the data sets, from the repository root


def parser(docstring: str | None) -> argparse.ArgumentParser:
    """An argument parser with --quick and --json, described by the script's docstring."""
    arguments = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="smaller sizes, at most 50 seconds, the same rows")
    arguments.add_argument("--json", help="file for the rows")
    return arguments


def dataset_options(arguments: argparse.ArgumentParser) -> None:
    """Adds --dataset and --data_dir."""
    arguments.add_argument("--dataset", default="amazon-beauty", help="a data set of `onerec-hf train`, with - or _")
    arguments.add_argument("--data_dir", help="folder of the data set's files (../shared/data/NAME)")


def recipe_of(dataset: str, default: str = "amazon_beauty.yaml") -> Path:
    """
    The recipe of a data set's name; `default` where there is none.

    Example:
        >>> [recipe_of(name).name for name in ("movielens", "kuairand-pure", "amazon-sports")]
        ['movielens.yaml', 'kuairand.yaml', 'amazon_beauty.yaml']
    """
    name = dataset.replace("-", "_")
    named = (RECIPES / f"{part}.yaml" for part in (name, name.removesuffix("_pure")))
    return next((path for path in named if path.is_file()), RECIPES / default)


def train_options(options: argparse.Namespace, recipe: Path | None = None) -> list[str]:
    """The options of `onerec-hf train` that name a recipe (by default the data set's) and the data set of [`dataset_options`]."""
    folder = options.data_dir or f"{DATA}/{options.dataset.replace('-', '_')}"
    recipe = recipe or recipe_of(options.dataset)
    return ["--config", str(recipe), "--dataset", options.dataset.replace("_", "-"), "--data_dir", folder]


def say(text: str) -> None:
    """Progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def cpu_seconds() -> float:
    """User and system time of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_gib() -> float:
    """Peak resident memory of this process so far, in GiB. (`ru_maxrss` starts at the parent's peak in a spawned process.)"""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20


def one_thread() -> None:
    """Limits torch (and faiss, if installed) to one thread: CPU time then measures work, whatever else runs on the machine."""
    import torch

    torch.set_num_threads(1)
    try:
        import faiss
    except ImportError:
        return
    faiss.omp_set_num_threads(1)


def interleaved(
    runs: Mapping[str, Callable[[], Any]], repetitions: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU and wall seconds per run, interleaved, so that other load on the machine affects all of them."""
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            cpu_before, wall_before = cpu_seconds(), time.perf_counter()
            run()
            cpu[name].append(cpu_seconds() - cpu_before)
            wall[name].append(time.perf_counter() - wall_before)
    return cpu, wall


def ratio_row(name: str, cpu: Mapping[str, list[float]], mine: str, against: str) -> dict[str, Any]:
    """A row with the median of the repetitions' ratios of CPU times, `mine` over `against`, and their spread."""
    ratios = [a / b for a, b in zip(cpu[mine], cpu[against], strict=True)]
    return result_row(name, statistics.median(ratios), "ratio", against=against, spread=[min(ratios), max(ratios)])


def finish(rows: list[dict[str, Any]], json: str | None, **more: Any) -> None:
    """Prints the rows and writes them where `--json` says."""
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        spread = "" if row["spread"] is None else f"  [{row['spread'][0]:.4g}, {row['spread'][1]:.4g}]"
        against = "" if row["against"] is None else f"  against {row['against']}"
        print(f"{row['name']:<{width}}  {row['value']:>10.4g} {row['unit']}{spread}{against}")
    if json:
        write_results(json, rows, **more)
        say(f"wrote {json}")
