"""
Result files of the quality benchmark: rows with a value per seed, and once per experiment how it was measured.

`protocol` holds the protocol of each data set, `experiments` the settings, recipe, selection users and device of each `DATASET/EXPERIMENT`.
Rows are named `DATASET/EXPERIMENT/METRIC` on test users, and `DATASET/EXPERIMENT/validation/METRIC` on validation users.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

UNITS = {"train_seconds": "s", "align_seconds": "s", "parameters": "weights"}


def new_results(
    dataset: str, protocol: str, name: str, seeds: Sequence[int], measured: Sequence[dict[str, float]], how: dict
) -> dict[str, Any]:
    """
    The results of one experiment.

    Args:
        measured: per seed a value for each metric.
        how: settings, recipe, selection users and device.
    """
    rows = [
        seeds_row(f"{dataset}/{name}/{metric}", dict(zip(seeds, (run[metric] for run in measured), strict=True)))
        for metric in measured[0]
    ]
    return {"protocol": {dataset: protocol}, "experiments": {f"{dataset}/{name}": how}, "rows": rows}


def seeds_row(name: str, values: dict[int, float]) -> dict[str, Any]:
    """The row of a metric: mean, [min, max] and each seed's value."""
    from onerec_hf.evaluation.results import result_row

    of = list(values.values())
    unit = UNITS.get(name.rsplit("/", 1)[1], "share")
    row = result_row(name, statistics.mean(of), unit, spread=[min(of), max(of)])
    return {**row, "seeds": {str(seed): value for seed, value in values.items()}}


def check_protocol(path: str | Path, results: dict[str, Any], protocol: dict[str, str]) -> None:
    """
    Raises:
        ValueError: the results of this file were measured under another protocol.
    """
    for dataset, description in protocol.items():
        if results["protocol"].get(dataset, description) != description:
            raise ValueError(f"{path} holds rows of another protocol for {dataset}. Write to another file")


def merged(path: str | Path | None, new: dict[str, Any]) -> dict[str, Any]:
    """
    The results of a file, if it exists, with the rows of these experiments replaced or added.

    Raises:
        ValueError: the file holds rows of another protocol.
    """
    if path is None or not Path(path).is_file():
        return new
    old = json.loads(Path(path).read_text())
    check_protocol(path, old, new["protocol"])
    replaced = {row["name"] for row in new["rows"]}
    return {
        "protocol": {**old["protocol"], **new["protocol"]},
        "experiments": {**old["experiments"], **new["experiments"]},
        "rows": [*(row for row in old["rows"] if row["name"] not in replaced), *new["rows"]],
    }


def joined(paths: Sequence[str]) -> dict[str, Any]:
    """
    The results of several files; seeds of the same row become one row.

    Raises:
        ValueError: two files differ in protocol, or in how they measured the same experiment.
    """
    protocol: dict[str, str] = {}
    experiments: dict[str, dict] = {}
    rows: dict[str, dict] = {}
    for path in paths:
        file = json.loads(Path(path).read_text())
        check_protocol(path, file, protocol)
        protocol |= file["protocol"]
        for name, how in file["experiments"].items():
            if experiments.setdefault(name, how) != how:
                raise ValueError(
                    f"{path} holds {name} measured with other settings than the files before. Leave it out"
                )
        for row in file["rows"]:
            before = rows[row["name"]]["seeds"] if row["name"] in rows else {}
            values = {**before, **row["seeds"]}
            rows[row["name"]] = seeds_row(row["name"], _by_seed(values.items()))
    return {"protocol": protocol, "experiments": experiments, "rows": list(rows.values())}


def _by_seed(values: Iterable[tuple[str, float]]) -> dict[int, float]:
    return dict(sorted((int(seed), value) for seed, value in values))
