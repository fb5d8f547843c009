"""The equal search (benchmarks/search.py): what it draws, that it goes on where it was cut off, whom it judges, and its table."""

import itertools
import json
import statistics
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# In place of benchmarks/quality.py: writes what it was asked to, with a value that grows with the draw, fails at the draw that FAILS names, joins likewise.
QUALITY = """
import json, os, sys
options = sys.argv[1:]
at = lambda name: options[options.index(name) + 1]
if "--join" not in options:
    label = at("--label")
    if label == os.environ.get("FAILS"):
        raise SystemExit("out of memory")
    rows = [{"name": f"amazon-beauty/{label}/validation/ndcg@10", "value": int(label[-2:]) if label[-1].isdigit() else 0, "options": options}]
    json.dump({"rows": rows}, open(at("--json"), "w"))
else:
    files = options[options.index("--join") + 1 : options.index("--json")]
    json.dump([json.load(open(file))["rows"][0] for file in files], open(at("--json"), "w"))
"""
TUNED_BY_HAND = {
    "gru4rec": "gru4rec_smoothed",
    "hstu": "hstu_smoothed",
    "sasrec": "sasrec_ce_smoothed",
    "sasrec_text": "sasrec_ce_text",
    "onerec": "onerec_items_smoothed",
}


@pytest.fixture
def search(benchmarks, monkeypatch, tmp_path):
    """`search(*options)` runs the search with [`QUALITY`]; the rows that it joined."""
    import search

    (tmp_path / "quality.py").write_text(QUALITY)
    monkeypatch.setattr(search, "QUALITY", tmp_path / "quality.py")

    def run(*options):
        found = tmp_path / "found.json"
        monkeypatch.setattr(
            sys, "argv", ["search.py", "--runs", str(tmp_path / "runs"), "--json", str(found), *options]
        )
        with pytest.raises(SystemExit) as ended:
            search.main()
        assert ended.value.code == 0, ended.value
        return json.loads(found.read_text())

    return run


def set_by(row: dict) -> dict[str, str]:
    return dict(setting.split("=") for setting in row["options"][row["options"].index("--set") + 1 :])


def test_a_search_that_was_cut_off_goes_on(search, monkeypatch, tmp_path):
    from _search_spaces import drawn

    few = ["--families", "hstu", "sasrec", "--trials", "3", "--jobs", "2"]
    monkeypatch.setenv("FAILS", "search_hstu_01")
    with pytest.raises(AssertionError, match=r"1 of 6 runs failed.*search_hstu_01\.log"):
        search(*few)
    assert "out of memory" in (tmp_path / "runs" / "search_hstu_01.log").read_text()
    before = (tmp_path / "runs" / "search_sasrec_02.json").stat().st_mtime_ns
    monkeypatch.delenv("FAILS")
    rows = search(*few)
    assert [row["name"].split("/")[1] for row in rows] == [
        f"search_{family}_0{n}" for family in few[1:3] for n in range(3)
    ]
    assert (tmp_path / "runs" / "search_sasrec_02.json").stat().st_mtime_ns == before
    for row in rows:
        family, trial = row["name"].split("/")[1][len("search_") :].split("_")
        assert set_by(row) == {name: str(value) for name, value in drawn(family, int(trial)).items()}
        assert row["options"][row["options"].index("--split") + 1] == "validation"


def test_each_familys_best_is_judged_on_test(search, tmp_path):
    from _search_spaces import drawn

    few = ["--families", "gru4rec", "onerec", "--trials", "3"]
    search(*few)
    rows = search(*few, "--winners", "--seeds", "4", "5", "--keep", str(tmp_path / "kept"))
    assert [row["name"].split("/")[1] for row in rows] == ["searched_gru4rec"] * 2 + ["searched_onerec"] * 2
    for row, family, seed in zip(rows, ["gru4rec", "gru4rec", "onerec", "onerec"], "4545", strict=True):
        asked = dict(itertools.pairwise(row["options"]))
        assert (asked["--split"], asked["--seeds"], asked["--keep"]) == ("test", seed, str(tmp_path / "kept"))
        assert set_by(row) == {name: str(value) for name, value in drawn(family, 2).items()}


def test_nobody_is_judged_on_test_before_all_have_run(search, tmp_path):
    search("--families", "hstu", "--trials", "2")
    with pytest.raises(FileNotFoundError, match="search_hstu_02"):
        search("--families", "hstu", "--trials", "3", "--winners")


def test_a_space_holds_what_was_tuned_by_hand(benchmarks):
    from _quality_rows import ROWS
    from _search_spaces import FAMILIES

    recipe = {
        "learning_rate": 0.005,
        "hidden_size": 128,
        "intermediate_size": 256,
        "encoder_layers": 2,
        "weight_decay": 0.05,
    }
    defaults = {
        "batch_size": 128,
        "lr": 0.001,
        "weight_decay": 0.01,
        "layers": 1,
        "label_smoothing": 0,
        "schedule": "constant",
    }
    for family, name in TUNED_BY_HAND.items():
        by_hand = {**(recipe if family == "onerec" else defaults), **ROWS[name].settings}
        for setting, values in FAMILIES[family].space.items():
            ways = [value if isinstance(value, dict) else {setting: value} for value in values]
            assert any(by_hand.items() >= way.items() for way in ways), (family, setting)


def test_draws_differ_and_cover_the_space(benchmarks):
    from _search_spaces import FAMILIES, drawn

    for family, about in FAMILIES.items():
        draws = [drawn(family, trial) for trial in range(200)]
        assert len({json.dumps(draw) for draw in draws}) > 190
        for name, values in about.space.items():
            for value in values:
                way = value if isinstance(value, dict) else {name: value}
                assert sum(draw.items() >= way.items() for draw in draws) > 200 / len(values) / 2


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=7), data=st.data())
@settings(deadline=None)
def test_the_best_of_some_is_the_mean_over_all_draws(benchmarks, values, data):
    from _search_table import expected_best

    drawn = data.draw(st.integers(1, len(values)))
    draws = [max(some) for some in itertools.combinations(values, drawn)]
    assert expected_best(values, drawn) == pytest.approx(statistics.mean(draws))


def test_results_are_of_the_declared_draws_and_the_winners_are_theirs(benchmarks):
    from _search_spaces import FAMILIES, drawn, name_of, winner
    from _search_table import METRIC, RESULTS, SEARCH, reached

    def measured(path: Path) -> dict[str, dict]:
        return {row["name"]: row for row in json.loads(path.read_text())["rows"]}

    def has(row: dict, settings: dict) -> bool:
        return all(str(row["settings"][name]) == str(value) for name, value in settings.items())

    search, judged = measured(SEARCH), measured(RESULTS["contest"])
    for family in FAMILIES:
        values = reached(list(search.values()), family)
        assert len(values) == 16
        rows = [search[f"amazon-beauty/{name_of(family, trial)}/{METRIC}"] for trial in range(16)]
        assert all(has(row, drawn(family, trial)) for trial, row in enumerate(rows))
        best = judged[f"amazon-beauty/{winner(family)}/test/ndcg@10"]
        assert has(best, drawn(family, values.index(max(values))))
        assert {row["chosen_on"] for row in (*rows, best)} == {5000}
        assert list(best["seeds"]) == ["0", "1", "2"]


def test_unequal_numbers_of_draws_have_no_table(benchmarks):
    from _search_table import RESULTS, SEARCH, table

    search, judged = (json.loads(path.read_text())["rows"] for path in (SEARCH, RESULTS["contest"]))
    assert table(search, judged).count("\n") == 8
    with pytest.raises(ValueError, match="'hstu': 15"):
        table([row for row in search if "search_hstu_15" not in row["name"]], judged)
