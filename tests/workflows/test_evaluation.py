"""A saved sequence model is evaluated like a generator, by the command too."""

import json

import numpy as np
import pytest
import torch

from onerec_hf.baselines import SequentialRecommender
from onerec_hf.evaluation import ranking_metrics
from onerec_hf.workflows import evaluate, load_dataset, ranking_table
from tests.cli.commands import NUM_ITEMS, onerec, refused, succeeded


@pytest.fixture(scope="module")
def sequential(tmp_path_factory):
    """The folder of an untrained GRU4Rec that knows the items, and the model."""
    torch.manual_seed(0)
    items = [f"m{i}" for i in range(NUM_ITEMS)]
    model = SequentialRecommender.from_items(items, architecture="gru4rec", hidden_size=8, initializer_range=0.5)
    folder = tmp_path_factory.mktemp("sequential") / "gru"
    model.save_pretrained(folder)
    return folder, model.eval()


def test_a_sequence_model_is_ranked_beside_the_baselines(sequential, tables, files, tmp_path):
    folder, model = sequential
    dataset = load_dataset(**tables)
    found = evaluate(dataset, model=str(folder), top_k=[3, 10]).metrics
    assert found.keys() >= {"gru4rec/recall@3", "gru4rec/coverage@10", "popularity/ndcg@3", "item_knn/mrr@10"}
    items, test = model.items, dataset.test
    ranked = model.rank([items.indices(history) for history in test["history"]], 10)
    wanted = np.array([items.indices(session) for session in test["session"]])
    for name, value in ranking_metrics(ranked, wanted, (3, 10), NUM_ITEMS).items():
        assert found[f"gru4rec/{name}"] == pytest.approx(value)
    json_file = tmp_path / "rows.json"
    options = ["--interactions", files["interactions"], "--top_k", 3, 10, "--json", json_file]
    done = succeeded(onerec("evaluate", "--model", folder, *options))
    rows = json.loads(json_file.read_text())["rows"]
    assert {row["name"]: row["value"] for row in rows} == pytest.approx(found)
    assert [line.split()[0] for line in done.out.splitlines()] == ["recall@3", "popularity", "item_knn", "gru4rec"]
    assert done.out.rstrip("\n") == ranking_table(rows)
    alone = succeeded(onerec("evaluate", "--model", folder, *options, "--no_baselines"))
    assert [line.split()[0] for line in alone.out.splitlines()] == ["recall@3", "gru4rec"]


def test_its_items_must_be_those_of_the_data(sequential, tables, tmp_path):
    known = [f"m{i}" for i in range(30)]
    SequentialRecommender.from_items(known, hidden_size=8).save_pretrained(tmp_path / "few")
    with pytest.raises(ValueError, match="10 of 40 items of the data are not in its catalogue of 30 items"):
        evaluate(load_dataset(**tables), model=str(tmp_path / "few"))


def test_a_damaged_one(sequential, files, tmp_path):
    SequentialRecommender.from_items(["m1", "m2"], hidden_size=8).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    done = onerec("evaluate", "--model", tmp_path / "cut", "--interactions", files["interactions"])
    refused(done, f"--model {tmp_path / 'cut'}")
