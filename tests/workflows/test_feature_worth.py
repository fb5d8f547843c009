"""Training with features as a workflow: the artefact, evaluation, training on, alignment, and what each feature is worth."""

import json

import numpy as np
import pandas as pd
import pytest

from onerec_hf import OneRecProcessor
from onerec_hf.workflows import align, evaluate, load_dataset, train
from onerec_hf.workflows.auto import Statistics, choose
from onerec_hf.workflows.features import feature_worth

SETTINGS = {"preset": "auto", "use_cpu": True, "report_to": "none", "disable_tqdm": True, "verdict_sasrec": False}
FEATURES = {"user_features": ["town"], "item_features": ["genre"], "interaction_features": ["hint", "noise"]}


def tables(users=70, length=9, seed=0):
    """Interactions whose `hint` says which half of the items the next positive one is of: a planted leak. All else says nothing."""
    random = np.random.default_rng(seed)
    items, like = random.integers(0, 24, (users, length)), random.random((users, length)) < 0.8
    hints = np.zeros((users, length), int)
    for place in range(length - 2, -1, -1):
        following = items[:, place + 1] >= 12
        hints[:, place] = np.where(like[:, place + 1], following, hints[:, place + 1])
    columns = {"user_id": np.repeat(np.arange(users), length), "item_id": items.ravel(), "hint": hints.ravel()}
    columns |= {"like": like.ravel().astype(int), "noise": random.integers(0, 4, users * length)}
    columns["timestamp"] = np.tile(np.arange(length), users) * 7200 + 10**9
    return {
        "interactions": pd.DataFrame(columns),
        "users": pd.DataFrame({"user_id": range(users), "town": random.integers(0, 3, users)}),
        "items": pd.DataFrame(
            {"item_id": range(24), "title": [f"film {i}" for i in range(24)], "genre": ["x", "y"] * 12}
        ),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Tables, and a training with features whose histories hold all interactions."""
    made, folder = tables(), tmp_path_factory.mktemp("trained") / "model"
    options = {"positive": ["like>=1"], "history_feedback": "all", "min_item_interactions": 2, **FEATURES}
    return made, train(**made, **options, **SETTINGS, max_steps=70, output_dir=str(folder))


def test_the_planted_leak_is_worth_most(trained):
    _, result = trained
    worth = {name: value for name, value in result.metrics.items() if name.startswith("feature_worth/")}
    names = ("user/town", "item/genre", "interaction/hint", "interaction/noise", "interaction/positive")
    assert worth.keys() == {f"feature_worth/{name}" for name in names}
    first, *others = sorted(worth, key=lambda name: -worth[name])
    assert first == "feature_worth/interaction/hint"
    assert worth[first] > 0.08 > 3 * max(worth[name] for name in others)
    rows = json.loads((result.folder / "results.json").read_text())["rows"]
    assert {row["name"]: row["value"] for row in rows if "worth" in row["name"]} == worth


def test_measuring_it_changes_nothing(trained):
    made, result = trained
    data = load_dataset(**made, model=str(result.folder))
    before = result.processor.item_features.copy()
    found = feature_worth(result.trainer, data, result.trainer.args.seed)
    assert {f"feature_worth/{each.side}/{each.name}": each.loss for each in found}.items() <= result.metrics.items()
    assert (result.processor.item_features == before).all()


def test_the_card_names_the_features_and_their_worth(trained):
    card = (trained[1].folder / "README.md").read_text()
    assert (
        "| features | of users town; of interactions hint, noise, positive; of items genre; each of width 32 |" in card
    )
    assert card.index("| hint | interactions |") < card.index("| town | users |")


def test_the_artefact_is_evaluated_and_trained_on_with_its_features(trained, tmp_path):
    made, result = trained
    processor = OneRecProcessor.from_pretrained(result.folder)
    assert processor.features == result.processor.features
    again = evaluate(model=str(result.folder), **made)  # the options are the model's
    assert again.metrics["onerec/ndcg@10"] == pytest.approx(result.metrics["onerec/ndcg@10"])
    more = train(**made, **SETTINGS, model=str(result.folder), max_steps=3, output_dir=str(tmp_path / "more"))
    assert more.processor.features == processor.features
    assert more.model.config.features.not_positive == processor.features.not_positive


def test_a_model_with_features_is_aligned(trained, tmp_path):
    made, result = trained
    pairs = [{"history": [1, 2], "chosen": [3, 4], "rejected": [15, 16]}] * 8
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    aligned = align(
        **made, model=str(result.folder), preferences=str(path), output_dir=str(tmp_path / "aligned"), max_steps=2, use_cpu=True,
        report_to="none",
    )  # fmt: skip
    assert aligned.metrics["before/onerec/ndcg@10"] == pytest.approx(result.metrics["onerec/ndcg@10"])
    assert OneRecProcessor.from_pretrained(tmp_path / "aligned").features == result.processor.features


def test_only_positive_interactions_are_excluded_and_evidence(trained):
    made, result = trained
    data = load_dataset(**made, model=str(result.folder))
    example = next(each for each in data.test if not all(each["history_positive"][-10:]))
    columns = {name: [example[name]] for name in ("user_features", "history_features")}
    inputs = result.processor([example["history"]], **columns)
    kept = example["history"][-result.processor.max_history :]
    flags = example["history_positive"][-len(kept) :]
    found = result.model.history_indices(inputs["input_ids"], inputs["feature_ids"])[0].tolist()
    items = result.processor.catalogue.indices(kept).tolist()
    assert found == [-1, *(item if flag else -1 for item, flag in zip(items, flags, strict=True))]


def test_a_refit_has_the_features_too(tmp_path):
    options = {"positive": ["like>=1"], "min_item_interactions": 2, **FEATURES, **SETTINGS}
    result = train(
        **tables(30), **options, max_steps=3, refit=True, baselines=False, output_dir=str(tmp_path / "model")
    )
    assert result.processor.features.config()["user"][0][0] == "town"
    assert OneRecProcessor.from_pretrained(tmp_path / "model").features == result.processor.features


def test_auto_sets_sizes_of_features_only_where_there_are_some():
    def chosen(features):
        rows = choose(Statistics(users=9_000, items=2_000, interactions=60_000, per_user=(4, 19), features=features))
        return {row.option: row.value for row in rows if row.option.startswith("feature_")}

    assert chosen(0) == {}
    assert chosen(9) == {"feature_dim": 32, "feature_dropout": 0.2, "feature_user_at_items": True}
