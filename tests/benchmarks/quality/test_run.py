"""The quality benchmark's script (benchmarks/quality/run.py): kept rankings, ensembles, checkpoint selection, other protocols, wrong options."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import run
from benchmarks.quality.experiment import load
from benchmarks.quality.results import joined, merged, new_results
from benchmarks.quality.runs import METRICS, ensemble, parsed, with_text

ROOT = Path(__file__).resolve().parents[3]


def run_script(*options, check: bool = True) -> subprocess.CompletedProcess:
    """`python benchmarks/quality/run.py --quick OPTIONS` from the repository root."""
    command = [sys.executable, "benchmarks/quality/run.py", "--quick", *map(str, options)]
    return subprocess.run(command, check=check, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def beauty(data_folder):
    return ["--data_dir", data_folder / "amazon_beauty"]


@pytest.mark.slow
def test_kept_rankings_become_ensembles(tmp_path, beauty):
    rng = np.random.default_rng(0)
    for name in "ab":
        for split in ("validation", "test"):
            for seed in (0, 1):
                np.savez(tmp_path / f"{name}-{seed}-{split}.npz", rows=rng.integers(0, 12101, (300, 20)))
    found = tmp_path / "found.json"
    run_script(*beauty, "--ensemble", tmp_path / "a-1", tmp_path / "b-1", "--label", "both", "--json", found)
    names = [tmp_path / "a-{seed}", tmp_path / "b-{seed}"]
    run_script(*beauty, "--ensemble", *names, "--seeds", "0", "1", "--label", "each", "--json", found)
    results = json.loads(found.read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert results["experiments"]["amazon-beauty/both"]["settings"] == {"ensemble": ["a-1", "b-1"]}
    assert "amazon-beauty/both/recall@10" in rows
    both, each = (rows[f"amazon-beauty/{label}/validation/ndcg@10"] for label in ("both", "each"))
    assert list(each["seeds"]) == ["0", "1"]
    assert each["seeds"]["1"] == both["value"]


def test_an_ensemble_sums_reciprocal_ranks(tmp_path):
    class Benchmark:
        class data:
            item_ids = np.arange(30)

        def examples(self, split):
            return split

        def metrics(self, ranked, examples):
            self.ranked = ranked
            return dict.fromkeys(METRICS, 0.0)

    first, second = np.arange(12)[None], np.array([[20, 3, 21, *range(22, 30), 12]])
    for name, rows in (("a", first), ("b", second)):
        np.savez(tmp_path / f"{name}-test.npz", rows=rows)
    benchmark = Benchmark()
    assert ensemble(benchmark, [str(tmp_path / name) for name in "ab"], ["test"]) == dict.fromkeys(METRICS, 0.0)
    assert benchmark.ranked[0, :4].tolist() == [3, 0, 20, 1]


@pytest.mark.slow
def test_evidence_beside_sequence_models(tmp_path, beauty):
    found = tmp_path / "found.json"
    rows = ["sasrec_text", "sasrec_text_evidence"]
    run_script(*beauty, "--rows", *rows, "--set", "hidden_size=32", "--json", found)
    results = json.loads(found.read_text())
    values = {row["name"].split("/", 1)[1]: row["value"] for row in results["rows"]}
    assert values["sasrec_text_evidence/validation/ndcg@10"] > values["sasrec_text/validation/ndcg@10"]


@pytest.mark.slow
def test_without_selection_users_the_last_weights_are_evaluated(tmp_path, beauty):
    options = ["--rows", "small", "gru4rec", "--split", "validation", "--json", tmp_path / "found.json"]
    run_script(*beauty, *options, "--selection_users", "0")
    names = {row["name"] for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert {"amazon-beauty/small/validation/ndcg@10", "amazon-beauty/gru4rec/validation/ndcg@10"} <= names
    assert not any(name.endswith("/chosen") for name in names)


@pytest.mark.slow
def test_validation_users_select_the_checkpoint(tmp_path, beauty):
    run_script(*beauty, "--rows", "small", "gru4rec", "--split", "validation", "--json", tmp_path / "found.json")
    results = json.loads((tmp_path / "found.json").read_text())
    values = {row["name"]: row["value"] for row in results["rows"]}
    for name in ("small", "gru4rec"):
        assert values[f"amazon-beauty/{name}/chosen"] >= 0
        assert results["experiments"][f"amazon-beauty/{name}"]["selection_users"] == 100


def test_text_is_refused_where_items_have_none():
    for name in ("sasrec_text", "small_text", "tiger"):
        with pytest.raises(ValueError, match=f"experiment {name} needs item texts"):
            with_text(load(name), None)
    for name in ("popularity", "sasrec"):
        assert with_text(load(name), None) == load(name)
    behaviour = replace(load("small"), settings={**load("small").settings, "embedding": "behaviour"})
    assert with_text(behaviour, None) == behaviour


@pytest.mark.slow
def test_texts_are_embedded_where_a_data_set_has_no_embeddings(tmp_path):
    found = tmp_path / "found.json"
    rows = ["--rows", "sasrec_text", "onerec", "small", "--split", "validation", "--selection_users", "0"]
    run_script("--dataset", "movielens", "--json", found, *rows)
    results = json.loads(found.read_text())["experiments"]
    settings = {name.split("/")[1]: how["settings"] for name, how in results.items()}
    assert settings["sasrec_text"]["features"] == "text"
    assert settings["onerec"]["embedding"] == "text+behaviour"
    assert settings["small"]["embedding"] == "aligned+behaviour"


@pytest.mark.slow
def test_kept_generators_are_evaluated_again(tmp_path, beauty):
    found, kept = tmp_path / "found.json", tmp_path / "kept"
    common = [*beauty, "--split", "validation", "--json", found]
    options = ["--recipe", ROOT / "recipes" / "amazon_beauty_items.yaml", *common]
    run_script(*common, "--selection_users", "0", "--rows", "small_ipa", "sasrec", "--keep", kept)
    assert np.load(kept / "sasrec-0-validation.npz")["rows"].shape == (300, 40)
    run_script(*options, "--evaluate", kept / "small_ipa-0", "--label", "again")
    run_script(*options, "--evaluate", kept / "small_ipa-0", "--align", "--set", "dpo_ratio=0.5", "--label", "aligned")
    results = json.loads(found.read_text())
    assert results["experiments"]["amazon-beauty/aligned"]["settings"]["alignment"]["dpo_ratio"] == 0.5
    values = {row["name"].split("/", 1)[1]: row["value"] for row in results["rows"]}
    assert {"small_ipa/validation/ndcg@10", "sasrec/validation/ndcg@10", "aligned/align_seconds"} <= set(values)
    for metric in METRICS:
        expected = pytest.approx(values[f"small_ipa/validation/{metric}"], abs=1e-9)
        assert values[f"again/validation/{metric}"] == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--evaluate", "a"], "need --label"),
        (["--ensemble", "a"], "need --label"),
        (["--align"], "--align needs --evaluate"),
        (["--label", "x", "--rows", "small", "sasrec"], "--label names one row"),
        (["--ensemble", "a", "b", "--label", "x", "--seeds", "0", "1"], "pass one seed"),
        (["--evaluate", "a", "b", "--label", "x"], "2 folders and --seeds 1"),
        (["--evaluate", "a", "--label", "x", "--set", "hidden_size=8"], "hidden_size=8"),
    ],
)
def test_contradicting_options_are_refused_at_once(monkeypatch, wrong, message):
    monkeypatch.setattr(sys, "argv", ["run.py", *wrong])
    with pytest.raises(ValueError, match=message):
        run.main()


@pytest.mark.parametrize(
    ("argv", "recipe"),
    [
        ([], "amazon_beauty_items"),
        (["--dataset", "kuairand-pure"], "kuairand"),
        (["--dataset", "kuairand-pure", "--recipe", "recipes/kuairand_items.yaml"], "kuairand_items"),
        (["--dataset", "movielens"], "movielens"),
        (["--dataset", "amazon-sports"], "amazon_beauty_items"),
    ],
    ids=str,
)
def test_recipes_go_with_any_data(monkeypatch, argv, recipe):
    monkeypatch.setattr(sys, "argv", ["run.py", "--data_dir", "files", *argv])
    options = run.arguments()
    _, config, of_recipe, dataset, *folder = run.recipe_config(options, load("onerec"))
    assert (Path(config).stem, of_recipe, dataset, folder) == (
        recipe,
        "--dataset",
        options.dataset,
        ["--data_dir", "files"],
    )


def test_data_options_over_the_recipe_s(monkeypatch):
    given = ["--dataset", "movielens", "--data", "ties=shuffle", "max_history=50", "session_length=1"]
    monkeypatch.setattr(sys, "argv", ["run.py", *given])
    data_args, *_ = parsed(list(run.recipe_config(run.arguments(), load("sasrec"))), {})
    assert (data_args.dataset, data_args.ties) == ("movielens", "shuffle")
    assert (data_args.max_history, data_args.session_length) == (50, 1)


@pytest.mark.slow
def test_rows_of_another_protocol_are_not_lost(tmp_path, beauty):
    found, content = (
        tmp_path / "found.json",
        {"protocol": {"amazon-beauty": "another"}, "experiments": {}, "rows": [{"name": "a"}]},
    )
    found.write_text(json.dumps(content))
    done = run_script(*beauty, "--rows", "popularity", "--json", found, check=False)
    assert done.returncode
    assert f"{found} holds rows of another protocol" in done.stderr
    assert json.loads(found.read_text()) == content


def test_files_are_merged_by_row_and_joined_by_seed(tmp_path):
    def results(name: str, values: dict[int, float], protocol: str = "p", **how):
        return new_results("d", protocol, name, list(values), [{"ndcg@10": value} for value in values.values()], how)

    files = [tmp_path / f"{number}.json" for number in range(3)]
    for path, content in zip(
        files, (results("a", {1: 0.2}), results("a", {0: 0.1}), results("b", {0: 0.3})), strict=True
    ):
        path.write_text(json.dumps(content))
    rows = {row["name"]: row for row in joined([str(path) for path in files])["rows"]}
    assert rows["d/a/ndcg@10"]["seeds"] == {"0": 0.1, "1": 0.2}
    assert rows["d/a/ndcg@10"]["spread"] == [0.1, 0.2]
    assert rows["d/b/ndcg@10"]["value"] == 0.3
    again = merged(files[0], results("a", {2: 0.5}))
    assert [row["seeds"] for row in again["rows"]] == [{"2": 0.5}]
    files[2].write_text(json.dumps(results("a", {2: 0.5}, lr=1)))
    with pytest.raises(ValueError, match="d/a measured with other settings"):
        joined([str(path) for path in files])
    with pytest.raises(ValueError, match="another protocol for d"):
        merged(files[0], results("a", {2: 0.5}, protocol="q"))
