"""
The generated tables of README.md, docs/benchmarks.md and NOTES.md, from benchmarks/results/quality*.json.

    python benchmarks/quality/tables.py           writes them into their pages
    python benchmarks/quality/tables.py --check   exits with status 1 where a page differs
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/quality/tables.py`

from benchmarks.quality.experiment import load

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README, PAGE, NOTES = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", Path(__file__).with_name("NOTES.md")
DATASET = "amazon-beauty"
MAIN = ("popularity", "item_knn", "tiger", "hstu", "sasrec", "sasrec_text", "onerec", "onerec_evidence")
# Recall@10 / NDCG@10 on Beauty with the same split, and where they were published.
PUBLISHED = {
    "tiger": ".0648 / .0384 (TIGER paper)",
    "hstu": ".0704 / .0389 (ActionPiece paper)",
    "sasrec": ".0859 / .0503 (a replication)",
}
TAUGHT = (
    "small",
    "small_kmeans",
    "small_rq_vae",
    "small_text",
    "small_digit",
    "small_24_experts",
    "small_item_vectors",
    "small_wide",
)
FEWER = (1, 2, 4, 8)  # trials
METRIC = "validation/ndcg@10"  # on all validation users: selected the best trial


def main_table(results: dict[str, Any], published: bool = False) -> str:
    """Recall and NDCG on test of the models in MAIN."""
    rows, lines = _by_name(results), []
    for name in MAIN:
        recall, ndcg = (spread(rows[f"{DATASET}/{name}/{metric}"]) for metric in ("recall@10", "ndcg@10"))
        lines.append([load(name).description, recall, ndcg, *([PUBLISHED.get(name, "")] if published else [])])
    return markdown(["Amazon Beauty, test", "Recall@10", "NDCG@10", *(["published"] if published else [])], lines)


def ablation_table(results: dict[str, Any], names: Sequence[str] | None = None) -> str:
    """Recall and NDCG on validation of these ablations, of all in the results by default."""
    rows, lines = _by_name(results), []
    for name in names or [experiment.split("/")[1] for experiment in results["experiments"]]:
        metrics = (spread(rows[f"{DATASET}/{name}/validation/{metric}"]) for metric in ("recall@10", "ndcg@10"))
        lines.append([load(name).description, *metrics, f"{rows[f'{DATASET}/{name}/parameters']['value']:,.0f}"])
    return markdown(["Amazon Beauty, validation", "Recall@10", "NDCG@10", "parameters"], lines)


def search_table(search: dict[str, Any], results: dict[str, Any]) -> str:
    """
    Per model the expected best NDCG@10 on validation after fewer trials, the best of all, and the winner with three seeds.

    Args:
        search: results of the trials.
        results: results of the winners.

    Raises:
        ValueError: the models have different numbers of trials.
    """
    rows, lines = _by_name(results), []
    values = {name: trial_values(search, name) for name in searched(search)}
    trials = {name: len(some) for name, some in values.items()}
    if len(set(trials.values())) > 1:
        raise ValueError(f"the models have different numbers of trials, {trials}. The table needs the same for all")
    for name, some in values.items():
        fewer = [number(expected_best(some, count)) for count in FEWER]
        seeds = [spread(rows[f"{DATASET}/{name}/{metric}"]) for metric in (METRIC, "ndcg@10", "recall@10")]
        lines.append([load(name).description, *fewer, number(max(some)), *seeds])
    best_of = [f"best of {count}" for count in FEWER]
    head = [
        "NDCG@10, validation",
        *best_of,
        f"best of {max(trials.values())}",
        "three seeds",
        "test",
        "test Recall@10",
    ]
    return markdown(head, lines)


def expected_best(values: Sequence[float], trials: int) -> float:
    """
    The mean of the best value over all choices of `trials` of these values (expected validation performance, Dodge et al., arXiv 1909.03004,
    without replacement).

    Example:
        >>> expected_best([0.1, 0.2, 0.4], 2)  # of .1 .2, .1 .4, .2 .4
        0.3333333333333333
    """
    ordered = sorted(values)
    choices = (math.comb(rank, trials - 1) for rank in range(len(ordered)))  # in which this one is the best
    return sum(value * count for value, count in zip(ordered, choices, strict=True)) / math.comb(len(ordered), trials)


def trial_values(search: dict[str, Any], experiment: str) -> list[float]:
    """NDCG@10 on all validation users, a value per trial, in their order."""
    rows, values = _by_name(search), []
    while (name := f"{DATASET}/{trial_name(experiment, len(values))}/{METRIC}") in rows:
        values.append(rows[name]["value"])
    return values


def searched(search: dict[str, Any]) -> list[str]:
    """The experiments with trials in the results of a search, in alphabetical order."""
    return sorted({name.split("/")[1].rsplit("_trial_", 1)[0] for name in search["experiments"]})


def trial_name(experiment: str, trial: int) -> str:
    """The row of a trial."""
    return f"{experiment}_trial_{trial:02d}"


def _by_name(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in results["rows"]}


def number(value: float) -> str:
    """`.0726`"""
    return f"{value:.4f}".lstrip("0")


def spread(row: dict[str, Any]) -> str:
    """`.0726 ± .0015`: mean and standard deviation over seeds."""
    seeds = list(row["seeds"].values())
    return number(row["value"]) + (f" ± {number(statistics.stdev(seeds))}" if len(seeds) > 1 else "")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    first, *rest = (f"| {' | '.join(cells)} |\n" for cells in (head, *lines))
    return first + "|---" * len(head) + "|\n" + "".join(rest)


def tables(read: dict[str, dict[str, Any]]) -> dict[Path, dict[str, str]]:
    """Per page its tables by name, from the content of `quality`, `quality_ablations` and `quality_search`."""
    results, ablations, search = (read[name] for name in ("quality", "quality_ablations", "quality_search"))
    return {
        README: {"quality": main_table(results)},
        PAGE: {"quality": main_table(results, published=True), "ablation": ablation_table(ablations, TAUGHT)},
        NOTES: {"ablation": ablation_table(ablations), "search": search_table(search, results)},
    }


def read_results() -> dict[str, dict[str, Any]]:
    """The content of the result files by name."""
    return {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("quality*.json")}


def replaced(page: str, name: str, table: str) -> str:
    """
    The page with this table between its two marker comments.

    Raises:
        ValueError: the page lacks the markers.
    """
    begin, end = f"<!-- {name} table: benchmarks/quality/tables.py -->\n", f"<!-- end of the {name} table -->\n"
    before, found, rest = page.partition(begin)
    _, ends, after = rest.partition(end)
    if not (found and ends):
        raise ValueError(f"a page lacks the lines {begin.strip()} and {end.strip()}. Add them where the table belongs")
    return before + begin + table + end + after


def pages(read: dict[str, dict[str, Any]]) -> dict[Path, str]:
    """Per page its text with the tables of these results."""
    new = {}
    for path, made in tables(read).items():
        new[path] = path.read_text(encoding="utf-8")
        for name, table in made.items():
            new[path] = replaced(new[path], name, table)
    return new


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="write nothing")
    check, status = options.parse_args().check, 0
    for path, text in pages(read_results()).items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif text != path.read_text(encoding="utf-8"):
            print(f"{path} differs from the results. Run {Path(__file__).name}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
