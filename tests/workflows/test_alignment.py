"""A reward model and an alignment in Python: the folders that the commands write."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from onerec_hf.data import ExampleSettings, prepare_log
from onerec_hf.workflows import (
    DataSettings,
    RewardDataSettings,
    align,
    load_dataset,
    load_feedback,
    train,
    train_reward,
)
from tests.cli.commands import contents, onerec, succeeded
from tests.workflows.conftest import TINY, options_of

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "tower_size": 4, "max_history": 4}
QUIET = {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}
REWARD = {**SMALL, **QUIET, "num_train_epochs": 10, "learning_rate": 0.03}
ALIGN = {**QUIET, "max_steps": 3, "num_candidates": 6, "dpo_ratio": 0.2, "bf16": False, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def impressions():
    """Every user sees 16 random items; odd ones are liked."""
    items = np.random.default_rng(0).integers(0, 40, (30, 16))
    rows = [(user, f"m{item}", step) for user, seen in enumerate(items) for step, item in enumerate(seen)]
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    return table.assign(liked=table["item_id"].str[1:].astype(int) % 2)


PERIODS = {"objectives": ["ltr=liked"], "history_end": 4, "validation_start": 8, "test_start": 12, "min_items": 2}


@pytest.fixture(scope="module")
def reward(impressions, tmp_path_factory):
    feedback = load_feedback(impressions=impressions, max_history=4, **PERIODS)
    return train_reward(feedback, output_dir=tmp_path_factory.mktemp("reward") / "python", **REWARD)


def results(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return comparable({row["name"]: row["value"] for row in rows})


def comparable(values):
    """Without the time; what has no value (NaN) equals itself."""
    return {name: None if value != value else value for name, value in values.items() if name != "seconds"}


def assert_same_weights(first, second, kind):
    mine, theirs = (dict(kind.from_pretrained(folder).named_parameters()) for folder in (first, second))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_a_reward_model_is_that_of_the_command(impressions, reward, tmp_path):
    table = tmp_path / "impressions.csv"
    impressions.to_csv(table, index=False)
    folder = tmp_path / "command"
    options = options_of({"impressions": table, **PERIODS, **REWARD})
    done = succeeded(onerec("reward", *options, "--output_dir", folder))
    assert contents(reward.folder).keys() == contents(folder).keys()
    assert results(reward.folder) == results(folder)
    assert "ltr" in done.out
    assert_same_weights(reward.folder, folder, AutoModelForSequenceClassification)
    assert comparable(reward.metrics) == results(folder)
    assert reward.model.config.objectives == ["ltr"]
    again = train_reward(
        RewardDataSettings(impressions=str(table), **PERIODS), output_dir=tmp_path / "settings", **REWARD
    )
    assert results(again.folder) == results(folder)


def test_an_alignment_is_that_of_the_command(files, tables, reward, tmp_path):
    dataset = load_dataset(**tables)
    trained = train(dataset, output_dir=tmp_path / "model", **TINY)
    settings = {**ALIGN, "model": str(trained.folder), "reward": [str(reward.folder)], "max_examples": 40}
    aligned = align(dataset, output_dir=tmp_path / "python", **settings)
    options = options_of({**files, **settings})
    done = succeeded(onerec("align", *options, "--output_dir", tmp_path / "command"))
    assert contents(aligned.folder).keys() == contents(tmp_path / "command").keys()
    assert contents(aligned.folder)["pairs/pairs.parquet"] == contents(tmp_path / "command")["pairs/pairs.parquet"]
    assert results(aligned.folder) == results(tmp_path / "command")
    assert_same_weights(aligned.folder, tmp_path / "command", AutoModelForSeq2SeqLM)
    metrics = aligned.metrics
    assert metrics["before/onerec/recall@10"] == trained.metrics["onerec/recall@10"]
    assert f"{metrics['reward/before']:.4f} -> {metrics['reward/after']:.4f}" in done.out
    logs = [row for row in aligned.trainer.state.log_history if "watched/reward" in row]
    assert [row["step"] for row in logs] == [0, 1, 2, 3]
    assert all(0 < row["watched/variety"] <= 1 and 0 <= row["watched/recall@10"] <= 1 for row in logs)
    page = (aligned.folder / "training_report.html").read_text(encoding="utf-8")
    for title in ("Loss", "Margin of the pairs", "Reward", "Recall and variety"):
        assert f"<h2>{title}</h2>" in page
    history = [["m1", "m2"]]
    assert aligned.model.recommend(**aligned.processor(history), num_beams=4).shape[0] == 1


def test_shards_are_aligned_on(files, reward, tmp_path):
    prepared = tmp_path / "prepared"
    prepare_log(files["interactions"], prepared, settings=ExampleSettings(), num_shards=4, rows_per_bucket=60)
    dataset = load_dataset(prepared=str(prepared))
    trained = train(dataset, output_dir=tmp_path / "model", **TINY)
    settings = {**ALIGN, "model": str(trained.folder), "reward": [str(reward.folder)], "evaluate": False}
    for count, folder in ((40, tmp_path / "some"), (None, tmp_path / "all")):
        aligned = align(dataset, output_dir=folder, max_examples=count, **settings)
        rows = pd.read_parquet(folder / "pairs" / "pairs.parquet")["row"]
        assert len(rows)
        assert rows.max() < (count or len(dataset.train))
        assert aligned.model.recommend(**aligned.processor([["m1", "m2"]]), num_beams=4).shape[0] == 1


def test_align_has_the_errors_of_the_command(reward, tmp_path):
    data, out = DataSettings(), {"output_dir": tmp_path / "out", **QUIET}
    for options, message in (
        ({}, "pass --model: the folder or Hub id of a trained OneRec"),
        ({"model": "x"}, "pass either --reward, .* or --preferences"),
        (
            {"model": "x", "reward": [str(reward.folder)], "judge": [str(reward.folder)]},
            "is also a --reward; pass a held-out reward",
        ),
        ({"model": str(tmp_path / "absent"), "reward": ["x"]}, "--model .*absent: there is no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            align(data, **options, **out)
    with pytest.raises(ValueError, match="--impressions needs --objectives, --history_end"):
        load_feedback(RewardDataSettings(impressions="x.csv"))
    assert not (tmp_path / "out").exists()
