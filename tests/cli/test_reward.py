"""`onerec-hf reward`: a table of impressions to a saved reward model that `align` takes."""

import json

import numpy as np
import pandas as pd
import pytest
from transformers import AutoModelForSequenceClassification

from onerec_hf.hub_cards.common import plain_text
from onerec_hf.workflows import load_feedback
from tests.cli.commands import NUM_ITEMS, contents, onerec, refused, succeeded, write_csv
from tests.hub_cards.reading import run_snippet

TINY = [
    "--hidden_size",
    8,
    "--intermediate_size",
    8,
    "--num_attention_heads",
    2,
    "--tower_size",
    8,
    "--behaviour_dim",
    4,
]
QUICK = ["--num_train_epochs", 1, "--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none"]
TIMES = ["--history_end", 10, "--validation_start", 25, "--test_start", 32]


@pytest.fixture(scope="module")
def impressions(tmp_path_factory):
    """A CSV: odd users like odd items."""
    rng = np.random.default_rng(0)
    rows = [["user_id", "item_id", "timestamp", "liked", "viewed"]]
    for user in range(40):
        for time in range(40):
            item = int(rng.integers(NUM_ITEMS))
            same = user % 2 == item % 2
            rows.append(
                [f"u{user}", f"m{item}", time, int(rng.random() < (0.7 if same else 0.1)), int(rng.random() < 0.5)]
            )
    return write_csv(tmp_path_factory.mktemp("impressions") / "log.csv", rows)


def reward(impressions, folder, *more):
    return onerec(
        "reward", "--impressions", impressions, "--objectives", "ltr=liked", "viewed", *TIMES, *TINY, *QUICK, "--output_dir", folder, *more
    )  # fmt: skip


def test_a_table_becomes_a_reward_model(impressions, data, tmp_path):
    folder = tmp_path / "judge"
    items = ["--items", data.items]
    done = succeeded(
        reward(
            impressions, folder, *items, "--score_weights", "ltr=1", "--num_train_epochs", 40, "--learning_rate", 0.03
        )
    )
    assert {"config.json", "model.safetensors", "results.json", "reward_items.safetensors"} <= set(contents(folder))
    assert not (folder / "checkpoints").exists()
    assert not list(folder.glob("*.bin"))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.objectives == ["ltr", "viewed"]
    assert model.config.score_weights == {"ltr": 1.0}
    odd, even = ["m1", "m3", "m5", "m7"], ["m2", "m4", "m6", "m8"]
    liked, disliked = model.reward([odd] * 2, [odd, even])
    assert liked > disliked
    results = json.loads((folder / "results.json").read_text())
    values = {row["name"]: row["value"] for row in results["rows"]}
    assert values["onerec_reward/ltr/auc"] > 0.5 == values["base_rate/ltr/auc"]
    assert values["test/ltr/positives"] > 0
    assert "logistic_regression/viewed/auc" in values
    assert results["command"].startswith("onerec-hf reward --impressions")
    assert "onerec_reward" in done.out
    assert "relative_log_loss" in done.out


def test_the_card_runs_and_shows_the_baselines(impressions, tmp_path):
    folder = tmp_path / "judge"
    succeeded(reward(impressions, folder))
    card = (folder / "README.md").read_text()
    rows = {row["name"]: row["value"] for row in json.loads((folder / "results.json").read_text())["rows"]}
    for model in ("base_rate", "logistic_regression", "onerec_reward"):
        assert f"| ltr | {plain_text(model)} | {rows[f'{model}/ltr/auc']:.4f} |" in card
    assert "onerec-hf reward --impressions" in card
    assert "1,600 impressions of 40 users." in card
    assert len(run_snippet(card)["rewards"]) == 1


def test_the_p_score_is_what_alignment_gets(impressions, tmp_path):
    folder = tmp_path / "judge"
    windows = ["--min_items", 2, "--max_items", 4]  # several a user
    options = ["--item_statistics", "true", "--pair_weight", 1, "--score_fusion", "p_score"]
    done = succeeded(reward(impressions, folder, *windows, *options, "--score_weights", "ltr=1", "viewed=3"))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert 0 < model.reward([["m1"]], [["m2", "m3"]])[0] < 1
    assert model.config.statistics_dim == 3  # impressions, likes, views
    assert model.item_statistics[1:].std(0).min() > 0
    assert "within_user_accuracy" in done.out
    values = {row["name"]: row["value"] for row in json.loads((folder / "results.json").read_text())["rows"]}
    assert 0 < values["onerec_reward/score/within_user_accuracy"] < 1
    assert 0 < values["onerec_reward/ltr/within_user_accuracy"] < 1
    assert values["test/ltr/within_user_pairs"] > 0
    card = (folder / "README.md").read_text()
    assert "The reward is the P-Score" in card
    assert f"{values['onerec_reward/ltr/within_user_accuracy']:.4f}" in card
    assert "3 statistics of an earlier period per item" in card


def test_statistics_need_impressions_before_the_training_windows(impressions, tmp_path):
    times = ["--history_end", 0]
    refused(
        reward(impressions, tmp_path / "judge", "--item_statistics", "true", *times),
        "no impressions before the training",
    )


def test_an_objective_without_test_labels_ends_well(impressions, tmp_path):
    log = pd.read_csv(impressions)
    log.loc[log["timestamp"] >= 32, "liked"] = None
    log.to_csv(tmp_path / "late.csv", index=False)
    folder = tmp_path / "judge"
    done = succeeded(reward(tmp_path / "late.csv", folder))
    values = {row["name"]: row["value"] for row in json.loads((folder / "results.json").read_text())["rows"]}
    assert np.isnan(values["onerec_reward/ltr/auc"])
    assert values["onerec_reward/viewed/auc"] > 0
    assert "nan" in done.out


def test_without_features_there_is_no_regression(impressions, tmp_path):
    done = succeeded(reward(impressions, tmp_path / "judge", "--behaviour_dim", 0))
    assert "logistic_regression" not in done.out


@pytest.mark.parametrize(
    ("more", "fragments"),
    [
        (["--dataset", "kuairand-pure"], ["pass either --dataset", "or --impressions"]),
        (["--score_weights", "ltr"], ["--score_weights ltr: write NAME=NUMBER"]),
        (["--score_weights", "clicks=1"], ["score_weights names ['clicks']"]),
        (["--pooling", "max"], ["model options:"]),
        (["--embeddings", "vectors.npy"], ["--embeddings needs --items"]),
        (["--objectives", "ltr=loved"], ["loved"]),
    ],
)
def test_refuses(impressions, tmp_path, more, fragments):
    folder = tmp_path / "judge"
    refused(reward(impressions, folder, *more), *fragments)
    assert not folder.exists()


def test_periods_begin_at_iso_dates(impressions, tmp_path):
    log = pd.read_csv(impressions)
    log["timestamp"] = pd.to_datetime(log["timestamp"], unit="D", origin="2024-01-01").dt.strftime("%Y-%m-%d")
    log.to_csv(tmp_path / "dated.csv", index=False)
    times = {"history_end": "2024-01-11", "validation_start": "2024-01-26", "test_start": "2024-02-02T00:00:00Z"}
    objectives = ["ltr=liked", "viewed"]
    dated = load_feedback(impressions=tmp_path / "dated.csv", objectives=objectives, **times)
    whole = load_feedback(
        impressions=impressions, objectives=objectives, history_end=10, validation_start=25, test_start=32
    )
    for part in ("train", "validation", "test"):
        assert getattr(dated, part)["session"][:] == getattr(whole, part)["session"][:]
    refused(reward(impressions, tmp_path / "judge", "--test_start", "soon"), "--test_start soon", "2024-01-31")


def test_says_what_is_lacking(impressions, tmp_path):
    out = ["--output_dir", tmp_path / "judge"]
    refused(onerec("reward", *out), "pass either --dataset kuairand-pure")
    refused(
        onerec("reward", "--dataset", "movielens", *out),
        "the only data set with labelled impressions is kuairand-pure",
    )
    refused(onerec("reward", "--impressions", impressions, *out), "--impressions needs --objectives, --history_end")
