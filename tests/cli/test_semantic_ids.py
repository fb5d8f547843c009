"""`onerec-hf semantic-ids fit`: the folder that it writes, and what training makes of it."""

import json

import pytest
from transformers import AutoProcessor

from onerec_hf.semantic_ids import ResidualQuantizer, SemanticIDReport
from tests.cli.commands import CODES, NUM_ITEMS, TINY, codes, onerec, refused, succeeded


def test_the_folder_loads_as_a_processor_that_knows_every_item(semantic_ids):
    processor = AutoProcessor.from_pretrained(semantic_ids.folder)
    assert processor.catalogue.codebook_sizes == [8, 8, 8]
    assert sorted(processor.catalogue.item_ids) == sorted(f"m{i}" for i in range(NUM_ITEMS))
    labels = processor([["m1"]], sessions=[["m3", "m39"]])["labels"]
    assert processor.batch_decode(labels) == [["m3", "m39"]]


def test_the_report_stands_in_the_folder_and_on_stdout(semantic_ids):
    report = json.loads((semantic_ids.folder / "semantic_ids.json").read_text())
    assert report["num_items"] == NUM_ITEMS
    assert report["cluster_sizes"][:2] == [[5, 5], [5, 5]]
    assert semantic_ids.done.out == SemanticIDReport(**report).table() + "\n"
    assert semantic_ids.done.out.splitlines()[0] not in semantic_ids.done.err  # a terminal shows both


def test_the_codebooks_are_those_that_the_items_were_encoded_with(semantic_ids):
    quantizer = ResidualQuantizer.load(semantic_ids.folder / "codebooks.safetensors")
    assert list(quantizer.codebook_sizes) == [8, 8, 8]


def test_fitting_again_gives_the_same_ids(semantic_ids, data, tmp_path):
    succeeded(onerec("semantic-ids", "fit", *data.options, *CODES, "--output_dir", tmp_path / "again"))
    assert codes(tmp_path / "again") == codes(semantic_ids.folder)


@pytest.mark.parametrize("embedding", ["text", "behaviour", "aligned"])
def test_the_embedding_is_a_choice(semantic_ids, data, tmp_path, embedding):
    folder = tmp_path / "ids"
    done = succeeded(
        onerec("semantic-ids", "fit", *data.options, *CODES, "--output_dir", folder, "--embedding", embedding)
    )
    assert f"{NUM_ITEMS} items from {embedding} (" in done.err
    auto = AutoProcessor.from_pretrained(semantic_ids.folder).catalogue
    assert "items from text+behaviour (" in semantic_ids.done.err
    assert AutoProcessor.from_pretrained(folder).catalogue.hash != auto.hash


def test_train_takes_the_ids_as_they_are(semantic_ids, data, tmp_path):
    """Without the item file, and with other codebook options: neither is looked at."""
    folder = tmp_path / "model"
    succeeded(
        onerec(
            "train", "--interactions", data.interactions, "--semantic_ids", semantic_ids.folder, *TINY,
            "--max_history", 7, "--output_dir", folder,
        )
    )  # fmt: skip
    assert codes(folder) == codes(semantic_ids.folder)
    fitted, kept = (AutoProcessor.from_pretrained(path) for path in (semantic_ids.folder, folder))
    assert (kept.max_history, fitted.max_history) == (7, 50)


def test_it_says_what_it_can_do():
    refused(onerec("semantic-ids"), "onerec-hf semantic-ids fit --help")
    refused(onerec("semantic-ids", "make"), "onerec-hf semantic-ids fit --help")
    done = succeeded(onerec("semantic-ids", "--help"))
    assert "usage: onerec-hf semantic-ids fit" in done.out
    assert "--codebook_sizes" in done.out


def test_fit_refuses_ids_to_start_from(semantic_ids, data, tmp_path):
    done = onerec(
        "semantic-ids", "fit", *data.options, "--semantic_ids", semantic_ids.folder, "--output_dir", tmp_path / "o"
    )
    refused(done, "--semantic_ids", "onerec-hf train")
    assert not (tmp_path / "o").exists()


def test_report_compares_quantisers(data, tmp_path):
    table, picture = tmp_path / "report.json", tmp_path / "report.png"
    done = succeeded(
        onerec(
            "semantic-ids", "report", *data.options, *CODES, "--quantizers", "balanced", "kmeans", "--json", table, "--png", picture
        )
    )  # fmt: skip
    reports = json.loads(table.read_text())
    assert [report["method"] for report in reports] == ["balanced", "kmeans"]
    assert reports[0]["cluster_sizes"][0] == [5, 5] != reports[1]["cluster_sizes"][0]
    assert reports[1]["residual_energy"][0] < reports[0]["residual_energy"][0]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "\nbalanced " in done.out
    assert "\nkmeans " in done.out


def test_report_counts_collisions_where_a_prefix_is_crowded(data):
    done = succeeded(
        onerec("semantic-ids", "report", *data.options, "--codebook_sizes", 2, 2, 2, "--quantizers", "balanced")
    )
    assert "items share the prefix" in done.err
    assert "resolved by an additional level of" in done.out


def test_report_names_the_quantisers_there_are(data):
    refused(
        onerec("semantic-ids", "report", *data.options, "--quantizers", "pq"),
        "--quantizers pq",
        "balanced, kmeans, rq-vae",
    )


def test_fit_with_another_quantiser_and_an_extra_digit(data, tmp_path):
    folder = tmp_path / "ids"
    options = ["--codebook_sizes", 4, 4, "--quantizer", "kmeans", "--on_collision", "extra-digit"]
    succeeded(onerec("semantic-ids", "fit", *data.options, *options, "--output_dir", folder))
    catalogue = AutoProcessor.from_pretrained(folder).catalogue
    assert catalogue.codebook_sizes[:2] == [4, 4]
    assert len(catalogue.codebook_sizes) == 3
    refused(
        onerec("semantic-ids", "fit", *data.options, "--quantizer", "pq", "--output_dir", tmp_path / "o"),
        "unknown quantiser 'pq'",
    )
