"""Who is evaluated: users without candidates, targets among seen items, retired items, and the setting of the last batch."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from onerec_hf.baselines import ItemKNNBaseline, PopularityBaseline, SequentialRecommender
from onerec_hf.workflows import evaluate, load_dataset
from onerec_hf.workflows.evaluation import baseline_rankings
from tests.cli.commands import onerec, succeeded, write_csv
from tests.rounding import close
from tests.workflows.conftest import TINY, options_of

ITEMS = 12
NAMES = ["user_id", "item_id", "timestamp"]


def log(repeats=False):
    """Thirty users of 12 items, and "whale", who has all of them."""
    rng, rows = np.random.default_rng(0), []
    for user in range(30):
        items = rng.permutation(ITEMS)[:7]
        rows += [(f"u{user:02}", f"m{item}", time) for time, item in enumerate(items)]
        rows += [(f"u{user:02}", f"m{items[0]}", 99)] if repeats else []
    return [NAMES, *rows, *(("whale", f"m{k % ITEMS}", k) for k in range(ITEMS + 2))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whale")
    table = write_csv(folder / "log.csv", log())
    settings = {**TINY, "codebook_sizes": [4, 4, 4], "eval_top_k": [3, 10], "per_device_eval_batch_size": 20}
    settings |= {"dataloader_drop_last": True, "eval_strategy": "steps", "eval_steps": 2, "verdict_sasrec": True}
    done = succeeded(onerec("train", "--interactions", table, "--output_dir", folder / "m", *options_of(settings)))
    return folder, table, done


def rows_of(file):
    return {row["name"]: row["value"] for row in json.loads(file.read_text())["rows"]}


def test_a_user_with_every_item_does_not_end_a_run(trained):
    folder, table, done = trained
    assert rows_of(folder / "m" / "results.json")["unranked_users"] == 1
    assert "on 30 test users" in done.out
    assert "without 1 users whose histories hold every item" in (folder / "m" / "README.md").read_text()
    assert not (folder / "m" / "unfinished.json").exists()
    command = [
        "evaluate",
        "--model",
        folder / "m",
        "--interactions",
        table,
        "--top_k",
        3,
        10,
        "--json",
        folder / "e.json",
    ]
    succeeded(onerec(*command))
    found, trained_rows = rows_of(folder / "e.json"), rows_of(folder / "m" / "results.json")
    assert {name: trained_rows[name] for name in found} == close(found)  # all users there too, with the last batch
    succeeded(onerec(*command, "--no_exclude_seen"))
    assert "unranked_users" not in rows_of(folder / "e.json")


def test_the_others_are_evaluated_as_without_that_user(trained, tmp_path):
    folder, table, _ = trained
    SequentialRecommender.from_items([f"m{k}" for k in range(ITEMS)], hidden_size=8).save_pretrained(tmp_path / "s")
    frame = pd.read_csv(table)
    for model in (folder / "m", tmp_path / "s"):
        with_whale = evaluate(load_dataset(interactions=frame), model=str(model), top_k=[3]).metrics
        assert with_whale.pop("unranked_users") == 1
        dataset = load_dataset(interactions=frame)
        others = dataset.test.filter(lambda row: row["user_id"] != "whale")
        dataset = replace(dataset, split=replace(dataset.split, test=others))
        assert evaluate(dataset, model=str(model), top_k=[3]).metrics == close(with_whale)


def test_the_user_is_named(trained, tmp_path):
    _folder, table, _ = trained
    SequentialRecommender.from_items([f"m{k}" for k in range(ITEMS)], hidden_size=8).save_pretrained(tmp_path / "s")
    said = succeeded(onerec("evaluate", "--model", tmp_path / "s", "--interactions", table)).err
    assert "1 of 31 users cannot be ranked" in said
    assert "'whale'" in said
    assert "--no_exclude_seen" in said


def test_targets_among_seen_items_are_said(trained, tmp_path):
    table = write_csv(tmp_path / "log.csv", log(repeats=True))
    SequentialRecommender.from_items([f"m{k}" for k in range(ITEMS)], hidden_size=8).save_pretrained(tmp_path / "s")
    command = ["evaluate", "--model", tmp_path / "s", "--interactions", table]
    done = succeeded(onerec(*command))
    assert "30 of 31 users have a target that repeats an item of their history" in done.err
    assert "repeats an item" not in succeeded(onerec(*command, "--no_exclude_seen")).err


def test_a_user_with_every_item_is_no_end_of_an_alignment(trained, tmp_path):
    folder, table, _ = trained
    pairs = tmp_path / "pairs.jsonl"
    row = {"history": ["m1"], "chosen": ["m2", "m3"], "rejected": ["m4", "m5"]}
    pairs.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    options = [
        "--max_steps",
        1,
        "--use_cpu",
        "true",
        "--report_to",
        "none",
        "--bf16",
        "false",
        "--disable_tqdm",
        "true",
    ]
    command = ["align", "--model", folder / "m", "--interactions", table, "--preferences", pairs]
    succeeded(onerec(*command, "--output_dir", tmp_path / "a", *options))
    assert rows_of(tmp_path / "a" / "results.json")["unranked_users"] == 1


def test_retired_items_are_in_no_baseline(tables):
    from onerec_hf import ItemCatalogue

    data = load_dataset(**tables)
    codes = np.stack(np.unravel_index(np.arange(len(data.item_ids)), (8, 8, 8)), 1)
    catalogue = ItemCatalogue(data.item_ids, codes, [8, 8, 8])
    whole, _ = baseline_rankings(data, catalogue, "test", 10)
    popular = catalogue.ids(np.unique(whole["popularity"][:, 0]))
    rankings, _ = baseline_rankings(data, catalogue.retire(popular), "test", 10)
    gone = catalogue.indices(popular)
    for name, ranked in rankings.items():
        assert np.isin(gone, whole[name]).any()
        assert not np.isin(gone, ranked).any()
    active = np.array([True, False, True, True])
    for baseline in (PopularityBaseline(), ItemKNNBaseline()):
        assert baseline.fit([[0, 1], [1, 2]], 4).recommend([[0]], 4, active=active).tolist() == [[2, 3, -1, -1]]
