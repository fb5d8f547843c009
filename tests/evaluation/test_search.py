"""The equal search (benchmarks/quality/search.py): what it draws, that it goes on where it was cut off, whom it judges, and its table."""

import inspect
import itertools
import json
import statistics
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]

# In place of benchmarks/quality/run.py: writes what it was asked to, fails at the draw that FAILS names, joins likewise. Draw 1 is the best of 0, 1 and 2, draw 3 better.
QUALITY = """
import json, os, sys
options = sys.argv[1:]
at = lambda name: options[options.index(name) + 1]
if "--join" not in options:
    label = at("--label")
    if label == os.environ.get("FAILS"):
        raise SystemExit("out of memory")
    row = {
        "name": f"amazon-beauty/{label}/validation/ndcg@10",
        "value": {"0": 1, "1": 3, "2": 2, "3": 4}.get(label[-1], 0),
        "settings": dict(setting.split("=") for setting in options[options.index("--set") + 1 :]),
        "chosen_on": int(at("--judged_users")),
        "options": options,
    }
    json.dump({"rows": [row]}, open(at("--json"), "w"))
    if "--keep" in options:
        open(f"{at('--keep')}/{label}-{at('--seeds')}-test.npz", "w").close()
else:
    files = options[options.index("--join") + 1 : options.index("--json")]
    json.dump([json.load(open(file))["rows"][0] for file in files], open(at("--json"), "w"))
"""
TUNED_BY_HAND = {
    "tiger": "tiger",
    "gru4rec": "gru4rec_smoothed",
    "hstu": "hstu_smoothed",
    "sasrec": "sasrec_ce_smoothed",
    "sasrec_text": "sasrec_ce_text",
    "onerec": "onerec_items_smoothed",
}
NOT_HELD = {("tiger", "max_steps")}  # 6,400 by hand


@pytest.fixture
def search(benchmarks, monkeypatch, tmp_path):
    """`search(*options)` runs the search with [`QUALITY`]; the rows that it joined."""
    from benchmarks.quality import search

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


def as_text(settings: dict) -> dict[str, str]:
    return {name: str(value) for name, value in settings.items()}


def test_a_search_that_was_cut_off_goes_on(search, monkeypatch, tmp_path):
    from benchmarks.quality.search_spaces import drawn

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
        assert row["settings"] == as_text(drawn(family, int(trial)))
        assert row["options"][row["options"].index("--split") + 1] == "validation"


def test_each_familys_best_is_judged_on_test(search, tmp_path):
    from benchmarks.quality.search_spaces import drawn

    few, kept = ["--families", "gru4rec", "onerec"], tmp_path / "kept"
    kept.mkdir()
    search(*few, "--trials", "3")
    rows = search(*few, "--trials", "3", "--winners", "4", "5")
    assert [row["name"].split("/")[1] for row in rows] == ["searched_gru4rec"] * 2 + ["searched_onerec"] * 2
    for row, family, seed in zip(rows, ["gru4rec", "gru4rec", "onerec", "onerec"], "4545", strict=True):
        asked = dict(itertools.pairwise(row["options"]))
        assert (asked["--split"], asked["--seeds"]) == ("test", seed)
        assert row["settings"] == as_text(drawn(family, 1))
    # Kept where that is asked for later, and only once.
    (row,) = search("--families", "onerec", "--trials", "3", "--winners", "4", "--keep", str(kept))
    assert (kept / "searched_onerec-4-test.npz").is_file()
    file = tmp_path / "runs" / "searched_onerec_01-4.json"
    before = file.stat().st_mtime_ns
    search("--families", "onerec", "--trials", "3", "--winners", "4", "--keep", str(kept))
    assert file.stat().st_mtime_ns == before
    # A search that is drawn longer has another winner.
    search("--families", "onerec", "--trials", "4")
    (row,) = search("--families", "onerec", "--trials", "4", "--winners", "4")
    assert row["settings"] == as_text(drawn("onerec", 3))


def test_what_cannot_be_gone_on_with_is_said(search, tmp_path, capsys):
    from benchmarks.quality import search as script

    search("--families", "hstu", "--trials", "2")
    with pytest.raises(AssertionError, match=r"1 of 3 have not run \(search_hstu_02 is one\)"):
        search("--families", "hstu", "--trials", "3", "--winners", "0")
    with pytest.raises(AssertionError, match=r"search_hstu_00\.json is there, measured with another --judged_users"):
        search("--families", "hstu", "--trials", "2", "--judged_users", "100")
    file = tmp_path / "runs" / "search_hstu_01.json"
    file.write_text(file.read_text().replace(str(script.drawn("hstu", 1)["lr"]), "0.5"))
    with pytest.raises(
        AssertionError, match=r"search_hstu_01\.json is there, measured with another lr: give --runs another"
    ):
        search("--families", "hstu", "--trials", "2")
    with pytest.raises(AssertionError, match="measured with another lr"):
        search("--families", "hstu", "--trials", "2", "--winners", "0")
    with pytest.raises(AssertionError, match="2"):
        search("--families", "hstu", "--trials", "2", "--keep", "kept")
    assert "--keep needs --winners" in capsys.readouterr().err


def test_a_quick_search_stays_out_of_a_real_one(search, tmp_path):
    assert len(search("--quick")) == 2
    assert not list((tmp_path / "runs").glob("*.json"))
    assert len(search("--families", "hstu", "--trials", "1")) == 1
    assert (tmp_path / "runs" / "search_hstu_00.json").is_file()


def test_a_space_holds_what_was_tuned_by_hand(benchmarks):
    from benchmarks.quality.experiments import ROWS
    from benchmarks.quality.runs import SEQUENCE_SETTINGS
    from benchmarks.quality.search_spaces import FAMILIES
    from onerec_hf.baselines import SequentialConfig
    from onerec_hf.trainers import SequentialTrainingArguments

    def defaults(architecture: str) -> dict:
        config = SequentialConfig(architecture=architecture).to_dict()
        training = {
            name: given.default for name, given in inspect.signature(SequentialTrainingArguments).parameters.items()
        }
        return {name: {**training, **config}[known_as] for name, known_as in SEQUENCE_SETTINGS.items()}

    for family, name in TUNED_BY_HAND.items():
        about, by_hand = FAMILIES[family], ROWS[name].settings
        if ROWS[name].kind == "onerec":
            recipe = yaml.safe_load((ROOT / "recipes" / about.recipe).read_text())
            by_hand = {"label_smoothing_factor": 0, **recipe, **by_hand}
        else:
            by_hand = {**defaults(by_hand["model"]), **by_hand}
        for setting, ways in about.ways().items():
            holds = any(by_hand.items() >= way.items() for way in ways)
            assert holds != ((family, setting) in NOT_HELD), (family, setting)


def test_draws_differ_and_cover_the_space(benchmarks):
    from benchmarks.quality.search_spaces import FAMILIES, drawn

    for family, about in FAMILIES.items():
        draws = [drawn(family, trial) for trial in range(200)]
        assert len({json.dumps(draw) for draw in draws}) > 190
        for ways in about.ways().values():
            for way in ways:
                assert sum(draw.items() >= way.items() for draw in draws) > 200 / len(ways) / 2


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=7), data=st.data())
@settings(deadline=None)
def test_the_best_of_some_is_the_mean_over_all_draws(benchmarks, values, data):
    from benchmarks.quality.search_table import expected_best

    drawn = data.draw(st.integers(1, len(values)))
    draws = [max(some) for some in itertools.combinations(values, drawn)]
    assert expected_best(values, drawn) == pytest.approx(statistics.mean(draws))


def test_results_are_of_the_declared_draws_and_the_winners_are_theirs(benchmarks):
    from benchmarks.quality.experiments import ROWS
    from benchmarks.quality.search_spaces import FAMILIES, METRIC, WINNERS, drawn, name_of, winner
    from benchmarks.quality.search_table import RESULTS, SEARCH, reached

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
        assert values.index(max(values)) == WINNERS[family]
        in_full = json.loads(json.dumps(ROWS[winner(family)].settings))
        assert has(best, in_full)
        assert len(best["settings"]) == len(in_full)
        assert {row["chosen_on"] for row in (*rows, best)} == {5000}
        assert list(best["seeds"]) == ["0", "1", "2"]


def test_unequal_numbers_of_draws_have_no_table(benchmarks):
    from benchmarks.quality.search_table import RESULTS, SEARCH, table

    search, judged = (json.loads(path.read_text())["rows"] for path in (SEARCH, RESULTS["contest"]))
    assert table(search, judged).count("\n") == 8
    with pytest.raises(ValueError, match="'hstu': 15"):
        table([row for row in search if "search_hstu_15" not in row["name"]], judged)
