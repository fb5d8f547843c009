"""The random search (benchmarks/quality/search.py): trials, resuming, winners and wrong options."""

import itertools
import json
import sys

import pytest

from benchmarks.quality import search as script
from benchmarks.quality.experiment import load
from benchmarks.quality.search import searched

# Replaces benchmarks/quality/run.py: writes what it was told to, fails at the trial that FAILS names, joins. Trial 1 is the best of 0, 1 and 2; 3 is better.
RUN = """
import json, os, sys
import yaml
options = sys.argv[1:]
at = lambda name: options[options.index(name) + 1]
if "--join" not in options:
    label = at("--label")
    if label == os.environ.get("FAILS"):
        raise SystemExit("out of memory")
    row = {
        "name": f"amazon-beauty/{label}/validation/ndcg@10",
        "value": {"0": 1, "1": 3, "2": 2, "3": 4}.get(label[-1], 0),
        "options": options,
    }
    settings = dict(setting.split("=") for setting in options[options.index("--set") + 1 :])
    settings = {name: yaml.safe_load(value) for name, value in settings.items()}
    how = {"settings": settings, "selection_users": int(at("--selection_users"))}
    json.dump({"experiments": {f"amazon-beauty/{label}": how}, "rows": [row]}, open(at("--json"), "w"))
    if "--keep" in options:
        open(f"{at('--keep')}/{label}-{at('--seeds')}-test.npz", "w").close()
else:
    files = [json.load(open(file)) for file in options[options.index("--join") + 1 : options.index("--json")]]
    found = [{**file["rows"][0], **next(iter(file["experiments"].values()))} for file in files]
    json.dump(found, open(at("--json"), "w"))
"""


@pytest.fixture
def search(monkeypatch, tmp_path):
    """`search(*options)` runs the search with [`RUN`] and returns the rows that it joined."""
    (tmp_path / "run.py").write_text(RUN)
    monkeypatch.setattr(script, "RUN", tmp_path / "run.py")

    def run(*options):
        found = tmp_path / "found.json"
        argv = ["search.py", "--runs", str(tmp_path / "runs"), "--json", str(found), *options]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert ended.value.code == 0, ended.value
        return json.loads(found.read_text())

    return run


def trial(experiment: str, number: int) -> dict:
    return load(experiment).search.trial(number)


def test_an_interrupted_search_resumes(search, monkeypatch, tmp_path):
    few = ["--experiments", "hstu", "sasrec", "--trials", "3", "--jobs", "2"]
    monkeypatch.setenv("FAILS", "hstu_trial_01")
    with pytest.raises(AssertionError, match=r"1 of 6 runs failed.*hstu_trial_01\.log"):
        search(*few)
    assert "out of memory" in (tmp_path / "runs" / "hstu_trial_01.log").read_text()
    before = (tmp_path / "runs" / "sasrec_trial_02.json").stat().st_mtime_ns
    monkeypatch.delenv("FAILS")
    rows = search(*few)
    assert [row["name"].split("/")[1] for row in rows] == [f"{name}_trial_0{n}" for name in few[1:3] for n in range(3)]
    assert (tmp_path / "runs" / "sasrec_trial_02.json").stat().st_mtime_ns == before
    for row in rows:
        name, _, number = row["name"].split("/")[1].rpartition("_trial_")
        assert row["settings"] == trial(name, int(number))
        assert row["options"][row["options"].index("--split") + 1] == "validation"


def test_the_best_trial_is_evaluated_on_test(search, tmp_path):
    few, kept = ["--experiments", "gru4rec", "onerec_search"], tmp_path / "kept"
    kept.mkdir()
    search(*few, "--trials", "3")
    rows = search(*few, "--trials", "3", "--winners", "4", "5")
    names = ["gru4rec"] * 2 + ["onerec_search"] * 2
    assert [row["name"].split("/")[1] for row in rows] == names
    for row, name, seed in zip(rows, names, "4545", strict=True):
        options = dict(itertools.pairwise(row["options"]))
        assert (options["--split"], options["--seeds"]) == ("test", seed)
        assert row["settings"] == trial(name, 1)
    # Kept if --keep comes later, and only once.
    few = ["--experiments", "onerec_search"]
    search(*few, "--trials", "3", "--winners", "4", "--keep", str(kept))
    assert (kept / "onerec_search-4-test.npz").is_file()
    file = tmp_path / "runs" / "onerec_search_01-4.json"
    before = file.stat().st_mtime_ns
    search(*few, "--trials", "3", "--winners", "4", "--keep", str(kept))
    assert file.stat().st_mtime_ns == before
    # With more trials another one wins.
    search(*few, "--trials", "4")
    (row,) = search(*few, "--trials", "4", "--winners", "4")
    assert row["settings"] == trial("onerec_search", 3)


def test_other_settings_in_the_same_folder_are_refused(search, tmp_path, capsys):
    search("--experiments", "hstu", "--trials", "2")
    with pytest.raises(AssertionError, match=r"1 of 3 have not run \(such as hstu_trial_02\)"):
        search("--experiments", "hstu", "--trials", "3", "--winners", "0")
    with pytest.raises(AssertionError, match=r"hstu_trial_00\.json was measured with another --selection_users"):
        search("--experiments", "hstu", "--trials", "2", "--selection_users", "100")
    file = tmp_path / "runs" / "hstu_trial_01.json"
    content = json.loads(file.read_text())
    name = next(iter(trial("hstu", 1)))
    content["experiments"]["amazon-beauty/hstu_trial_01"]["settings"][name] = 0.5
    file.write_text(json.dumps(content))
    with pytest.raises(AssertionError, match=rf"hstu_trial_01\.json was measured with another {name}\. Pass another"):
        search("--experiments", "hstu", "--trials", "2")
    with pytest.raises(AssertionError, match=f"measured with another {name}"):
        search("--experiments", "hstu", "--trials", "2", "--winners", "0")
    with pytest.raises(AssertionError, match="2"):
        search("--experiments", "hstu", "--trials", "2", "--keep", "kept")
    assert "--keep needs --winners" in capsys.readouterr().err


def test_a_quick_search_has_a_separate_folder(search, tmp_path):
    assert len(search("--quick")) == 2
    assert not list((tmp_path / "runs").glob("*.json"))
    assert len(search("--experiments", "hstu", "--trials", "1")) == 1
    assert (tmp_path / "runs" / "hstu_trial_00.json").is_file()


@pytest.mark.parametrize(("name", "by_hand"), [("onerec_search", "onerec"), ("sasrec", "sasrec_by_hand")])
def test_a_space_holds_what_was_tuned_by_hand(name, by_hand):
    settings = {"weight_decay": 0.01, "lr_scheduler_type": "constant", **load(by_hand).settings}  # SASRec's defaults
    missing = [
        setting
        for setting, values in load(name).search.space.items()
        if not any(settings.items() >= value.items() for value in values)
    ]
    of_recipe = {"learning_rate", "width", "encoder_layers", "weight_decay"}
    assert set(missing) <= (of_recipe if name == "onerec_search" else set())


@pytest.mark.parametrize("name", searched())
def test_trials_differ_and_cover_the_space(name):
    found = load(name).search
    trials = [found.trial(number) for number in range(200)]
    assert len({json.dumps(one) for one in trials}) > 190
    for values in found.space.values():
        for value in values:
            assert sum(one.items() >= value.items() for one in trials) > 200 / len(values) / 2
