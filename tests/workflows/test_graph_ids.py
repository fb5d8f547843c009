"""`--embedding graph` and `--on_collision popularity-rank`: from training rows only, of every kind of data, with new items, by commands."""

import numpy as np
import pandas as pd
import pytest

from onerec_hf import OneRecForConditionalGeneration, OneRecProcessor
from onerec_hf.data import ExampleSettings, prepare_log
from onerec_hf.semantic_ids import combine_embeddings, graph_embeddings
from onerec_hf.workflows import load_dataset
from onerec_hf.workflows.semantic_ids import embed_items, fit_catalogue
from onerec_hf.workflows.settings import SemanticIDSettings
from tests.cli.commands import CODES, TINY, onerec, refused, succeeded
from tests.rounding import assert_close


def vectors_of(data, embedding, **settings):
    return embed_items(data, SemanticIDSettings(embedding=embedding, embedding_dim=4, **settings)).vectors


@pytest.fixture(scope="module")
def data(tables):
    return load_dataset(interactions=tables["interactions"], items=tables["items"])


def test_each_source_is_smoothed(data):
    plain = vectors_of(data, "text+behaviour", behaviour_weight=0.5)
    text, behaviour = plain[:, :4], plain[:, 4:]
    parts = [graph_embeddings(part, data.train_rows(), 2) for part in (text, 2 * behaviour)]
    wanted = combine_embeddings(parts, [1.0, 0.5])
    for embedding in ("graph", "graph+text+behaviour", "text+graph+behaviour"):
        assert_close(vectors_of(data, embedding, behaviour_weight=0.5, graph_layers=2), wanted)
    assert np.abs(wanted - plain).max() > 0.1
    assert_close(vectors_of(data, "graph+text"), graph_embeddings(text, data.train_rows()))


def test_held_out_items_leave_no_trace(tables, data):
    """The items of all validation and test targets are exchanged; the vectors stay bit for bit. One training row changes them."""
    rows = tables["interactions"].reset_index(drop=True)
    held = rows.groupby("user_id", sort=False).tail(2).index
    planted = rows.copy()
    planted.loc[held, "item_id"] = np.roll(rows.loc[held, "item_id"].to_numpy(), 7)
    assert (planted["item_id"] != rows["item_id"]).sum() > 40
    other = load_dataset(interactions=planted, items=tables["items"])
    wanted = vectors_of(data, "graph")
    assert np.array_equal(vectors_of(other, "graph"), wanted)
    first = rows.groupby("user_id", sort=False).head(1).index[:2]
    planted.loc[first, "item_id"] = rows.loc[first[::-1], "item_id"].to_numpy()
    assert not np.array_equal(vectors_of(load_dataset(interactions=planted, items=tables["items"]), "graph"), wanted)


def test_prepared_data_give_the_same_vectors(files, data, tmp_path):
    prepare_log(
        files["interactions"], tmp_path / "ready", settings=ExampleSettings(), num_shards=2, rows_per_bucket=60
    )
    prepared = load_dataset(prepared=str(tmp_path / "ready"), items=files["items"])
    assert np.array_equal(prepared.item_ids, data.item_ids)
    assert_close(vectors_of(prepared, "graph"), vectors_of(data, "graph"))


def test_the_rank_is_that_of_training_popularity(data):
    settings = SemanticIDSettings(
        embedding="graph", codebook_sizes=[3, 2], quantizer="balanced", on_collision="popularity-rank"
    )
    catalogue = fit_catalogue(data, settings).catalogue
    counts = np.bincount(np.concatenate(data.train_rows()), minlength=40)
    assert np.array_equal(catalogue.popularity, counts)
    assert catalogue.codebook_sizes[2] > 2
    for prefix in np.unique(catalogue.codes[:, :2], axis=0):
        group = np.flatnonzero((catalogue.codes[:, :2] == prefix).all(1))
        ranked = group[catalogue.codes[group, 2].argsort()]
        assert catalogue.codes[ranked, 2].tolist() == list(range(len(group)))
        assert (np.diff(counts[ranked]) <= 0).all()


def test_a_model_trains_takes_new_items_and_recommends_them(files, tmp_path):
    options = [
        "--embedding",
        "graph",
        "--graph_layers",
        2,
        "--on_collision",
        "popularity-rank",
        "--baselines",
        "false",
    ]
    folder = tmp_path / "mine"
    tables = ["--interactions", files["interactions"], "--items", files["items"]]
    done = succeeded(onerec("train", *tables, *CODES, *options, *TINY, "--output_dir", folder))
    assert "from graph+text+behaviour (dim 64, behaviour weight 1, 2 graph layers)" in done.err
    assert "resolved by an additional level of" in done.err
    new = tmp_path / "new.csv"
    pd.DataFrame({"item_id": ["n1", "n2"], "title": ["red lamp 1", "green lamp 25"], "genre": ["garden", "indoor"]}).to_csv(
        new, index=False
    )  # fmt: skip
    done = onerec("add-items", "--model", folder, "--items", new, "--output_dir", tmp_path / "grown")
    if done.status:  # no number is left under these codes
        pytest.fail(done.err)
    model = OneRecForConditionalGeneration.from_pretrained(tmp_path / "grown").eval()
    processor = OneRecProcessor.from_pretrained(tmp_path / "grown")
    assert len(processor.catalogue) == 42
    found = model.recommend(**processor([["n1", "m3"]]), session_length=1, num_beams=42, num_return_sequences=42)
    assert {item for (item,) in processor.batch_decode(found)} == set(processor.catalogue.item_ids)


def test_wrong_options_are_one_error(files, tmp_path):
    base = ["train", "--interactions", files["interactions"], *TINY, *CODES, "--output_dir", tmp_path / "out"]
    refused(onerec(*base, "--embedding", "graph", "--graph_layers", 0), "--graph_layers 0: pass at least 1")
    refused(onerec(*base, "--embedding", "graph+text"), "--embedding graph+text: 'text' is not available")
    refused(onerec(*base, "--on_collision", "rank"), "choose one of assign, extra-digit, popularity-rank")
    assert not (tmp_path / "out" / "model.safetensors").exists()
