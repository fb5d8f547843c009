"""`onerec-hf prepare`, and the commands that take its folder in place of a table."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from tests.cli.commands import CODES, TINY, codes, onerec, refused, succeeded
from tests.cli.test_train import TOP, values

# What the in-memory commands of these tests run with, `TINY` apart.
SHARDS = ["--num_shards", "4", "--rows_per_bucket", "60"]


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "ready"
    done = succeeded(onerec("prepare", "--interactions", data.interactions, *SHARDS, "--output_dir", folder))
    return folder, done


@pytest.fixture(scope="module")
def streamed(prepared, semantic_ids, tmp_path_factory):
    """A model trained on the stream, with the checkpoints of its first epoch."""
    folder = tmp_path_factory.mktemp("streamed") / "model"
    keep = ["--save_strategy", "steps", "--save_steps", "1", "--keep_checkpoints", "true"]
    options = ["--prepared", prepared[0], "--semantic_ids", semantic_ids.folder, *TINY, *keep]
    return folder, options, succeeded(onerec("train", *options, "--output_dir", folder))


def test_it_counts_what_became_of_the_rows(prepared):
    folder, done = prepared
    manifest = json.loads((folder / "prepared.json").read_text())
    printed = {line[:16].strip(): int(line[16:].replace(",", "")) for line in done.out.splitlines()}
    assert printed == {name.replace("_", " "): count for name, count in manifest["counts"].items()}
    assert (
        printed["kept"] == printed["rows"] - printed["not positive"] - printed["repeated"] - printed["rare items"] > 0
    )
    assert f"onerec-hf train --prepared {folder} --output_dir ..." in done.err


def test_training_on_it_gives_an_artefact_and_the_same_baselines(streamed, trained):
    folder, _, done = streamed
    assert {path.name for path in folder.iterdir()} == TOP - {"trained_on.json"} | {"checkpoints"}
    ours, theirs = values(folder), values(trained.folder)
    assert ours.keys() == theirs.keys()
    baselines = [name for name in ours if name.startswith(("popularity/", "item_knn/"))]
    assert len(baselines) == 16
    # Users stand in another order, so sums may end in another digit.
    assert [ours[name] for name in baselines] == pytest.approx([theirs[name] for name in baselines])
    assert "in 4 shards" in done.err


def test_it_goes_on_in_the_middle_of_an_epoch(streamed, tmp_path):
    folder, options, _ = streamed
    checkpoint = folder / "checkpoints" / "checkpoint-2"
    resumed = succeeded(
        onerec("train", *options, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", checkpoint)
    )
    first, second = (
        AutoModelForSeq2SeqLM.from_pretrained(path).state_dict() for path in (folder, tmp_path / "resumed")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert values(folder) == values(tmp_path / "resumed"), resumed.err


def test_semantic_ids_are_those_of_the_table(prepared, semantic_ids, data, tmp_path):
    options = ["--prepared", prepared[0], "--items", data.items, *CODES]
    succeeded(onerec("semantic-ids", "fit", *options, "--output_dir", tmp_path / "ids"))
    assert codes(tmp_path / "ids") == codes(semantic_ids.folder)


def test_evaluation_of_some_users_without_baselines(prepared, streamed, tmp_path):
    options = ["--model", streamed[0], "--prepared", prepared[0], "--num_beams", "10"]
    done = succeeded(
        onerec("evaluate", *options, "--eval_users", "7", "--no_baselines", "--json", tmp_path / "r.json")
    )
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {row["name"].split("/")[0] for row in rows} == {"onerec", "invalid_id_rate"}
    shares = [row["value"] * 7 for row in rows if row["name"].startswith("onerec/recall")]
    assert shares == pytest.approx([round(share) for share in shares])
    assert done.out.splitlines()[1].startswith("onerec ")


def test_bad_options(prepared, data, tmp_path):
    folder, out = prepared[0], ["--output_dir", tmp_path / "out"]
    train = ["train", "--prepared", folder, *out]
    for argv, message in (
        (["prepare", *out], "--interactions"),
        (["prepare", "--interactions", tmp_path / "absent.csv", *out], "no such file"),
        (["prepare", "--interactions", data.interactions, "--output_dir", folder], "pass --overwrite to replace it"),
        (["prepare", "--interactions", data.interactions, *out, "--stride", "0"], "stride must be at least 1; got 0"),
        (["prepare", "--interactions", data.interactions, *out, "--num_shards", "0"], "num_shards must be at least 1"),
        (["prepare", "--interactions", data.interactions, *out, "--train_on", "x"], "choose windows or prefixes"),
        ([*train, "--interactions", data.interactions], "pass --prepared, --interactions or --dataset; one of them"),
        ([*train, "--max_history", "7"], f"--max_history 7: {folder} was prepared with 50; leave the option out"),
        (
            [*train, "--positive", "rating>=4"],
            f"--positive rating>=4: {folder} was prepared with none; leave the option out",
        ),
        ([*train, "--train_on", "prefixes", "--encoder_is_causal"], "--train_on goes with --interactions"),
        ([*train, "--eval_users", "0"], "--eval_users must be at least 1"),
        ([*train, "--missing_items", "drop"], "--missing_items goes with --interactions"),
        (
            ["train", "--interactions", data.interactions, "--eval_users", "9", *out],
            "--eval_users goes with --prepared",
        ),
        (
            ["train", "--prepared", tmp_path, *out],
            "prepared.json is missing. Pass a folder written by `onerec-hf prepare`",
        ),
    ):
        refused(onerec(*argv), message)
    assert not (tmp_path / "out").exists()


def test_damaged_folders(prepared, tmp_path):
    def damaged(name):
        shutil.copytree(prepared[0], tmp_path / name)
        return tmp_path / name

    shard = "train-00001-of-00004.parquet"
    missing, short, cut = damaged("missing"), damaged("short"), damaged("cut")
    (missing / shard).unlink()
    (short / shard).write_bytes((short / shard).read_bytes()[:-100])
    shutil.copy(cut / "test.parquet", cut / shard)
    (damaged("no-json") / "prepared.json").write_text('{"format": 1, "train"')
    (damaged("odd-json") / "prepared.json").write_text('{"format": 1, "train": 3}')
    (damaged("newer") / "prepared.json").write_text('{"format": 2}')
    for name, message in (
        ("missing", f"{shard} is missing. Copy the whole folder again"),
        ("short", f"{shard} is damaged"),
        ("cut", f"{shard} has 30 rows, expected "),
        ("no-json", "prepared.json cannot be read"),
        ("odd-json", "prepared.json is damaged"),
        ("newer", "format 2 is not supported by this version"),
    ):
        refused(onerec("train", "--prepared", tmp_path / name, "--output_dir", tmp_path / "out"), message)
