"""New rows counted into saved models, in place and into a new folder, by the command and in Python."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from onerec_hf import OneRecForConditionalGeneration, OneRecProcessor
from onerec_hf.baselines import SequentialRecommender, add_evidence
from onerec_hf.data import UserSequences
from onerec_hf.data.evidence_counts import count_evidence
from onerec_hf.modeling import files
from onerec_hf.modeling.item_evidence import LISTS
from onerec_hf.workflows import load_dataset, train, update
from onerec_hf.workflows.evidence import rows_of_items
from onerec_hf.workflows.updating import _check_unit
from tests.cli.commands import contents, onerec, refused, succeeded
from tests.rounding import assert_close
from tests.workflows.conftest import TINY

HEAD = {"item_head": True, "item_head_evidence": True}


@pytest.fixture(scope="module")
def split(tables, tmp_path_factory):
    """The table's rows until step 8 of each user, and the others: old and new users have rows in both, and one user only new ones."""
    rows = tables["interactions"]
    old = (rows["timestamp"] % 100 < 8) & (rows["user_id"] != "u3")
    folder = tmp_path_factory.mktemp("rows")
    parts = {"all": rows, "old": rows[old], "new": rows[~old]}
    for name, part in parts.items():
        part.to_csv(folder / f"{name}.csv", index=False)
    return folder, parts


def dense(evidence, name: str) -> torch.Tensor:
    items, counts = evidence.list_of(name)
    return torch.zeros(len(items), len(items)).scatter_(1, items.long(), counts)


def assert_same_counts(evidence, wanted):
    assert evidence.interactions.tolist() == wanted.interactions.tolist()
    for name in LISTS:
        assert_close(dense(evidence, name), dense(wanted, name), terms=100)


@pytest.fixture(scope="module")
def generator(tables, split, tmp_path_factory):
    """A folder whose evidence and popularity hold all old rows, and no others; and the evidence with all rows."""
    folder = tmp_path_factory.mktemp("trained") / "mine"
    train(load_dataset(**tables), output_dir=folder, **TINY, **HEAD)
    model = OneRecForConditionalGeneration.from_pretrained(folder)
    wanted = None
    for name in ("all", "old"):
        sequences = UserSequences.from_interactions(split[1][name])
        indices = model.catalogue.indices(sequences.item_ids)
        evidence = model.get_encoder().item_head.evidence
        count_evidence(evidence, (rows_of_items(model, indices) - 1, sequences.offsets))
        if name == "all":
            wanted = type(evidence)(40)
            wanted.load_state_dict(evidence.state_dict())
        counts = np.bincount(indices, minlength=40)
    model.set_catalogue(model.catalogue.with_popularity(counts))
    model.save_pretrained(folder)
    return folder, wanted


@pytest.fixture
def mine(generator, tmp_path):
    shutil.copytree(generator[0], tmp_path / "mine")
    return tmp_path / "mine"


def test_update_equals_counts_from_scratch(mine, generator, split):
    rows, parts = split
    before = contents(mine)
    weights = OneRecForConditionalGeneration.from_pretrained(mine).state_dict()
    done = succeeded(
        onerec("update", "--model", mine, "--interactions", rows / "new.csv", "--history", rows / "old.csv")
    )
    number = len(parts["new"])
    assert f"{number:,} interactions" in done.out
    model = OneRecForConditionalGeneration.from_pretrained(mine)
    assert_same_counts(model.get_encoder().item_head.evidence, generator[1])
    ids = model.catalogue.item_ids
    assert model.catalogue.popularity.tolist() == parts["all"]["item_id"].value_counts()[ids].tolist()
    assert OneRecProcessor.from_pretrained(mine).catalogue.hash == model.catalogue.hash
    for name, value in model.state_dict().items():
        counted = "evidence" in name and not name.endswith("weights")
        assert counted != torch.equal(value, weights[name]), name
    untouched = set(before) - {"model.safetensors", "catalogue.safetensors"}
    after = contents(mine)
    assert {name for name in untouched if after[name] != before[name]} == set()
    assert set(after) - set(before) == {"updates.json"}
    [noted] = json.loads((mine / "updates.json").read_text())
    assert noted["interactions"] == number
    assert (noted["unknown_rows"], noted["cut"]) == (0, 0)


def test_history_may_hold_everything(mine, generator, split):
    """A log that has grown by the new rows is a history too."""
    rows, _ = split
    update(rows / "new.csv", history=rows / "all.csv", model=str(mine))
    model = OneRecForConditionalGeneration.from_pretrained(mine)
    assert_same_counts(model.get_encoder().item_head.evidence, generator[1])


def test_without_history_pairs_of_new_rows_count(mine, split):
    rows, parts = split
    result = update(str(rows / "new.csv"), model=str(mine), output_dir=str(mine.parent / "later"))
    lengths = parts["new"].groupby("user_id").size()
    assert result.counts["pairs"] == (lengths - 1).sum()
    assert "pass --history" in result.notes[0]
    assert result.folder == mine.parent / "later"
    assert set(contents(mine)) | {"updates.json"} == set(contents(result.folder))
    assert "updates.json" not in contents(mine)
    histories = [["m1", "m2"], ["m9"]]
    processor = OneRecProcessor.from_pretrained(result.folder)
    found = OneRecForConditionalGeneration.from_pretrained(result.folder).eval()
    assert found.recommend(**processor(histories), num_beams=8).shape[0] > 0
    before = OneRecForConditionalGeneration.from_pretrained(mine).get_encoder().item_head.evidence
    assert found.get_encoder().item_head.evidence.interactions.sum() == before.interactions.sum() + len(parts["new"])


def test_rows_are_counted_once(mine, split):
    _, parts = split
    half = parts["new"].iloc[::2]
    update(half, model=str(mine))
    with pytest.raises(ValueError, match=r"these rows were counted into .* Pass the rows that are new"):
        update(half.sample(frac=1, random_state=0), model=str(mine))
    update(parts["new"].iloc[1::2], model=str(mine))
    updates = json.loads((mine / "updates.json").read_text())
    assert [each["interactions"] for each in updates] == [len(half), len(parts["new"]) - len(half)]


def test_unknown_items_and_other_feedback_are_left_out_and_told(mine, tmp_path):
    rows = [
        ("u1", "m1", 900, 5),
        ("u1", "zebra", 901, 5),
        ("u1", "m2", 902, 5),
        ("u9", "yak", 900, 5),
        ("u9", "m3", 901, 1),
    ]
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "rating"]).to_csv(tmp_path / "new.csv", index=False)
    done = succeeded(
        onerec("update", "--model", mine, "--interactions", tmp_path / "new.csv", "--positive", "rating>=4")
    )
    assert "2 rows of 2 items that the model does not hold are left out" in done.err
    assert "2 interactions and 1 pairs of 4 positive rows (5 in the table)" in done.out


def test_columns_and_feedback_are_those_that_the_model_was_trained_with(mine, tmp_path):
    path = mine / "data_options.json"
    options = {**json.loads(path.read_text()), "user_column": "who", "positive": ["rating>=4"]}
    path.write_text(json.dumps(options))
    rows = pd.DataFrame(
        [("u1", "m1", 900, 5), ("u1", "m2", 902, 1)], columns=["who", "item_id", "timestamp", "rating"]
    )
    rows.to_csv(tmp_path / "new.csv", index=False)
    done = succeeded(onerec("update", "--model", mine, "--interactions", tmp_path / "new.csv"))
    assert "1 interactions and 0 pairs of 1 positive rows (2 in the table)" in done.out
    counts = update(rows.assign(rating=5, timestamp=903), model=str(mine), user_column="who", positive=None).counts
    assert counts["positive"] == 2


def test_tables_without_a_header_or_times(mine, split, tmp_path):
    """Without times the rows of the history come first, also where new rows equal them."""
    _, parts = split
    for name in ("old", "new"):
        parts[name].to_csv(tmp_path / f"{name}.csv", index=False, header=False)
    tables = ["--interactions", tmp_path / "new.csv", "--history", tmp_path / "old.csv"]
    names = ["--column_names", *parts["new"].columns]
    done = succeeded(onerec("update", "--model", mine, *tables, *names, "--output_dir", tmp_path / "timed"))
    assert f"{len(parts['new']):,} interactions" in done.out
    old = pd.DataFrame([("u1", "m1"), ("u1", "m2")], columns=["user_id", "item_id"])
    new = pd.DataFrame([("u1", "m1"), ("u1", "m3")], columns=["user_id", "item_id"])
    result = update(new, history=old, model=str(mine), timestamp_column="none")
    assert (result.counts["interactions"], result.counts["pairs"]) == (2, 2)  # m2 m1 and m1 m3


def test_sequence_models(tmp_path, split):
    rows, parts = split
    model, wanted = (SequentialRecommender.from_items([f"m{i}" for i in range(40)], hidden_size=8) for _ in range(2))
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="it has neither evidence nor popularity"):
        update(parts["new"], model=str(tmp_path / "plain"))
    add_evidence(model, UserSequences.from_interactions(parts["old"]).lists())
    add_evidence(wanted, UserSequences.from_interactions(parts["all"]).lists())
    model.save_pretrained(tmp_path / "mine")
    update(rows / "new.csv", history=parts["old"], model=str(tmp_path / "mine"))
    updated = SequentialRecommender.from_pretrained(tmp_path / "mine")
    assert_same_counts(updated.evidence, wanted.evidence)
    assert torch.equal(updated.item_embedding.weight, model.item_embedding.weight)


def test_a_failed_save_leaves_the_model(mine, split, monkeypatch):
    rows, _ = split
    before = contents(mine)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(OneRecForConditionalGeneration, "save_pretrained", full)
        message = refused(onerec("update", "--model", mine, "--interactions", rows / "new.csv"), "make room there")
    assert str(mine) in message
    assert contents(mine) == before
    assert files.UNFINISHED_NAME not in {path.name for path in mine.iterdir()}


def test_wrong_input(mine, split, tmp_path):
    rows, parts = split
    new = ["--interactions", rows / "new.csv"]
    refused(onerec("update", *new), "--model")
    refused(onerec("update", "--model", mine), "--interactions")
    refused(onerec("update", "--model", tmp_path / "nothing", *new), "--model", "nothing")
    refused(onerec("update", "--model", mine, *new, "--output_dir", mine), "not empty")
    refused(onerec("update", "--model", mine, *new, "--user_column", "who"), "no column 'who'")
    foreign = parts["new"].assign(item_id="x" + parts["new"]["item_id"])
    with pytest.raises(ValueError, match=r"none of \d+ rows is of the model's 40 items \(first: 'xm\d+'\)"):
        update(foreign, model=str(mine))
    with pytest.raises(ValueError, match=r"of type str; got 7.*the ids that the model was trained with"):
        update(parts["new"].assign(item_id=7), model=str(mine))
    assert "updates.json" not in contents(mine)


@pytest.mark.parametrize(("latest", "new"), [(1.6e9, 1.6e12), (1.6e12, 1.6e9), (50, 1.6e9)])
def test_times_of_another_unit_are_refused(latest, new):
    with pytest.raises(ValueError, match="of another unit than those that the model was trained with"):
        _check_unit(latest, new)


@pytest.mark.parametrize(("latest", "new"), [(1.4e9, 1.6e9), (50, 90_000), (-5, 3), (1.6e9, 1.5e9)])
def test_times_of_the_same_unit_are_not(latest, new):
    _check_unit(latest, new)


def test_new_rows_join_the_log_of_what_is_asked_for(tmp_path):
    """At their times, and the saved config knows the longer log; times of another unit leave the model as it is."""
    start = 1_600_000_000
    rows = pd.DataFrame(
        {"user_id": [1, 1, 2, 2], "item_id": [7, 8, 8, 9], "timestamp": [start, start + 5, start, start + 9]}
    )
    model = SequentialRecommender.from_items([7, 8, 9], hidden_size=8)
    add_evidence(model, UserSequences.from_interactions(rows))
    model.evidence.set_log(torch.tensor([1, 2, 2, 3]), torch.from_numpy(np.sort(rows.timestamp.to_numpy())))
    model.config.recent = 4
    model.save_pretrained(tmp_path / "model")
    new = pd.DataFrame({"user_id": [1, 2], "item_id": [9, 7], "timestamp": [start + 20, start + 7]})
    before = contents(tmp_path / "model")
    with pytest.raises(ValueError, match=r"times around .* are of another unit"):
        update(new.assign(timestamp=new.timestamp * 1000), model=str(tmp_path / "model"))
    assert contents(tmp_path / "model") == before
    update(new, model=str(tmp_path / "model"))
    again = SequentialRecommender.from_pretrained(tmp_path / "model")
    assert again.config.recent == 6
    assert again.evidence.log_items.tolist() == [1, 2, 2, 1, 3, 3]
    assert (again.evidence.log_times - start).tolist() == [0, 0, 5, 7, 9, 20]
