"""Compares model families on one table: trials, winners with several seeds, costs, the report; resumes after a kill."""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onerec_hf.workflows.compare.bench import Bench
from onerec_hf.workflows.compare.families import load_families
from onerec_hf.workflows.compare.processes import Processes
from onerec_hf.workflows.compare.settings import CompareSettings
from onerec_hf.workflows.dataset import InMemoryDataset
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.loading import load_in_memory, say_every_row
from onerec_hf.workflows.presets import choices_of
from onerec_hf.workflows.results import Result
from onerec_hf.workflows.run_folder import own_folder
from onerec_hf.workflows.settings import DataSettings, gather, given_options


@dataclass(frozen=True)
class Comparison(Result):
    """
    What a comparison found.

    Args:
        folder: report.html, report.md, results.json and models/.
        best: the family with the best validation metric.
        model: the folder of its model.
    """

    folder: Path
    best: str
    model: Path


def compare_models(
    data: DataSettings | None = None, *settings: object, command: str | None = None, **options
) -> Comparison:
    """
    Compares model families on a table: the same number of trials for each, chosen on validation; the winners are trained with several seeds,
    evaluated on test once, and their costs measured. Writes `report.html`, `report.md`, `results.json` and the winners' models into `output_dir`. The
    same call resumes a comparison that was killed, and adds families, trials or seeds to one that has ended.

    Args:
        data: the table, by paths: every run is a process that reads it. Without it, `options` name the table, and the length of histories and the
            order of ties are chosen from the data where they do not.
        settings: [`CompareSettings`], optional.
        command: the command line, for the report.
        options: single fields of these settings and of [`~onerec_hf.workflows.DataSettings`].

    Raises:
        ValueError: an unknown family, a budget in which no family finished a trial, a folder of a comparison with other settings or data.
        FileExistsError: the folder holds something else.
        TypeError: data that are not settings, or an unknown option.

    Example:
        >>> found = compare_models(interactions="ratings.csv", trials=8, budget="2h", output_dir="comparison")  # doctest: +SKIP
        >>> found.best, found.metrics["sasrec/ndcg@10"], found.model  # doctest: +SKIP
    """
    if data is not None and not isinstance(data, DataSettings):
        raise TypeError("compare_models reads the table in every run: pass DataSettings with paths, not a dataset")
    kinds = (DataSettings, CompareSettings)
    if not any(isinstance(given, CompareSettings) for given in settings):
        options.setdefault("output_dir", CompareSettings.output_dir)
    table, how = gather(kinds, settings if data is None else [data, *settings], options)
    assert isinstance(table, DataSettings)
    assert isinstance(how, CompareSettings)
    how.check()
    try:
        from onerec_hf.workflows.compare.search import quiet_optuna
    except ImportError as error:
        raise ImportError(f'comparing needs {error.name}: pip install "onerec-hf[compare]"') from None
    quiet_optuna()
    began, families = time.monotonic(), load_families(how.families, how.spaces)
    table, dataset = _chosen(table, None if data is not None else given_options((DataSettings,), [], options))
    bench = Bench(table, dataset, how, began)
    for note in bench.notes:
        say(note)
    with own_folder(how.folder):
        bench.open_folder(families)
        with Processes(how.jobs) as processes:
            outcomes = bench.search(families, processes)
            bench.train_winners(outcomes, processes)
        bench.measure_costs(outcomes)
        from onerec_hf.workflows.compare.report import write_report

        rows, best = write_report(how.folder, bench, outcomes, command)
        chosen = next(outcome for outcome in outcomes if outcome.family.name == best)
        assert chosen.folder is not None
        shutil.rmtree(how.folder / "scratch", ignore_errors=True)
    return Comparison(rows, how.folder, best, chosen.folder)


def _chosen(table: DataSettings, given: dict[str, Any] | None) -> tuple[DataSettings, InMemoryDataset]:
    """
    The table, with the length of histories and the order of ties as `train` chooses them, where they are not given.

    Args:
        given: single options about data; None where the settings are given as a whole.
    """
    dataset = load_in_memory(table)
    say_every_row(dataset)
    if given is None:
        return table, dataset
    rows = choices_of("auto", dataclasses.replace(dataset, given=frozenset(given)), {})
    chosen = {row.option: row.value for row in rows if row.option in ("max_history", "ties")}
    chosen = {name: value for name, value in chosen.items() if value != getattr(table, name)}
    if not chosen:
        return table, dataset
    say("chosen from the data: " + ", ".join(f"--{name} {value}" for name, value in chosen.items()))
    table = dataclasses.replace(table, **chosen)
    return table, load_in_memory(table)
