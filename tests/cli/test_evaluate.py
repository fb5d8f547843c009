"""`onerec-hf evaluate`: the numbers that training gave, for a saved model."""

import json

import numpy as np
import pytest
import torch

from onerec_hf import ItemCatalogue
from onerec_hf.baselines import SequentialRecommender
from tests.cli.commands import NUM_ITEMS, interaction_rows, onerec, succeeded, write_csv


@pytest.fixture(scope="module")
def evaluated(trained, data, tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    done = succeeded(
        onerec("evaluate", "--model", trained.folder, "--interactions", data.interactions, "--json", file)
    )
    return done, json.loads(file.read_text())


def test_it_prints_what_train_printed(trained, evaluated):
    assert evaluated[0].out.rstrip("\n") == trained.done.out.split("\n\n")[0]


def test_the_json_rows_are_those_of_the_training_run(trained, evaluated):
    trained_results = json.loads((trained.folder / "results.json").read_text())
    wanted = [row for row in trained_results["rows"] if row["name"] != "seconds"]
    for found, row in zip(evaluated[1]["rows"], wanted, strict=True):
        assert found == row | {"value": pytest.approx(row["value"], abs=1e-9)}
    assert evaluated[1]["protocol"] == trained_results["protocol"]
    assert evaluated[1]["split"] == "test"
    assert evaluated[1]["command"].startswith("onerec-hf evaluate --model ")


def test_batches_of_another_size_give_the_same_numbers(trained, data, evaluated):
    done = onerec("evaluate", "--model", trained.folder, "--interactions", data.interactions, "--batch_size", 7)
    assert succeeded(done).out == evaluated[0].out


def test_the_baselines_are_right(trained, data, tmp_path):
    """Popularity by hand, for the validation target: the last item but one, from what came before."""
    file = tmp_path / "rows.json"
    options = ["--interactions", data.interactions, "--split", "validation", "--top_k", 3, "--json", file]
    succeeded(onerec("evaluate", "--model", trained.folder, *options))
    rows = {row["name"]: row["value"] for row in json.loads(file.read_text())["rows"]}
    users = {}
    for user, item, _ in interaction_rows()[1:]:
        users.setdefault(user, []).append(int(item[1:]))
    counts = np.zeros(NUM_ITEMS)
    for items in users.values():
        np.add.at(counts, items[:-2], 1)
    order = sorted(range(NUM_ITEMS), key=lambda item: (-counts[item], f"m{item}"))  # ties: rows are sorted by id
    hits, shown = [], set()
    for items in users.values():
        top = [item for item in order if item not in items[:-2]][:3]
        hits.append(items[-2] in top)
        shown |= set(top)
    assert rows["popularity/recall@3"] == pytest.approx(np.mean(hits))
    assert rows["popularity/coverage@3"] == pytest.approx(len(shown) / NUM_ITEMS)
    assert json.loads(file.read_text())["split"] == "validation"


def test_seen_items_can_stay(trained, data, evaluated):
    options = ["--interactions", data.interactions, "--no_exclude_seen"]
    assert succeeded(onerec("evaluate", "--model", trained.folder, *options)).out != evaluated[0].out


def test_with_fewer_items_in_the_data_all_still_choose_from_the_catalogue(trained, tmp_path):
    """Coverage counts the catalogue's items, for the baselines as for the model."""
    header, *rows = interaction_rows()
    few = [row for row in rows if int(row[1][1:]) < 25]
    table = write_csv(tmp_path / "few.csv", [header, *few])
    file = tmp_path / "rows.json"
    done = onerec("evaluate", "--model", trained.folder, "--interactions", table, "--top_k", 10, "--json", file)
    rows = {row["name"]: row["value"] for row in json.loads(succeeded(done) and file.read_text())["rows"]}
    assert len(ItemCatalogue.load(trained.folder / "catalogue.safetensors")) == NUM_ITEMS
    for model in ("onerec", "popularity", "item_knn"):
        items = rows[f"{model}/coverage@10"] * NUM_ITEMS
        assert items == pytest.approx(round(items), abs=1e-6)
        assert items >= 10
    assert "on 25 items" in done.err


def test_a_sequence_model_is_ranked_beside_the_baselines(data, tmp_path):
    torch.manual_seed(0)
    model = SequentialRecommender.from_items([f"m{item}" for item in range(NUM_ITEMS)], hidden_size=8)
    model.save_pretrained(tmp_path / "sasrec")
    file = tmp_path / "rows.json"
    options = ["--interactions", data.interactions, "--top_k", 3, "--json", file]
    done = succeeded(onerec("evaluate", "--model", tmp_path / "sasrec", *options))
    assert {"sasrec", "popularity", "item_knn"} <= set(done.out.split())
    rows = {row["name"]: row["value"] for row in json.loads(file.read_text())["rows"]}
    users: dict[str, list[str]] = {}
    for user, item, _ in interaction_rows()[1:]:
        users.setdefault(user, []).append(item)
    best = model.recommend([items[:-1] for items in users.values()], top_k=3)
    hits = [items[-1] in dict(top) for items, top in zip(users.values(), best, strict=True)]
    assert rows["sasrec/recall@3"] == pytest.approx(np.mean(hits))
