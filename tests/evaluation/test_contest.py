"""The contest's script (benchmarks/quality/run.py): rankings that were kept are fused, nobody need be asked, rows of another protocol are not lost."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_kept_rankings_are_fused(tmp_path, data_folder):
    rng = np.random.default_rng(0)
    for name in "ab":
        for split in ("validation", "test"):
            for seed in (0, 1):
                np.savez(tmp_path / f"{name}-{seed}-{split}.npz", rows=rng.integers(0, 12101, (300, 20)))
    command = [ROOT / "benchmarks" / "quality.py", "--quick", "--data_dir", data_folder / "amazon_beauty"]
    found = tmp_path / "found.json"
    one = ["--fuse", tmp_path / "a-1", tmp_path / "b-1", "--label", "both", "--json", found]
    of_each_seed = [
        "--fuse",
        tmp_path / "a-{seed}",
        tmp_path / "b-{seed}",
        "--seeds",
        "0",
        "1",
        "--label",
        "each",
        "--json",
        found,
    ]
    for fuse in (one, of_each_seed):
        subprocess.run([sys.executable, *command, *fuse], check=True, capture_output=True)
    rows = {row["name"]: row for row in json.loads(found.read_text())["rows"]}
    assert rows["amazon-beauty/both/test/recall@10"]["settings"] == {"fused": ["a-1", "b-1"]}
    both, each = (rows[f"amazon-beauty/{label}/validation/ndcg@10"] for label in ("both", "each"))
    assert list(each["seeds"]) == ["0", "1"]
    assert each["seeds"]["1"] == both["value"]


def test_rescoring_orders_the_items_of_the_first_ranking_alone(benchmarks, tmp_path):
    from benchmarks.quality.runs import METRICS, fused

    class Contest:
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
    files, contest = [str(tmp_path / name) for name in "ab"], Contest()
    fused(contest, files, ["test"])
    assert contest.ranked[0, :4].tolist() == [3, 0, 20, 1]
    fused(contest, files, ["test"], rescored=True)
    assert contest.ranked[0].tolist() == [3, 0, 1, 2, *range(4, 10)]


@pytest.mark.slow
def test_rows_need_nobody_to_be_asked_when_to_stop(tmp_path, data_folder):
    command = [ROOT / "benchmarks" / "quality.py", "--quick", "--data_dir", data_folder / "amazon_beauty"]
    rows = ["--recipe", ROOT / "recipes" / "amazon_beauty_items.yaml", "--rows", "codes", "gru4rec"]
    nobody = ["--split", "validation", "--judged_users", "0", "--json", tmp_path / "found.json"]
    subprocess.run([sys.executable, *command, *rows, *nobody], check=True, capture_output=True)
    names = {row["name"] for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert {"amazon-beauty/codes/validation/ndcg@10", "amazon-beauty/gru4rec/validation/ndcg@10"} <= names
    assert not any(name.endswith("/chosen") for name in names)


def test_rows_of_texts_are_refused_where_items_have_none(benchmarks):
    from benchmarks.quality.experiments import ROWS, Row
    from benchmarks.quality.runs import for_items

    for name in ("sasrec_ce_text", "codes_text", "tiger"):
        with pytest.raises(ValueError, match=f"the row {name} takes items' texts"):
            for_items(name, ROWS[name], None)
    for name in ("popularity", "sasrec_ce"):
        assert for_items(name, ROWS[name], None) == ROWS[name]
    behaviour = Row(ROWS["codes"].kind, "", {**ROWS["codes"].settings, "embedding": "behaviour"})
    assert for_items("codes", behaviour, None) == behaviour


@pytest.mark.slow
def test_rows_take_texts_where_a_data_set_has_no_embeddings(tmp_path):
    command = [
        ROOT / "benchmarks" / "quality.py",
        "--quick",
        "--dataset",
        "movielens",
        "--json",
        tmp_path / "found.json",
    ]
    rows = [
        "--rows",
        "sasrec_ce_text",
        "onerec_items_smoothed",
        "codes",
        "--split",
        "validation",
        "--judged_users",
        "0",
    ]
    subprocess.run([sys.executable, *command, *rows], check=True, capture_output=True)
    settings = {
        row["name"].split("/")[1]: row["settings"] for row in json.loads((tmp_path / "found.json").read_text())["rows"]
    }
    assert settings["sasrec_ce_text"]["features"] == "text"
    assert settings["onerec_items_smoothed"]["embedding"] == "text+behaviour"
    assert settings["codes"]["embedding"] == "aligned+behaviour"


@pytest.mark.slow
def test_kept_generators_are_judged_again(tmp_path, data_folder):
    command = [ROOT / "benchmarks" / "quality.py", "--quick", "--data_dir", data_folder / "amazon_beauty"]
    common = [
        "--recipe",
        ROOT / "recipes" / "amazon_beauty_items.yaml",
        "--split",
        "validation",
        "--judged_users",
        "0",
    ]
    found, kept = tmp_path / "found.json", tmp_path / "kept"
    rows = ["--rows", "codes_ipa", "codes_averaged", "sasrec_ce", "--keep", kept, "--json", found]
    subprocess.run([sys.executable, *command, *common, *rows], check=True, capture_output=True)
    assert np.load(kept / "sasrec_ce-0-validation.npz")["rows"].shape == (300, 40)
    again = ["--judge", kept / "codes_ipa-0", "--label", "again", "--json", found]
    subprocess.run([sys.executable, *command, *common, *again], check=True, capture_output=True)
    aligned = [
        "--judge",
        kept / "codes_ipa-0",
        "--align",
        "--set",
        "dpo_ratio=0.5",
        "--label",
        "aligned",
        "--json",
        found,
    ]
    subprocess.run([sys.executable, *command, *common, *aligned], check=True, capture_output=True)
    rows = json.loads(found.read_text())["rows"]
    assert next(row for row in rows if "aligned/" in row["name"])["settings"]["alignment"]["dpo_ratio"] == 0.5
    values = {row["name"].split("/", 1)[1]: row["value"] for row in rows}
    assert {"codes_averaged/validation/ndcg@10", "sasrec_ce/validation/ndcg@10"} <= set(values)
    for metric in ("recall@10", "ndcg@10"):
        assert values[f"again/validation/{metric}"] == pytest.approx(
            values[f"codes_ipa/validation/{metric}"], abs=1e-9
        )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--judge", "a"], "need --label"),
        (["--fuse", "a"], "need --label"),
        (["--align"], "--align needs --judge"),
        (["--rescore"], "--rescore needs --fuse"),
        (["--fuse", "a", "--rescore", "--label", "x"], "two of its files"),
        (["--fuse", "a", "b", "--label", "x", "--seeds", "0", "1"], "give one seed"),
        (["--judge", "a", "b", "--label", "x"], "2 folders and --seeds 1"),
        (["--judge", "a", "--label", "x", "--set", "hidden_size=8"], "hidden_size=8"),
        (["--rows", "popularity", "codes_averaged"], "--judged_users 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_once(benchmarks, monkeypatch, wrong, said):
    monkeypatch.setattr(sys, "argv", ["quality.py", *wrong])
    from benchmarks.quality import run as quality

    with pytest.raises(ValueError, match=said):
        quality._check(quality.arguments())


def test_a_recipe_of_another_data_set_is_refused(benchmarks, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quality.py", "--recipe", str(ROOT / "recipes" / "kuairand_items.yaml")])
    from benchmarks.quality import run as quality

    with pytest.raises(ValueError, match="give --dataset kuairand-pure, not amazon-beauty"):
        quality.main()


def test_weights_are_averaged_over_steps(benchmarks):
    import torch

    from benchmarks.quality.budget_trainer import AverageWeights

    model = torch.nn.Linear(1, 1, bias=False)
    callback, expected = AverageWeights(model, 0.5), None
    for value in (1.0, 2.0, 4.0):
        torch.nn.init.constant_(model.weight, value)
        callback.on_step_end(None, None, None)
        expected = value if expected is None else 0.5 * expected + 0.5 * value
    callback.on_train_end(None, None, None)
    assert model.weight.item() == pytest.approx(expected)


@pytest.mark.slow
def test_rows_of_another_protocol_are_not_lost(tmp_path, data_folder):
    found = tmp_path / "found.json"
    found.write_text(json.dumps({"split": "test", "protocol": "another", "rows": [{"name": "a"}]}))
    command = [ROOT / "benchmarks" / "quality.py", "--quick", "--data_dir", data_folder / "amazon_beauty"]
    run = subprocess.run(
        [sys.executable, *command, "--rows", "popularity", "--json", found], capture_output=True, text=True
    )
    assert run.returncode
    assert f"{found} holds rows of another protocol" in run.stderr
    assert json.loads(found.read_text())["rows"] == [{"name": "a"}]
