"""`onerec-hf quickstart`: ratings to a saved, recommending model, with its numbers."""

import json
import signal

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from onerec_hf.trainers import OneRecTrainer
from tests.cli.commands import NUM_ITEMS, onerec, rated_rows, succeeded, write_csv
from tests.hub_cards.reading import section

ROWS = ("onerec/recall@10", "popularity/recall@10", "item_knn/recall@10", "invalid_id_rate", "seconds")


def results(folder):
    return {row["name"]: row["value"] for row in json.loads((folder / "results.json").read_text())["rows"]}


def check(done, folder, title, shown="session"):
    """The result rows, the table on stdout, the sessions above it, and the folder."""
    rows = results(folder)
    assert set(ROWS) <= rows.keys()
    assert rows["invalid_id_rate"] == 0
    assert rows["seconds"] > 0
    sessions, table, verdict = done.out.rsplit("\n\n", 2)
    assert verdict.startswith("NDCG@10 of OneRec is ")
    header, *lines = table.splitlines()
    assert [line.split()[0] for line in lines] == ["popularity", "item_knn", "onerec"]
    for line in lines:
        name, *numbers = line.split()
        assert float(numbers[header.split().index("recall@10")]) == pytest.approx(rows[f"{name}/recall@10"], abs=5e-5)
    users = sessions.strip().split("\n\n")
    assert len(users) == 3
    for user in users:
        name, latest, session, held_out = user.splitlines()
        assert name.startswith("user ")
        assert [line.split("  ")[1].strip() for line in (latest, session, held_out)] == [
            "latest",
            shown,
            "held out",
        ]
        assert len(session.split("; ")) == 5
        assert title in latest
    assert f"loaded {folder} through AutoModelForSeq2SeqLM and AutoProcessor: the same sessions" in done.err
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".tmp")]
    processor = AutoProcessor.from_pretrained(folder)
    assert AutoModelForSeq2SeqLM.from_pretrained(folder).config.catalogue_hash == processor.catalogue.hash
    return processor


def check_alignment(done, folder):
    """The short round at the end: a second artefact, and the rewards that its message names."""
    rewards = [
        results(folder)[f"{name}/{when}"] for name in ("reward", "heldout_reward") for when in ("before", "after")
    ]
    assert all(0 < reward < 1 for reward in rewards)
    assert all(f"{reward:.3f}" in done.err for reward in rewards)
    processor = AutoProcessor.from_pretrained(folder / "aligned")
    aligned, trained = (AutoModelForSeq2SeqLM.from_pretrained(path) for path in (folder / "aligned", folder))
    assert aligned.config.catalogue_hash == processor.catalogue.hash
    assert (folder / "aligned" / "codebooks.safetensors").read_bytes() == (
        folder / "codebooks.safetensors"
    ).read_bytes()
    moved = [not torch.equal(a, b) for a, b in zip(aligned.parameters(), trained.parameters(), strict=True)]
    assert all(moved)
    told = section((folder / "aligned" / "README.md").read_text(), "Alignment")
    before, after = (results(folder)[f"heldout_reward/{when}"] for when in ("before", "after"))
    assert f"by a held-out judge | {before:.4f} | {after:.4f} |" in told
    assert "reward" not in (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def first(data, tmp_path_factory):
    """A first run on own interactions: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart") / "first model"
    return folder, succeeded(onerec("quickstart", *data.options, "--max_steps", 2, "--output_dir", folder))


def weights(folder):
    return {name: value.tolist() for name, value in AutoModelForSeq2SeqLM.from_pretrained(folder).named_parameters()}


def test_own_interactions(first, data):
    folder, done = first
    processor = check(done, folder, " lamp ")
    assert processor.catalogue.codebook_sizes == [16, 16, 16]
    assert len(processor.catalogue) == NUM_ITEMS
    command = json.loads((folder / "results.json").read_text())["command"]
    assert command.startswith("onerec-hf quickstart --interactions ")
    # The settings are those of `train` without options, and so is the model.
    options = ["--max_steps", 2, "--seed", 0, "--semantic_id_seed", 0, "--disable_tqdm", "true"]
    trained = folder.parent / "trained"
    succeeded(onerec("train", *data.options, *options, "--output_dir", trained))
    assert weights(trained) == weights(folder)
    settings = [json.loads((path / "results.json").read_text())["settings"] for path in (folder, trained)]
    unread = settings[1].pop(0)  # the quickstart has no such option
    assert (unread["option"], unread["reason"]) == ("features", "auto would also read genre of items")
    assert settings[0] == settings[1]


@pytest.mark.slow
def test_ratings_end_in_a_round_of_alignment(tmp_path):
    rated = write_csv(tmp_path / "rated.csv", rated_rows())
    folder = tmp_path / "out"
    done = succeeded(
        onerec("quickstart", "--interactions", rated, "--preset", "small", "--max_steps", 2, "--output_dir", folder)
    )
    check(done, folder, "m")
    check_alignment(done, folder)
    protocol = json.loads((folder / "results.json").read_text())["protocol"]
    assert protocol.endswith("Rows of a user with equal times are in random order.")


def test_without_items_their_ids_are_shown(data, tmp_path):
    options = [
        "--interactions",
        data.interactions,
        "--preset",
        "small",
        "--max_steps",
        1,
        "--output_dir",
        tmp_path / "out",
    ]
    done = succeeded(onerec("quickstart", *options))
    check(done, tmp_path / "out", "m")
    assert f"semantic IDs: {NUM_ITEMS} items from behaviour (" in done.err
    assert "no column 'rating' to learn a reward from" in done.err
    assert not (tmp_path / "out" / "aligned").exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides_everything(first, data, tmp_path, seed):
    options = ["--seed", seed, "--max_steps", 2, "--output_dir", tmp_path / "again"]
    succeeded(onerec("quickstart", *data.options, *options))
    assert (weights(tmp_path / "again") == weights(first[0])) == (seed == 0)


def test_ctrl_c_leaves_nothing(data, tmp_path, monkeypatch):
    """There is no way to go on with a quickstart: it takes minutes, `train` resumes."""
    step = OneRecTrainer.training_step

    def training_step(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(OneRecTrainer, "training_step", step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(OneRecTrainer, "training_step", training_step)
    done = onerec("quickstart", *data.options, "--max_steps", 3, "--output_dir", tmp_path / "out")
    assert done.status == 130
    assert "onerec-hf: interrupted. Nothing is kept; start again." in done.err
    assert "resume" not in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_movielens(tmp_path):
    """The default data set, from PyPI: a few steps, and already more than nothing."""
    folder = tmp_path / "movies"
    done = succeeded(onerec("quickstart", "--max_steps", 5, "--output_dir", folder))
    processor = check(done, folder, "(19")
    assert processor.catalogue.id_type == "int"
    assert results(folder)["item_knn/recall@10"] > results(folder)["popularity/recall@10"] > 0.01
    check_alignment(done, folder)
    card = (folder / "README.md").read_text()
    assert "GroupLens" in card
    assert f"{len(processor.catalogue):,} items (integer ids)" in card
