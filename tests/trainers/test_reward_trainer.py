"""RewardTrainer, its metrics and the baselines beside it."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score
from transformers import TrainerCallback

from onerec_hf import OneRecForSessionReward, OneRecRewardConfig, RewardItems
from onerec_hf.baselines.session_reward import predict_baseline, session_features
from onerec_hf.evaluation.reward_metrics import calibration_error, concordance, log_loss, reward_metrics
from onerec_hf.modeling.modeling_onerec_reward import masked_bce, within_user_loss
from onerec_hf.trainers import RewardTrainer, RewardTrainingArguments
from tests.rounding import BACKWARD, assert_close, close

GENRES, PER_GENRE = 4, 10
NUM_ITEMS = GENRES * PER_GENRE


def synthetic(n: int, seed: int) -> Dataset:
    """
    vtr: the share of the session's items in the genre of the user's history (needs history and session together); ltr: whether one
    rare item stands in the session; the latter is missing in every third row.
    """
    rng = np.random.default_rng(seed)
    made = {"history": [], "session": [], "labels": []}
    for i in range(n):
        genre = rng.integers(GENRES)
        history = genre * PER_GENRE + rng.integers(PER_GENRE, size=rng.integers(1, 6))
        session = rng.choice(NUM_ITEMS, rng.integers(3, 6), replace=False)
        liked = float(7 in session or 23 in session)
        made["history"].append(history.tolist())
        made["session"].append(session.tolist())
        made["labels"].append([float((session // PER_GENRE == genre).any()), None if i % 3 == 0 else liked])
    return Dataset.from_dict(made)


def make_model(**config) -> OneRecForSessionReward:
    torch.manual_seed(0)
    settings = {"num_items": NUM_ITEMS, "objectives": ["vtr", "ltr"], "base_rates": [0.66, 0.2], "hidden_size": 16}
    settings |= {"intermediate_size": 32, "num_attention_heads": 2, "tower_size": 16, "dropout_rate": 0.0}
    model = OneRecForSessionReward(OneRecRewardConfig(**{**settings, "initializer_range": 0.3, **config}))
    model.set_items(RewardItems(range(NUM_ITEMS)))
    return model


def arguments(folder, **settings) -> RewardTrainingArguments:
    defaults = {"per_device_train_batch_size": 32, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return RewardTrainingArguments(str(folder), **{**defaults, "logging_strategy": "no", "seed": 0, **settings})


@pytest.mark.slow
def test_a_learnable_signal_is_learned_and_stays_calibrated(tmp_path):
    model = make_model()
    train, held_out = synthetic(3000, 1), synthetic(600, 2)
    settings = {"num_train_epochs": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 64}
    trainer = RewardTrainer(model, arguments(tmp_path, **settings), train, held_out)
    before = trainer.evaluate()
    assert before["eval_vtr/auc"] == 0.5  # base rates for all
    assert before["eval_vtr/relative_log_loss"] == close(1.0)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_vtr/auc"] > 0.9
    assert after["eval_ltr/auc"] > 0.9
    assert after["eval_vtr/relative_log_loss"] < 0.7
    assert after["eval_vtr/calibration_error"] < 0.1
    assert after["eval_ltr/positives"] == sum(row["labels"][1] == 1 for row in held_out)
    # The signal needs the history: the same sessions for other users are ranked no better than by chance allows.
    shuffled = held_out.add_column("other", held_out["history"][1:] + held_out["history"][:1])
    shuffled = shuffled.remove_columns("history").rename_column("other", "history")
    assert trainer.evaluate(shuffled)["eval_vtr/auc"] < 0.7


def test_sessions_without_labels_are_predicted(tmp_path):
    model, held_out = make_model(), synthetic(50, 3)
    trainer = RewardTrainer(model, arguments(tmp_path, per_device_eval_batch_size=7), None, held_out)
    sessions = held_out.remove_columns("labels")
    found = trainer.predict(sessions)
    assert found.label_ids is None
    assert not any("auc" in name or "loss" in name for name in found.metrics)
    assert_close(torch.as_tensor(found.predictions).sigmoid(), model.predict(sessions["history"], sessions["session"]))
    assert (found.predictions == trainer.predict(held_out).predictions).all()
    with pytest.raises(ValueError, match=r"no column 'labels'.* call predict\(\)"):
        trainer.evaluate(sessions)
    with pytest.raises(ValueError, match="no column 'session'"):
        trainer.predict(sessions.remove_columns("session"))


def test_evaluation_is_that_of_predict(tmp_path):
    model, held_out = make_model(), synthetic(50, 3)
    with torch.no_grad():
        model.towers[0].out_proj.weight.normal_(0, 0.1)
    found = RewardTrainer(model, arguments(tmp_path, per_device_eval_batch_size=7), None, held_out).evaluate()
    p = model.predict(held_out["history"], held_out["session"]).numpy()
    labels = np.array(held_out["labels"][:], dtype=np.float64)
    wanted = reward_metrics(labels, p, model.config.objectives, model.config.base_rates)
    assert {name: found[f"eval_{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-4)


def of_users(n: int, seed: int) -> Dataset:
    """[`synthetic`] sessions of users with two or three each."""
    made = synthetic(n, seed)
    return made.add_column("user_id", [f"u{i // 3 if i % 5 else i}" for i in range(n)])


@pytest.mark.parametrize("fusion", ["lift", "p_score"])
def test_training_adds_the_pairs_within_users(tmp_path, fusion):
    model = make_model(score_fusion=fusion)
    with torch.no_grad():
        for head in [*model.towers, *([model.p_score] if model.p_score else [])]:
            head.out_proj.weight.normal_(0, 0.1)
    rows = of_users(12, 3)
    trainer = RewardTrainer(model, arguments(tmp_path, pair_weight=2.5), rows, rows)
    batch = trainer.data_collator(list(rows))
    users = batch["users"]
    assert (
        len(set(zip(users.tolist(), rows["user_id"], strict=True))) == len(set(rows["user_id"])) == len(users.unique())
    )
    out = model(**batch)
    labels = batch["labels"]
    pairs = within_user_loss(out.logits, labels, users)
    plain = masked_bce(out.logits, labels)
    if fusion == "p_score":
        label = model.p_score.labels(labels)
        pairs = pairs + within_user_loss(out.p_score_logits[:, None], label, users)
        plain = plain + masked_bce(out.p_score_logits[:, None], label)
    assert pairs > 0
    assert_close(trainer.compute_loss(model.train(), dict(batch)), plain + 2.5 * pairs)
    assert trainer.evaluate()["eval_loss"] == close(plain.item())  # the evaluation's loss does not depend on batches
    one, other = ([*trainer._get_train_sampler()] for _ in range(2))
    assert one == other
    assert sorted(one) == list(range(12))
    order = [rows["user_id"][row] for row in one]
    assert sum(a != b for a, b in pairwise(order)) == len(set(order)) - 1  # users stay together


def test_evaluation_reports_the_accuracy_within_users(tmp_path):
    model, rows = make_model(), of_users(40, 3)
    with torch.no_grad():
        model.towers[0].out_proj.weight.normal_(0, 0.1)
    p, right = model.predict(rows["history"][:], rows["session"][:])[:, 0].tolist(), []
    for i in range(40):
        for j in range(40):
            if rows[i]["user_id"] == rows[j]["user_id"] and rows[i]["labels"][0] > rows[j]["labels"][0]:
                right.append((p[i] > p[j]) + 0.5 * (p[i] == p[j]))
    trainer = RewardTrainer(model, arguments(tmp_path, per_device_eval_batch_size=7), None, {"held": rows})
    assert trainer.evaluate()["eval_held_vtr/within_user_accuracy"] == pytest.approx(np.mean(right))
    assert not any("within" in name for name in trainer.evaluate(rows.remove_columns("user_id")))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def test_resuming_equals_no_interruption(tmp_path):
    train = of_users(96, 1)
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4, "pair_weight": 1.0}
    whole = RewardTrainer(make_model(dropout_rate=0.1), arguments(tmp_path / "whole", **settings), train)
    whole.train()
    part = arguments(tmp_path / "part", **settings)
    RewardTrainer(make_model(dropout_rate=0.1), part, train, callbacks=[StopAt(4)]).train()
    checkpoint = str(tmp_path / "part" / "checkpoint-4")
    resumed = RewardTrainer(checkpoint, part, train)
    assert resumed.model.items.item_ids == list(range(NUM_ITEMS))
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == whole.state.global_step == 9
    for (name, one), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    train, models = synthetic(32, 1), []
    for batch, steps in ((32, 1), (8, 4)):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = RewardTrainer(make_model(), arguments(tmp_path, optim="sgd", max_grad_norm=0, **settings), train)
        trainer.train()
        models.append(trainer.model)
    assert_close(models[1].state_dict(), models[0].state_dict(), terms=BACKWARD)


def test_what_cannot_be_trained_is_said(tmp_path):
    bare = OneRecForSessionReward(OneRecRewardConfig(num_items=3))
    with pytest.raises(ValueError, match="set_items"):
        RewardTrainer(bare, arguments(tmp_path))
    with pytest.raises(ValueError, match="no column 'labels'"):
        RewardTrainer(make_model(), arguments(tmp_path), synthetic(3, 0).remove_columns("labels"))
    wrong = Dataset.from_dict({"history": [[1]], "session": [[2]], "labels": [[0.5]]})
    with pytest.raises(ValueError, match="1 labels per row"):
        RewardTrainer(make_model(), arguments(tmp_path), wrong)
    with pytest.raises(ValueError, match="pair_weight must be a finite number"):
        arguments(tmp_path, pair_weight=-1.0)
    with pytest.raises(ValueError, match="calibration_bins"):
        arguments(tmp_path, calibration_bins=0)


def test_metrics_agree_with_scikit_learn_and_brute_force():
    rng = np.random.default_rng(0)
    p = rng.random(400).round(2)  # with ties
    y = (rng.random(400) < p).astype(float)
    assert concordance(y, p) == pytest.approx(roc_auc_score(y, p))
    assert log_loss(y, np.clip(p, 0.01, 0.99)) == pytest.approx(sklearn_log_loss(y, np.clip(p, 0.01, 0.99)))
    rates = rng.integers(0, 6, 60) / 5
    pairs = [(i, j) for i in range(60) for j in range(60) if rates[i] > rates[j]]
    brute = np.mean([(p[i] > p[j]) + 0.5 * (p[i] == p[j]) for i, j in pairs])
    assert concordance(rates, p[:60]) == pytest.approx(brute)
    assert np.isnan(concordance([1, 1], [0.2, 0.4]))
    assert calibration_error(y, p) < 0.1 < calibration_error(y, p**3)


def test_logistic_regression_on_soft_labels_is_calibrated_and_ranks():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 3))
    rate = 1 / (1 + np.exp(-x[:, 0]))
    labels = np.stack([rng.binomial(5, rate) / 5, np.full(2000, np.nan)], axis=1)
    labels[::2, 1] = 0  # an objective without positives: its base rate
    predicted = predict_baseline("logistic_regression", x, labels, x)
    assert concordance(labels[:, 0], predicted[:, 0]) > 0.75
    assert predicted[:, 0].mean() == pytest.approx(labels[:, 0].mean(), abs=1e-3)
    assert not predicted[:, 1].any()
    with pytest.raises(ValueError, match="kind must be base_rate or logistic_regression"):
        predict_baseline("forest", x, labels, x)


def test_session_features_by_hand():
    features = np.array([[1.0, 0.0], [3.0, 2.0]])
    made = session_features(features, [np.array([], dtype=int), np.array([1, 1])], [np.array([0, 1]), np.array([0])])
    assert made[0, :7].tolist() == [2, 1, 0, 0, 0, 0, 2]
    assert made[1, :7].tolist() == [1, 0, 3, 2, 3, 0, 1]


def test_pairs_need_users(tmp_path):
    with pytest.raises(ValueError, match=r"compares the sessions of a user.*no column 'user_id'"):
        RewardTrainer(make_model(), arguments(tmp_path, pair_weight=1.0), synthetic(8, 1))


def test_accuracy_within_users_is_that_of_the_rows_in_any_order_of_training(tmp_path):
    rows = synthetic(60, 1)
    rows = rows.add_column("user_id", [place // 4 for place in range(60)])
    rows = rows.add_column("length", [len(history) for history in rows["history"]])
    model = make_model()
    with torch.no_grad():
        for tower in model.towers:
            tower.out_proj.weight.normal_(0, 0.5)
    found = []
    for strategy in ("random", "group_by_length"):
        args = arguments(
            tmp_path, train_sampling_strategy=strategy, remove_unused_columns=False, per_device_eval_batch_size=4
        )
        found.append(RewardTrainer(model, args, rows, rows).evaluate()["eval_vtr/within_user_accuracy"])
    assert found[0] == found[1]
