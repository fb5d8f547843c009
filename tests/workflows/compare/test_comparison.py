"""A comparison from tables to artefacts, its report, resuming, and what is refused."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from onerec_hf.evaluation.metrics import ndcg_at_k
from onerec_hf.modeling.requests import Request
from onerec_hf.workflows import DataSettings, evaluate, load_in_memory
from onerec_hf.workflows.artefact import recommender_of
from onerec_hf.workflows.compare import compare_models
from onerec_hf.workflows.compare.bench import Bench
from onerec_hf.workflows.compare.families import Family
from onerec_hf.workflows.compare.ranking import targets
from onerec_hf.workflows.compare.settings import CompareSettings
from tests.cli.commands import onerec, refused, succeeded
from tests.rounding import close
from tests.workflows.compare.conftest import write_table


def files(folder: Path) -> dict[str, int]:
    """The runs' files and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "runs").glob("*.json")}


def test_every_family_has_the_same_number_of_trials(compared):
    names = sorted(files(compared.found.folder))
    trials = [name for name in names if "-trial-" in name]
    wanted = [f"{family}-trial-0{number}.json" for family in ("broken", "item_knn", "sasrec") for number in (0, 1)]
    assert trials == sorted([*wanted, "popularity-trial-00.json"])
    winners = {name.split("-best-")[0] for name in names if "-best-" in name}
    assert winners == {"item_knn", "popularity", "sasrec"}


def test_the_best_on_validation_is_chosen_and_the_trial_with_it(compared):
    metrics = compared.found.metrics
    families = ("popularity", "item_knn", "sasrec")
    assert compared.found.best == max(families, key=lambda name: metrics[f"{name}/validation/ndcg@10"])
    runs = compared.found.folder / "runs"
    for name in ("item_knn", "sasrec"):
        trials = [json.loads((runs / f"{name}-trial-0{number}.json").read_text()) for number in (0, 1)]
        best = max(trials, key=lambda trial: trial["metrics"]["validation/ndcg@10"])
        (winner,) = runs.glob(f"{name}-best-*-seed-00.json")
        assert json.loads(winner.read_text())["spec"]["settings"] == best["spec"]["settings"]


@pytest.mark.parametrize("name", ["popularity", "item_knn", "sasrec"])
def test_artefacts_answer_and_evaluate_as_the_report_says(compared, name):
    (folder,) = (compared.found.folder / "models").glob(f"{name}-*")
    data = load_in_memory(compared.data)
    answers = recommender_of(folder).recommend([Request(history) for history in data.test["history"]])
    ranked = np.array([np.searchsorted(data.item_ids, [item for (item,) in answer.sessions]) for answer in answers])
    first_seed = ndcg_at_k(ranked, targets(data.test, data), 10)
    (row,) = (row for row in compared.found.rows if row["name"] == f"{name}/ndcg@10")
    assert row["spread"][0] <= first_seed * (1 + 1e-9)
    assert first_seed <= row["spread"][1] * (1 + 1e-9)
    assert evaluate(compared.data, model=str(folder)).metrics[f"{name}/ndcg@10"] == close(first_seed)


def test_the_baseline_is_what_evaluate_ranks_beside_a_model(compared):
    (folder,) = (compared.found.folder / "models").glob("sasrec-*")
    beside = evaluate(compared.data, model=str(folder)).metrics
    for metric in ("recall@10", "ndcg@10"):
        assert compared.found.metrics[f"popularity/{metric}"] == close(beside[f"popularity/{metric}"])


class Page(HTMLParser):
    """What a page refers to, and its tables' rows."""

    def __init__(self, text):
        super().__init__()
        self.refers, self.rows, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.refers += [value for name, value in attrs if name in ("src", "href", "data", "srcset")]
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "td":
            self.rows[-1][-1] += data.strip()


def test_the_report_stands_alone_and_has_every_family(compared):
    text = (compared.found.folder / "report.html").read_text()
    page = Page(text)
    assert not page.refers
    assert "script" not in page.tags
    assert "url(" not in text
    assert text.count("<svg") >= 6
    first = {row[0]: row for row in page.rows if row and len(row) == 6}
    assert set(first) == {"Popularity", "Item-kNN", "SASRec", "Broken", "Texts"}
    assert "architecture must be one of sasrec" in first["Broken"][-1]
    assert first["Broken"][1] == "2 (2 failed)"
    assert "neither item texts nor embeddings" in first["Texts"][-1]
    metrics = compared.found.metrics
    best = next(row for row in first.values() if row[-1] == "best")
    assert f"{metrics[f'{compared.found.best}/recall@10']:.4f}"[1:] in best[3]


def test_the_markdown_has_the_same_tables(compared):
    folder = compared.found.folder
    rows = [row for row in Page((folder / "report.html").read_text()).rows if row]
    lines = (folder / "report.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    assert [row for row in cells if row in rows] == [row for row in cells if "users)" not in row[-1] and row in rows]
    assert len([row for row in rows if row in cells]) == len(rows)


def test_differences_are_paired(compared):
    data, runs = load_in_memory(compared.data), compared.found.folder / "runs"

    def users(name):
        rankings = [np.load(path)["rows"] for path in sorted(runs.glob(f"{name}-best-*.npz"))]
        return np.mean([ndcg_at_k(one, targets(data.test, data), 10, per_row=True) for one in rankings], axis=0)

    best = compared.found.best
    for name in {"popularity", "item_knn", "sasrec"} - {best}:
        more = users(name) - users(best)
        (row,) = (row for row in compared.found.rows if row["name"] == f"{name}/ndcg@10_difference")
        assert row["value"] == close(more.mean())
        assert row["spread"][1] - row["value"] == close(more.std(ddof=1) / len(more) ** 0.5)


def test_a_comparison_that_lost_runs_repeats_these_alone(compared, tmp_path):
    out = tmp_path / "out"
    before = files(compared.found.folder)
    lost = (
        "sasrec-trial-01.json",
        next(name for name in before if name.startswith("item_knn-best") and "seed-01" in name),
    )
    state = json.loads((compared.found.folder / "comparison.json").read_text())
    shutil.copytree(compared.found.folder, out)
    kept = {}
    for path in (out / "runs").glob("*.json"):  # the runs name their folder
        path.write_text(path.read_text().replace(str(compared.found.folder), str(out)))
        kept[path.name] = (json.loads(path.read_text()), path.stat().st_mtime_ns)
    for name in lost:
        (out / "runs" / name).unlink()
    again = compare_models(compared.data, **{**compared.options, "output_dir": str(out)})
    for name, (content, time) in kept.items():
        path = out / "runs" / name
        if name not in lost:
            assert path.stat().st_mtime_ns == time, name
        assert json.loads(path.read_text())["spec"] == content["spec"], name  # the same parameters were drawn again
        assert json.loads(path.read_text()).get("metrics") == content.get("metrics"), name
    assert again.best == compared.found.best
    assert json.loads((out / "comparison.json").read_text()) == state


def test_a_folder_of_an_earlier_version_is_that_of_the_same_call(tmp_path):
    """It has no `features`, and names the default feedback."""
    data = DataSettings(interactions=str(write_table(tmp_path, users=30)))
    bench = Bench(data, load_in_memory(data), CompareSettings(output_dir=str(tmp_path / "out")), 0.0)
    family = Family("popularity", "Popularity", "ranking")
    bench.open_folder([family])
    run = bench.trial(family, 0, {})
    run.path.write_text(json.dumps({"spec": run.spec, "state": "finished"}))
    for path in (bench.folder / "comparison.json", run.path):
        content = json.loads(path.read_text())
        of_data = (content if "data" in content else content["spec"])["data"]
        of_data["history_feedback"] = "positive"
        del of_data["features"]
        path.write_text(json.dumps(content))
    bench.open_folder([family])
    assert run.found()["state"] == "finished"
    other = Bench(replace(data, history_feedback="all"), bench.dataset, bench.how, 0.0)
    with pytest.raises(ValueError, match="another data"):
        other.open_folder([family])
    with pytest.raises(ValueError, match="another data"):
        other.trial(family, 0, {}).found()


def test_another_comparison_in_the_folder_is_refused(compared, spaces, tmp_path):
    other = tmp_path / "spaces"
    shutil.copytree(spaces, other)
    (other / "item_knn.yaml").write_text((spaces / "item_knn.yaml").read_text().replace("[1, null]", "[1, 2]"))
    with pytest.raises(ValueError, match="another space of item_knn"):
        compare_models(compared.data, **{**compared.options, "spaces": str(other)})
    with pytest.raises(ValueError, match="another seed"):
        compare_models(compared.data, **compared.options, seed=5)
    data = replace(compared.data, interactions=str(write_table(tmp_path, users=30)))
    with pytest.raises(ValueError, match="another data, fingerprint"):
        compare_models(data, **compared.options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no comparison"):
        compare_models(compared.data, **{**compared.options, "output_dir": str(tmp_path / "full")})
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": ["sasrec", "bert4rec"]}, "--families bert4rec: unknown family. Choose from broken, item_knn"),
        ({"families": ["texts"]}, "--families texts needs item texts or embeddings"),
        ({"trials": 0}, "--trials must be at least 1"),
        ({"budget": "soon"}, "--budget: budget 'soon' is not a time: write 2h"),
        ({"budget": "2h-cpu"}, "--budget 2h-cpu: a comparison takes wall time"),
        ({"seeds": [1, 1]}, "--seeds 1 1: pass different numbers"),
        ({"spaces": "nowhere"}, "--spaces nowhere: there is no such folder"),
    ],
)
def test_wrong_options(compared, tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compare_models(compared.data, **{**compared.options, "output_dir": str(tmp_path / "out"), **options})


def test_few_users(compared, tmp_path):
    data = DataSettings(interactions=str(write_table(tmp_path, users=1)), min_item_interactions=1)
    with pytest.raises(ValueError, match="leaves one test user"):
        compare_models(data, **{**compared.options, "output_dir": str(tmp_path / "out")})


def test_a_data_set_in_memory_is_refused(compared):
    with pytest.raises(TypeError, match="pass DataSettings with paths"):
        compare_models(load_in_memory(compared.data), **compared.options)


@pytest.mark.parametrize("name", ["popularity", "item_knn", "sasrec"])
def test_the_server_answers_with_any_family(compared, name, tmp_path):
    from onerec_hf.modeling.requests import RequestError
    from onerec_hf.serving import ServedModel, ServingSettings
    from onerec_hf.serving.schema import Query

    (folder,) = (compared.found.folder / "models").glob(f"{name}-*")
    moving = tmp_path / "model"
    shutil.copytree(folder, moving)
    served = ServedModel.load(str(moving), load_recommender=recommender_of)
    query = Query(history=["i1", "i2", "unknown"], allow=["i2", "i3", "i4"], top_k=5)
    key, row = served.prepare(query, "history", ServingSettings(), unknown="skip")
    (answer,) = served.answer(key, [row])
    assert sorted(answer["items"]) == ["i3", "i4"]
    assert answer["scores"] == sorted(answer["scores"], reverse=True)
    assert answer["unknown_items"] == 1
    with pytest.raises(RequestError, match="ranks single items"):
        served.prepare(Query(history=["i1"], session_length=3), "history", ServingSettings(), unknown="skip")
    assert ServedModel.load(str(moving), unless=served.version, load_recommender=recommender_of) is None
    with pytest.raises(ValueError, match="not a OneRec generator"):
        ServedModel.load(str(moving))


def test_the_command_line_recommends_with_any_family(compared):
    history = '{"user_id": 7, "history": ["i1", "i2"]}'
    for folder in (compared.found.folder / "models").iterdir():
        (answer,) = recommender_of(folder).recommend([Request(["i1", "i2"], top_k=3)])
        done = succeeded(onerec("recommend", "--model", folder, "--top_k", 3, stdin=history))
        assert json.loads(done.out)["items"] == [item for (item,) in answer.sessions]
        assert json.loads(done.out)["user_id"] == 7
        refused(onerec("recommend", "--model", folder, "--session_length", 2, stdin=history), "line 1", "single items")


def test_the_command_resumes_a_comparison(compared):
    options = ["--interactions", compared.data.interactions, "--output_dir", compared.found.folder, "--trials", 2]
    options += ["--max_history", 50, "--ties", "file"]  # of the settings that were given as a whole
    done = onerec("compare", *options, "--seeds", 0, 1, "--spaces", compared.options["spaces"])
    assert f"best on validation: {compared.found.best}" in succeeded(done).err
    lines = [line.split() for line in done.out.splitlines()[1:]]
    assert {line[0]: line[2] for line in lines} == {
        name: f"{compared.found.metrics[f'{name}/ndcg@10']:.4f}" for name in ("popularity", "item_knn", "sasrec")
    }
    assert "best on validation" not in refused(onerec("compare", *options, "--families", "bert"), "unknown family")


@pytest.mark.parametrize("holdout", ["last", "temporal"])
def test_users_without_candidates_are_named_and_left_out_and_all_targets_count(tmp_path, spaces, capsys, holdout):
    """As `evaluate` does with the same artefact."""
    path = write_table(tmp_path, users=30, items=12)
    late = {"last": [12, 13, 14], "temporal": [8, 9, 9]}[holdout]  # the whale has everything before its held-out items
    times = [*([0] * 12), *late]
    with open(path, "a", newline="") as file:
        file.writelines(f"whale,i{item % 12},{time}\n" for item, time in enumerate(times))
    data = DataSettings(interactions=str(path), min_item_interactions=1, holdout=holdout)
    options = {"trials": 1, "seeds": [0], "families": ["popularity"], "spaces": str(spaces)}
    found = compare_models(data, output_dir=str(tmp_path / "out"), exclude_seen=True, **options)
    report = (found.folder / "report.md").read_text(encoding="utf-8")
    note = "Test: 1 of 31 users cannot be ranked, since their histories hold every item ('whale'): they are left out of the metrics."
    assert note in capsys.readouterr().err
    assert note in report
    evaluated = evaluate(data, model=str(found.model), exclude_seen=True).metrics
    assert evaluated["unranked_users"] == 1
    for metric in ("popularity/recall@10", "popularity/ndcg@10"):
        assert found.metrics[metric] == close(evaluated[metric])
