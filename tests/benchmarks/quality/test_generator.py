"""Splits of the generator's benchmark (benchmarks/quality/generator.py): nothing that is held out is trained on."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.quality import generator_models as models
from benchmarks.quality.generator import _different, _recall
from onerec_hf.workflows import load_in_memory

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    rows = [
        (user, int(item), place)
        for user in range(60)
        for place, item in enumerate(rng.permutation(40)[: rng.integers(5, 14)])
    ]
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    return load_in_memory(interactions=table, min_item_interactions=1, session_length=1, max_history=10)


def trained_on(held) -> dict[int, list[int]]:
    sequences = held.data.train_sequences
    return {user: sequences[row].tolist() for row, user in enumerate(sequences.user_ids.tolist())}


def test_last_items_are_held_out(data):
    held = models.hold_out_last(data, 3, users=10)
    assert len(held.histories) == 10
    trained = trained_on(held)
    whole = {user: data.sequences[row].tolist() for row, user in enumerate(data.sequences.user_ids.tolist())}
    changed = [user for user in whole if trained[user] != whole[user]]
    assert len(changed) == 10
    for user, history, target in zip(changed, held.histories, held.targets, strict=True):
        assert trained[user] == history == whole[user][:-3]
        assert target == whole[user][-3:]


def test_new_items_are_in_no_training_sequence(data):
    new_users, old_users, new = models.hold_out_items(data, 0.2, users=15)
    assert len(new) == 8
    assert not set(new) & set(new_users.data.item_ids)
    trained = trained_on(new_users)
    assert not set(new) & {item for items in trained.values() for item in items}
    assert all(target[0] in new for target in new_users.targets)
    assert not any(set(history) & set(new) for history in new_users.histories + old_users.histories)
    # The targets of users with another next item are held out as well.
    whole = [[item for item in items.tolist() if item not in new] for items in data.sequences.lists()]
    for history, target in zip(old_users.histories, old_users.targets, strict=True):
        user = data.sequences.user_ids[whole.index([*history, *target])]
        assert trained[user] == history


def test_split_items_keep_sequences_and_a_user_has_one_copy(data):
    split = models.split_items(data, 4)
    assert len(split.item_ids) == 4 * len(data.item_ids)
    for items, original in zip(split.sequences.lists(), data.sequences.lists(), strict=True):
        assert (items // 4).tolist() == original.tolist()
        assert len(set((items % 4).tolist())) == 1
    assert set(split.sequences.item_ids) <= set(split.item_ids)


def test_recall_and_difference():
    found, targets = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 9], [5, 4]])
    assert _recall(found, targets) == 0.75
    assert _different(np.array([[1, 2, 3, 4, 5]]), np.array([[5, 4, 7, 8, 9]])).tolist() == [0.6]


@pytest.mark.slow
def test_quick_has_the_rows_of_the_published_results(tmp_path, data_folder):
    file = tmp_path / "rows.json"
    command = [sys.executable, "benchmarks/quality/generator.py", "--quick", "--json", str(file)]
    subprocess.run([*command, "--data_dir", str(data_folder / "amazon_beauty")], check=True, cwd=ROOT)
    published = json.loads((ROOT / "benchmarks/results/generator.json").read_text())["rows"]
    assert {row["name"] for row in published} <= {row["name"] for row in json.loads(file.read_text())["rows"]}
