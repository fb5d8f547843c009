"""`train --model` with newer rows: only they are trained on, and counted."""

import json

import pandas as pd
import pytest

from onerec_hf.workflows import load_dataset, train
from onerec_hf.workflows.increment import newer
from tests.workflows.conftest import TINY

SAVED = {name: value for name, value in TINY.items() if name != "codebook_sizes"}


@pytest.fixture(scope="module")
def day_one(tables):
    """All users' first ten of twelve rows, with times that are one clock's."""
    table = tables["interactions"].copy()
    table["timestamp"] = table["timestamp"] % 100
    return table[table["timestamp"] < 10]


@pytest.fixture(scope="module")
def model(day_one, tmp_path_factory):
    return train(load_dataset(interactions=day_one), output_dir=tmp_path_factory.mktemp("one") / "out", **TINY).folder


def rows(*new):
    return pd.DataFrame(new, columns=["user_id", "item_id", "timestamp"])


NEW = rows(
    ("u0", "m7", 20),
    ("u0", "m8", 21),
    ("u1", "m9", 20),
    *(("fresh", f"m{item}", 20 + item) for item in range(4)),
    *((f"u{user}", "m-new", 30) for user in range(2, 7)),
)


def test_only_newer_items_are_targets(day_one, model, capsys):
    """Of u0 the two items that were held out and nothing else can be trained on; of u1 one; of the new user two."""
    data = load_dataset(interactions=pd.concat([day_one, NEW]), session_length=1)
    capsys.readouterr()
    some = newer(data, str(model))
    said = capsys.readouterr().err
    assert "7 rows are newer than those that it was trained on, 1 new users" in said
    assert "5 rows of 1 items that its catalogue lacks are left out" in said
    trained = {}
    for user, session in zip(some.train["user_id"], some.train["session"], strict=True):
        trained.setdefault(user, []).extend(session)
    old = {user: group["item_id"].tolist() for user, group in day_one.groupby("user_id")}
    assert trained == {"u0": old["u0"][8:], "u1": old["u1"][8:9], "fresh": ["m1"]}
    longest = {user: len(history) for user, history in zip(some.train["user_id"], some.train["history"], strict=True)}
    assert longest == {"u0": 9, "u1": 8, "fresh": 1}  # older rows are history
    targets = dict(zip(some.test["user_id"], some.test["session"], strict=True))
    assert targets["u0"] == ["m8"]
    assert targets["u1"] == ["m9"]
    assert targets["u5"] == old["u5"][9:]  # held out before, never trained on
    assert "m-new" not in some.sequences.item_ids
    assert sum(map(len, some.on_prefixes().train["sessions"])) == len(some.train)


def test_training_goes_on_with_newer_rows(day_one, model, tmp_path):
    data = load_dataset(interactions=pd.concat([day_one, NEW]))
    result = train(data, model=str(model), output_dir=tmp_path / "two", **SAVED)
    assert json.loads((model / "trained_on.json").read_text()) == {
        "until": 9,
        "interactions": 296,
        "users": 30,
        "held_out": 2,
    }
    written = json.loads((result.folder / "trained_on.json").read_text())
    assert written == {"until": 23, "interactions": 303, "users": 31, "held_out": 2}
    assert "Going on from a model: the" in json.loads((result.folder / "results.json").read_text())["protocol"]
    assert len(result.trainer.train_dataset) < 20


def test_rows_of_unknown_items_alone_are_left_out(day_one, model, capsys):
    data = load_dataset(interactions=pd.concat([day_one, NEW[NEW["item_id"] == "m-new"]]))
    capsys.readouterr()
    same = newer(data, str(model))
    assert "no row of its items is newer" in (said := capsys.readouterr().err)
    assert "5 rows of 1 items that its catalogue lacks are left out" in said
    plain = load_dataset(interactions=day_one)
    assert same.train[:] == plain.train[:]
    assert same.test[:] == plain.test[:]
    assert same.item_ids.tolist() == plain.item_ids.tolist()


def test_after_a_refit_only_new_users_rows_are_evaluated(day_one, tmp_path):
    first = train(load_dataset(interactions=day_one), output_dir=tmp_path / "one", refit=True, **TINY)
    assert json.loads((first.folder / "trained_on.json").read_text())["held_out"] == 0
    some = newer(load_dataset(interactions=pd.concat([day_one, NEW]), session_length=1), str(first.folder))
    assert dict(zip(some.test["user_id"], some.test["session"], strict=True)) == {
        "u0": ["m8"],
        "u1": ["m9"],
        "fresh": ["m3"],
    }
    assert set(some.validation["user_id"]) == {"u0", "fresh"}
    assert list(some.train["user_id"]) == ["fresh"]


def test_the_same_rows_are_trained_on_again(day_one, model, capsys):
    data = load_dataset(interactions=day_one)
    assert newer(data, str(model)) is data
    assert "no row of its items is newer than those that it was trained on" in capsys.readouterr().err
    record = model / "trained_on.json"
    kept = record.read_text()
    record.write_text(kept.replace('"held_out": 2', '"held_out": 0'))
    try:
        assert newer(data, str(model)) is data
    finally:
        record.write_text(kept)
    assert "so that the metrics here are of items it has seen" in capsys.readouterr().err


def test_a_model_of_other_items_is_refused(day_one, model):
    other = day_one.assign(item_id="other-" + day_one["item_id"])
    data = load_dataset(interactions=pd.concat([other, NEW]))
    with pytest.raises(ValueError, match=r"--model .*: 39 of 39 items of the data are not in its catalogue"):
        newer(data, str(model))
    numbers = pd.concat([day_one, NEW]).assign(item_id=lambda table: table["item_id"].str.len())
    with pytest.raises(ValueError, match=r"--model .* in the data; pass the data"):
        newer(load_dataset(interactions=numbers), str(model))


def test_rows_that_give_nothing_to_evaluate_are_refused(day_one, tmp_path):
    first = train(load_dataset(interactions=day_one), output_dir=tmp_path / "one", refit=True, **TINY)
    few = rows(("fresh", "m1", 20), ("fresh", "m2", 21))
    with pytest.raises(ValueError, match=r"2 rows are newer .*no user with a newer item to evaluate on"):
        newer(load_dataset(interactions=pd.concat([day_one, few])), str(first.folder))


def test_a_damaged_record_is_an_error_and_none_changes_nothing(day_one, model, tmp_path):
    data = load_dataset(interactions=pd.concat([day_one, NEW]))
    (tmp_path / "empty").mkdir()
    assert newer(data, str(tmp_path / "empty")) is data
    (tmp_path / "empty" / "trained_on.json").write_text('{"until": "x"}')
    with pytest.raises(ValueError, match=r"trained_on\.json is damaged .*remove it to train on all rows"):
        newer(data, str(tmp_path / "empty"))
