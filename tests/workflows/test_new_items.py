"""New items of a saved model: added without training, left out, or an error; by commands and in Python."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from onerec_hf import OneRecForConditionalGeneration, OneRecProcessor
from onerec_hf.baselines import SequentialRecommender
from onerec_hf.data.item_fields import read_items_file
from onerec_hf.workflows import add_items, evaluate, train
from tests.cli.commands import contents, onerec, refused, succeeded
from tests.workflows.conftest import TINY, options_of

NEW = ["m38", "m39"]
HEAD = {"item_head": True, "item_head_content": True, "item_head_evidence": True, "item_score_weight": 1.0, "decoder_weight": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def tables_of(tables, tmp_path_factory):
    """The paths of all rows and of those without the new items, and of the items tables."""
    folder = tmp_path_factory.mktemp("new-items")
    rows, items = tables["interactions"], tables["items"]
    rows.to_csv(folder / "all.csv", index=False)
    rows[~rows["item_id"].isin(NEW)].to_csv(folder / "old.csv", index=False)
    items.to_csv(folder / "items.csv", index=False)
    items[~items["item_id"].isin(NEW)].to_csv(folder / "old_items.csv", index=False)
    items[items["item_id"].isin(NEW)].to_csv(folder / "new_items.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def by_text(tables_of, tmp_path_factory):
    """A model of texts and behaviour with an item head, trained without the new items."""
    folder = tmp_path_factory.mktemp("by-text") / "mine"
    train(interactions=tables_of / "old.csv", items=tables_of / "old_items.csv", output_dir=folder, **TINY, **HEAD)
    return folder


@pytest.fixture(scope="module")
def by_behaviour(tables_of, tmp_path_factory):
    """A model of behaviour alone, without an item head."""
    folder = tmp_path_factory.mktemp("by-behaviour") / "mine"
    train(interactions=tables_of / "old.csv", output_dir=folder, baselines=False, **TINY)
    return folder


def loaded(folder):
    return OneRecForConditionalGeneration.from_pretrained(folder).eval(), OneRecProcessor.from_pretrained(folder)


def test_added_items_are_read_and_recommended(by_text, tables_of, tmp_path):
    before = contents(by_text)
    done = succeeded(
        onerec(
            "add-items", "--model", by_text, "--items", tables_of / "new_items.csv", "--output_dir", tmp_path / "grown"
        )
    )
    assert "2 new items were added; 0 were known" in done.out
    assert contents(by_text) == before
    model, processor = loaded(tmp_path / "grown")
    old, old_processor = loaded(by_text)
    assert processor.catalogue.item_ids == [*old_processor.catalogue.item_ids, *NEW]
    assert np.array_equal(processor.catalogue.codes[:38], old_processor.catalogue.codes)
    assert model.catalogue.lineage == [old.catalogue.hash]
    head = model.get_encoder().item_head
    assert head.content[head.rows_of(model_codes(processor, NEW))].any(1).all()
    found = processor.batch_decode(
        model.recommend(**processor([NEW]), session_length=1, num_beams=40, num_return_sequences=40)
    )
    assert {item for (item,) in found} == set(processor.catalogue.item_ids)
    fields = read_items_file(tmp_path / "grown" / "items.parquet", processor.catalogue)
    assert fields["m38"]["title"] == "black lamp 38"
    assert fields["m1"]["title"] == "red lamp 1"
    shown = (tmp_path / "grown" / "semantic_ids.html").read_text(encoding="utf-8")
    assert "Semantic IDs of grown" in shown
    assert "40 items" in shown


def test_tables_without_a_header(by_text, by_behaviour, tables_of, tables, tmp_path):
    tables["interactions"].to_csv(tmp_path / "log.csv", index=False, header=False)
    new = tables["items"][tables["items"]["item_id"].isin(NEW)]
    new.to_csv(tmp_path / "items.csv", index=False, header=False)
    log = ["--interactions", tmp_path / "log.csv", "--column_names", *tables["interactions"].columns]
    items = ["--items", tmp_path / "items.csv", "--item_column_names", *new.columns]
    for model, given in ((by_text, [*items, *log]), (by_behaviour, log)):
        done = succeeded(
            onerec("add-items", "--model", model, *given, "--output_dir", tmp_path / f"of-{model.parent.name}")
        )
        assert "2 new items were added" in done.out
    asked = ["recommend", "--model", by_text, *log, *items, "--new_items", "add", "--users", "u1", "u2", "--top_k", 3]
    found = [json.loads(line) for line in succeeded(onerec(*asked)).out.splitlines()]
    assert [answer["user_id"] for answer in found] == ["u1", "u2"]
    named = [
        "recommend",
        "--model",
        by_text,
        "--interactions",
        tables_of / "all.csv",
        "--items",
        tables_of / "new_items.csv",
    ]
    wanted = succeeded(onerec(*named, "--new_items", "add", "--users", "u1", "u2", "--top_k", 3)).out
    assert found == [json.loads(line) for line in wanted.splitlines()]


def model_codes(processor, items):
    import torch

    return torch.tensor(processor.catalogue.codes[processor.catalogue.indices(items)], dtype=torch.long)


def test_an_item_with_the_text_of_a_known_one_gets_codes_beside_it(by_text, tables_of, tmp_path):
    table = pd.DataFrame({"item_id": ["twin"], "title": ["green lamp 25"], "genre": ["indoor"]})
    result = add_items(table, model=str(by_text), output_dir=tmp_path / "grown")
    assert (result.added, result.left_out, result.known) == (["twin"], [], 0)
    _, processor = loaded(tmp_path / "grown")
    codes = processor.catalogue.codes[processor.catalogue.indices(["twin", "m25"])]
    assert (codes[0, :2] == codes[1, :2]).all()


def test_in_place_nothing_but_the_model_changes(by_text, tables_of, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(by_text, mine)
    before = contents(mine)
    succeeded(onerec("add-items", "--model", mine, "--items", tables_of / "items.csv"))
    after = contents(mine)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed >= {"catalogue.safetensors", "config.json", "model.safetensors", "items.parquet"}
    assert before.keys() == after.keys()
    assert not any(name.endswith((".pkl", ".bin", ".pt", ".joblib")) for name in after)
    again = refused(onerec("add-items", "--model", mine, "--items", tables_of / "items.csv"), "nothing was added")
    assert "all 40 items are in its catalogue" in again


def test_items_without_known_words_are_left_out_and_named(by_text, tmp_path):
    table = tmp_path / "strange.csv"
    pd.DataFrame({"item_id": ["a", "b"], "title": ["blue lamp", "zzz"], "genre": ["garden", "yyy"]}).to_csv(
        table, index=False
    )
    done = succeeded(onerec("add-items", "--model", by_text, "--items", table, "--output_dir", tmp_path / "grown"))
    assert "1 new items were added" in done.out
    assert "1 new items have no known word" in done.err
    assert "'b'" in done.err


def test_items_known_by_behaviour_need_a_log(by_behaviour, tables_of, tmp_path):
    refused(
        onerec("add-items", "--model", by_behaviour, "--items", tables_of / "new_items.csv"),
        "none of 2 new items",
        "--interactions",
    )
    done = succeeded(
        onerec(
            "add-items", "--model", by_behaviour, "--interactions", tables_of / "all.csv", "--output_dir", tmp_path / "grown"
        )
    )  # fmt: skip
    assert "2 new items were added; 38 were known" in done.out


def test_a_repository_of_the_hub_is_not_changed_in_place(tables_of):
    refused(onerec("add-items", "--model", "me/films", "--items", tables_of / "items.csv"), "pass --output_dir")


def test_models_without_an_encoder_are_refused(by_text, tables_of, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(by_text, mine)
    (mine / "item_encoder.safetensors").unlink()
    refused(onerec("add-items", "--model", mine, "--items", tables_of / "new_items.csv"), "item_encoder.safetensors")


def evaluated(model, tables_of, *options):
    data = ["--interactions", tables_of / "all.csv", "--items", tables_of / "items.csv"]
    return onerec("evaluate", "--model", model, *data, "--no_baselines", *options)


def test_evaluation_with_new_items(by_text, tables_of):
    refused(evaluated(by_text, tables_of), "2 of 40 items", "--new_items skip or add")
    done = succeeded(evaluated(by_text, tables_of, "--new_items", "skip"))
    assert "18 rows of 2 items that the model does not hold are left out" in done.err
    before = contents(by_text)
    done = succeeded(evaluated(by_text, tables_of, "--new_items", "add"))
    assert "2 new items are added to its catalogue of 38" in done.err
    assert contents(by_text) == before
    refused(evaluated(by_text, tables_of, "--new_items", "drop"), "choose add, skip or error")


def test_a_sequence_model_takes_no_new_items(tables, tables_of, tmp_path):
    known = sorted(set(tables["items"]["item_id"]) - set(NEW))
    SequentialRecommender.from_items(known, hidden_size=8).save_pretrained(tmp_path / "sasrec")
    refused(evaluated(tmp_path / "sasrec", tables_of), "2 of 40 items", "--new_items skip or add")
    refused(evaluated(tmp_path / "sasrec", tables_of, "--new_items", "add"), "whose items are learned by training")
    succeeded(evaluated(tmp_path / "sasrec", tables_of, "--new_items", "skip"))


def test_codebooks_of_another_model_are_refused(by_text, by_behaviour, tables_of, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(by_text, mine)
    shutil.copyfile(by_behaviour / "codebooks.safetensors", mine / "codebooks.safetensors")
    refused(onerec("add-items", "--model", mine, "--items", tables_of / "items.csv"), "belong to different models")


def test_skipped_rows_leave_what_was_there(by_text, tables_of):
    with_new = evaluate(
        interactions=tables_of / "all.csv",
        items=tables_of / "items.csv",
        model=str(by_text),
        new_items="skip",
        baselines=False,
    )
    without = evaluate(
        interactions=tables_of / "old.csv", items=tables_of / "old_items.csv", model=str(by_text), baselines=False
    )
    assert with_new.metrics == without.metrics


@pytest.mark.parametrize("choice", ["add", "skip", "error"])
def test_training_goes_on_with_new_items(by_text, tables_of, tmp_path, choice):
    folder = tmp_path / "tuned"
    done = onerec(
        "train", "--model", by_text, "--interactions", tables_of / "all.csv", "--items", tables_of / "items.csv",
        "--new_items", choice, "--output_dir", folder, *options_of(TINY),
    )  # fmt: skip
    if choice == "error":
        refused(done, "2 of 40 items of the data are not in its catalogue")
        assert not folder.exists()
        return
    succeeded(done)
    model, processor = loaded(folder)
    assert len(processor.catalogue) == (40 if choice == "add" else 38)
    assert {"item_encoder.safetensors", "content_encoder.safetensors", "codebooks.safetensors"} <= contents(
        folder
    ).keys()
    if choice == "add":
        vectors = model.get_encoder().item_head.vectors.weight
        rows = model.get_encoder().item_head.rows_of(model_codes(processor, NEW))
        assert vectors[rows].any(1).all()  # trained from zeros
        assert json.loads((folder / "config.json").read_text())["item_head"]["num_items"] == 40


def test_new_items_of_a_new_model_make_no_sense(tables_of, tmp_path):
    message = refused(
        onerec("train", "--interactions", tables_of / "all.csv", "--new_items", "add", "--output_dir", tmp_path / "m"),
        "--new_items goes with --model",
    )
    assert "--model" in message


def test_new_items_are_recommended_without_a_copy(by_text, tables_of):
    history = json.dumps({"user_id": 1, "history": ["m38", "m37"]}) + "\n"
    options = ["--model", by_text, "--items", tables_of / "items.csv", "--top_k", 40]
    done = succeeded(onerec("recommend", *options, "--new_items", "add", stdin=history))
    answer = json.loads(done.out)
    assert set(answer["items"]) == {f"m{i}" for i in range(40)} - {"m37", "m38"}
    assert answer["fields"][answer["items"].index("m39")]["title"] == "black lamp 39"
    refused(onerec("recommend", *options, stdin=history), "1 of 2 items are not in the catalogue")
    skipped = json.loads(succeeded(onerec("recommend", *options, "--new_items", "skip", stdin=history)).out)
    assert "m39" not in skipped["items"]


def test_new_items_have_the_features_of_their_table(tables, tables_of, tmp_path):
    data = {"interactions": tables_of / "old.csv", "items": tables_of / "old_items.csv", "item_features": ["genre"]}
    train(**data, output_dir=tmp_path / "mine", baselines=False, **{**TINY, "max_steps": 1})
    new = tables["items"].query("item_id in @NEW").assign(genre=["garden", None])
    new.to_csv(tmp_path / "new.csv", index=False)
    add_items(model=tmp_path / "mine", items=tmp_path / "new.csv", output_dir=tmp_path / "grown")
    _, processor = loaded(tmp_path / "grown")
    genres = dict(zip(tables["items"].item_id, tables["items"].genre, strict=True)) | {"m38": "garden", "m39": None}
    values = [{"genre": genres[item]} for item in processor.catalogue.item_ids]
    assert processor.item_features.tolist() == processor.features.encode_items(values).tolist()
