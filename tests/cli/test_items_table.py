"""`items.parquet` by the commands: saved with a model, copied to the models made from it, left out by a switch, shown in answers."""

import json

import pytest

from onerec_hf import ItemCatalogue
from onerec_hf.data.item_fields import read_items_file
from onerec_hf.serving.models import ServedModel
from onerec_hf.serving.schema import Query
from onerec_hf.serving.settings import ServingSettings
from tests.cli.commands import CODES, TINY, item_rows, onerec, succeeded, write_csv

FIELDS = {item: {"title": title, "genre": genre} for item, title, genre in item_rows()[1:]}


def saved(folder):
    return dict(read_items_file(folder / "items.parquet", ItemCatalogue.load(folder / "catalogue.safetensors")))


def test_titles_are_saved_beside_the_catalogue(trained, semantic_ids):
    assert saved(trained.folder) == FIELDS
    assert saved(semantic_ids.folder) == FIELDS


def test_a_model_made_from_another_keeps_them(trained, semantic_ids, data, tmp_path):
    own = ["--interactions", data.interactions, *TINY]
    succeeded(onerec("train", "--model", trained.folder, *own, "--output_dir", tmp_path / "on"))
    assert saved(tmp_path / "on") == FIELDS
    succeeded(onerec("train", "--semantic_ids", semantic_ids.folder, *own, "--output_dir", tmp_path / "new"))
    assert saved(tmp_path / "new") == FIELDS
    renamed = [["item_id", "title"], *([item, f"New {item}"] for item in FIELDS)]
    items = ["--items", write_csv(tmp_path / "renamed.csv", renamed)]
    succeeded(onerec("train", "--model", trained.folder, *own, *items, "--output_dir", tmp_path / "renamed"))
    assert saved(tmp_path / "renamed")["m1"]["title"] == "New m1"


@pytest.mark.parametrize("options", [["--model"], []])
def test_a_switch_leaves_them_out(trained, data, tmp_path, options):
    start = ["--model", trained.folder] if options else CODES
    switch = ["--save_items", "false", "--output_dir", tmp_path / "model"]
    succeeded(onerec("train", *start, *data.options, *TINY, *switch))
    assert not (tmp_path / "model" / "items.parquet").exists()
    done = onerec("recommend", "--model", tmp_path / "model", stdin='["m1"]\n')
    assert json.loads(succeeded(done).out).keys() == {"items", "scores"}


def test_recommend_shows_them(trained, tmp_path):
    ask = ["recommend", "--model", trained.folder, "--top_k", 3]
    answer = json.loads(succeeded(onerec(*ask, stdin='["m1"]\n')).out)
    assert answer["fields"] == [FIELDS[item] for item in answer["items"]]
    answer = json.loads(succeeded(onerec(*ask, "--session_length", 2, stdin='["m1"]\n')).out)
    assert answer["fields"] == [[FIELDS[item] for item in session] for session in answer["sessions"]]
    answer = json.loads(succeeded(onerec(*ask, "--no_show_fields", stdin='["m1"]\n')).out)
    assert answer.keys() == {"items", "scores"}
    mine = write_csv(tmp_path / "mine.csv", [["item_id", "name"], *([item, f"Mine {item}"] for item in FIELDS)])
    answer = json.loads(succeeded(onerec(*ask, "--items", mine, stdin='["m1"]\n')).out)
    assert answer["fields"] == [{"name": f"Mine {item}"} for item in answer["items"]]


def test_lines_may_exclude_and_allow(trained):
    lines = [
        {"history": ["m1"], "exclude": ["m2"], "allow": ["m1", "m2", "m3"], "user_id": 7},
        {"history": ["m1"], "allow": None},
    ]
    stdin = "".join(json.dumps(line) + "\n" for line in lines)
    first, second = map(
        json.loads, succeeded(onerec("recommend", "--model", trained.folder, stdin=stdin)).out.splitlines()
    )
    assert first["items"] == ["m3"]
    assert first["user_id"] == 7
    assert len(second["items"]) == 10
    done = onerec("recommend", "--model", trained.folder, stdin='{"history": ["m1"], "exclude": ["new"]}\n')
    assert "line 1: exclude of the history: 1 of 1 items are not in the catalogue" in done.message


def test_the_server_shows_them(trained):
    served = ServedModel.load(str(trained.folder))
    assert served is not None
    key, request = served.prepare(Query(history=["m1"], top_k=3), "history", ServingSettings(), unknown="skip")
    (answer,) = served.answer(key, [request])
    assert answer["fields"] == [FIELDS[item] for item in answer["items"]]
    served.close()
