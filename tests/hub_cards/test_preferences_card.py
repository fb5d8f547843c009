"""The pair table's card: it loads as a data set by its snippet, its counts are the table's, no name becomes markup."""

import pytest
from datasets import Dataset
from huggingface_hub import DatasetCard

from onerec_hf.hub_cards import Alignment, write_preferences_card
from onerec_hf.hub_cards.common import plain_text
from tests.hub_cards.reading import HOSTILE, headings, run_snippet, section, table_of

ALIGNMENT = Alignment(["the function f"], {0: 2, 1: 1}, 2, 1000, 0.002, "6 candidates.", "DPO, beta 0.1")


def pairs(**columns):
    rows = [
        {"row": row, "iteration": iteration, "history": ["m1"] * (1 + row), "chosen": ["m2", "m3"], "rejected": ["m4"]}
        for row, iteration in ((0, 0), (5, 0), (0, 1))
    ]
    rewards = {"chosen_reward": 0.75, "rejected_reward": 0.25}
    return Dataset.from_list([{**row, **rewards, **columns} for row in rows])


def write(folder, table, *args, **kwargs):
    write_preferences_card(folder, table, *args, **kwargs)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["pairs", 'it\'s a "table"'])
def test_the_snippet_loads_the_table(tmp_path, name, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder, table = tmp_path / name, pairs()
    folder.mkdir()
    table.to_parquet(folder / "pairs.parquet")
    loaded = run_snippet(write(folder, table, ALIGNMENT))["pairs"]
    assert loaded.to_list() == table.to_list()


def test_the_counts_are_the_tables(tmp_path):
    card = write(tmp_path, pairs(), ALIGNMENT, catalogue_hash="abc" * 10, command="onerec-hf align")
    assert "3 pairs for 2 distinct histories; chosen sessions have 2 items, rejected ones 1." in card
    assert "catalogue `abcabcabcabcabca`" in card
    assert table_of(section(card, "Columns"))[-2:] == ["| 0 | 2 |", "| 1 | 1 |"]
    assert "| history | list of string |" in card
    drawn = section(card, "Sampling")
    assert "Each iteration draws pairs for 0.2% of 1,000 training examples. 6 candidates." in drawn
    assert "Reward: the function f. Mean reward 0.7500 of chosen and 0.2500 of rejected sessions." in drawn
    assert "```sh\nonerec-hf align\n```" in card


def test_the_front_matter_is_a_dataset_card(tmp_path):
    write(tmp_path, pairs(), ALIGNMENT, metadata={"license": "mit", "tags": ["films"]})
    card = DatasetCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert {"onerec", "films"} <= set(card.data.tags)
    assert card.data.size_categories == "n<1K"
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "*.parquet"}]


def test_given_pairs_of_unknown_origin(tmp_path):
    card = write(tmp_path, Dataset.from_list([{"history": [1], "chosen": [2], "rejected": [[3], [4, 5]]}]))
    assert "Not recorded" in card
    assert "not from users" not in card
    assert "rejected ones 1 to 2." in card
    assert "| rejected | list of list of int64 |" in card
    assert "iteration |" not in card
    with pytest.raises(ValueError, match="no rows"):
        write_preferences_card(tmp_path, Dataset.from_list([]))


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_only_names(tmp_path, name):
    alignment = Alignment([f"the reward model {name}"], {0: 3}, 1, 10, 0.3, f"picked by {name}", "DPO")
    card = write(tmp_path, pairs(**{name: 1}), alignment, repo_id="me/pairs", data=f"Read from {name}.")
    text = DatasetCard.load(tmp_path / "README.md").text
    assert headings(text) == ["# pairs", "## Columns", "## Sampling", "## Data", "## Limits"]
    assert f"| {plain_text(name)} | int64 |  |" in card
    assert f"Reward: the reward model {plain_text(name)}." in card
    assert f"Read from {plain_text(name)}." in card
