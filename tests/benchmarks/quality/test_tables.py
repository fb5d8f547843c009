"""The generated tables are those of the result files, and each winner of the search has the settings of its best trial."""

import itertools
import json
import statistics
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality.experiment import load
from benchmarks.quality.tables import (
    DATASET,
    MAIN,
    METRIC,
    NOTES,
    PAGE,
    README,
    RESULTS,
    expected_best,
    pages,
    read_results,
    search_table,
    searched,
    tables,
    trial_name,
    trial_values,
)

SEARCHED = searched(read_results()["quality_search"])


@pytest.fixture(scope="module")
def results():
    return read_results()


def test_pages_have_the_tables_of_the_results(results):
    for path, text in pages(results).items():
        assert text == path.read_text(encoding="utf-8"), f"python benchmarks/quality/tables.py ({path.name})"


@pytest.mark.parametrize(
    ("file", "row", "changed"),
    [
        ("quality", "hstu/recall@10", {README, PAGE, NOTES}),
        ("quality_ablations", "small/validation/recall@10", {PAGE, NOTES}),
        ("quality_search", f"hstu_trial_14/{METRIC}", {NOTES}),
    ],
)
def test_another_value_is_another_table(results, file, row, changed):
    other = deepcopy(results)
    (found,) = (one for one in other[file]["rows"] if one["name"] == f"{DATASET}/{row}")
    found["value"] += 0.1
    before, after = tables(results), tables(other)
    assert {path for path in before if before[path] != after[path]} == changed


def test_tables_are_short(results):
    for path in (README, PAGE):
        for table in tables(results)[path].values():
            assert table.count("\n") <= 2 + 8
    assert "sasrec_text" in MAIN


def test_results_stay_small():
    assert sum(path.stat().st_size for path in RESULTS.iterdir()) <= 500_000


def test_values_of_seeds_are_those_of_the_rows(results):
    for file in results.values():
        for row in file["rows"]:
            seeds = list(row["seeds"].values())
            assert row["value"] == pytest.approx(statistics.mean(seeds), abs=1e-12)
            assert row["spread"] == [min(seeds), max(seeds)]
            assert "/".join(row["name"].split("/")[:2]) in file["experiments"]


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=7), data=st.data())
@settings(deadline=None)
def test_the_expected_best_is_the_mean_over_all_choices(values, data):
    trials = data.draw(st.integers(1, len(values)))
    choices = [max(some) for some in itertools.combinations(values, trials)]
    assert expected_best(values, trials) == pytest.approx(statistics.mean(choices))


@pytest.mark.parametrize("name", SEARCHED)
def test_the_winner_has_the_settings_of_the_best_trial(results, name):
    experiment = load(name)
    measured = [
        results["quality_search"]["experiments"][f"{DATASET}/{trial_name(name, number)}"] for number in range(16)
    ]
    values = trial_values(results["quality_search"], name)
    assert len(values) == 16
    winner = results["quality"]["experiments"][f"{DATASET}/{name}"]
    assert experiment.settings.items() >= measured[values.index(max(values))]["settings"].items()
    assert len({json.dumps(how["settings"]) for how in measured}) > 14
    assert {how["selection_users"] for how in (*measured, winner)} == {5000}
    (row,) = (row for row in results["quality"]["rows"] if row["name"] == f"{DATASET}/{name}/ndcg@10")
    assert list(row["seeds"]) == ["0", "1", "2"]


def test_recorded_settings_are_those_of_the_experiments(results):
    for file in ("quality", "quality_ablations"):
        for name, how in results[file]["experiments"].items():
            recorded = how["settings"]
            if name.startswith(DATASET) and not {"ensemble", "evaluated"} & set(recorded):
                experiment = load(name.split("/")[1].removesuffix("_last"))
                alignment = {} if experiment.alignment is None else {"alignment": experiment.alignment}
                assert recorded.items() >= {**experiment.settings, **alignment}.items(), name


def test_models_with_different_numbers_of_trials_have_no_table(results):
    assert search_table(results["quality_search"], results["quality"]).count("\n") == 2 + len(SEARCHED)
    search = json.loads(json.dumps(results["quality_search"]))
    search["rows"] = [row for row in search["rows"] if "hstu_trial_15" not in row["name"]]
    with pytest.raises(ValueError, match="'hstu': 15"):
        search_table(search, results["quality"])
