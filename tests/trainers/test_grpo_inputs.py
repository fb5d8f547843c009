"""What OneRecGRPOTrainer is given: rewards, settings, histories and models, right and wrong."""

import functools
import logging
import math

import numpy as np
import pytest
from datasets import Dataset

from onerec_hf import (
    OneRecForSessionReward,
    OneRecProcessor,
    OneRecRewardConfig,
    RewardItems,
)
from onerec_hf.modeling.features import Feature, FeatureSchema
from tests.conftest import make_model
from tests.trainers.grpo import (
    CATALOGUE,
    examples,
    likes,
    make_lazy,
    make_trainer,
    rollouts_of,
)


def test_rewards_that_do_not_apply_are_left_out(tmp_path):
    def of_some(histories, sessions):
        return [None if place % 2 else value for place, value in enumerate(likes(histories, sessions))]

    trainer = make_trainer(tmp_path, of_some)
    batch = rollouts_of(trainer)
    assert bool((batch["advantages"][:, 1::2] == 0).all())
    assert trainer._metrics["train"]["rollouts/left_out"] == [0.5]
    trainer = make_trainer(tmp_path, lambda histories, sessions: [None] * len(sessions))
    batch = rollouts_of(trainer)
    assert bool((batch["advantages"] == 0).all())
    assert trainer._metrics["train"]["rollouts/left_out"] == [1.0]
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [1.0]


def test_equal_rewards_give_no_gradient_and_are_counted(tmp_path):
    trainer = make_trainer(tmp_path, lambda histories, sessions: [0.1] * len(sessions), ntp_weight=0.0)
    batch = rollouts_of(trainer)
    assert bool((batch["advantages"] == 0).all())
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [1.0]
    trainer._compute_loss(trainer.model, batch).backward()
    assert all(float(each.grad.abs().max()) == 0 for each in trainer.model.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda sessions: [math.nan] * len(sessions), "16 not finite"),
        (lambda sessions: [math.inf] + [0.0] * (len(sessions) - 1), "1 not finite"),
        (lambda sessions: [1e20] + [0.0] * (len(sessions) - 1), "1 not finite, or 1e[+]18 and above"),
        (lambda sessions: [0.0] * (len(sessions) - 1), "16 sessions, got 15"),
        (lambda sessions: 1.0, "one finite number, or None, per session; got 1.0"),
        (lambda sessions: None, "per session; got None"),
        (lambda sessions: ["good"] * len(sessions), r"per session; got \['good'"),
        (lambda sessions: np.zeros((len(sessions), 2)), "per session; got array"),
    ],
)
def test_wrong_rewards_are_refused(tmp_path, values, message):
    trainer = make_trainer(tmp_path, lambda histories, sessions: values(sessions))
    with pytest.raises(ValueError, match=message):
        rollouts_of(trainer)


def test_reward_functions_get_further_columns_and_names(tmp_path):
    seen = {}

    def of_kind(histories, sessions, **columns):
        seen.update(columns)
        return [0.0] * len(sessions)

    dataset = examples(24, kind=list(range(24)))
    trainer = make_trainer(tmp_path, [of_kind, likes, likes], dataset=dataset, reward_weights=[1.0, 2.0, 0.5])
    rollouts_of(trainer, list(dataset)[:2])
    assert seen == {"kind": [0] * 8 + [1] * 8}
    assert trainer.reward_func_names == ["of_kind", "likes", "likes_2"]


def reward_model(items):
    config = OneRecRewardConfig(num_items=len(items), objectives=["ltr"], base_rates=[0.5], hidden_size=16)
    model = OneRecForSessionReward(config)
    model.set_items(RewardItems(items))
    return model


def test_reward_models_and_their_paths_score(tmp_path):
    reward_model(CATALOGUE.item_ids).save_pretrained(tmp_path / "mine")
    trainer = make_trainer(tmp_path, [str(tmp_path / "mine"), reward_model(CATALOGUE.item_ids)], max_steps=1)
    assert trainer.reward_func_names == ["mine", "reward"]
    trainer.train()
    assert "rewards/mine/mean" in trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": None}, "neither reward_funcs nor"),
        ({"rewards": reward_model(["m0", "other"])}, "lacks 19 of the catalogue's 20"),
        ({"num_generations": 1}, "num_generations=1.*at least 2"),
        ({"dataset": examples().remove_columns("session")}, r"lacks \['session'\] for the next-token loss"),
        ({"dataset": examples().remove_columns("history")}, "lacks the column 'history'"),
        (
            {"dataset": Dataset.from_list([{"history": ["gone"], "session": ["m1"]}] * 9)},
            "not in the model's catalogue",
        ),
        (
            {"dataset": Dataset.from_list([{"history": ["m1"], "session": ["gone"]}] * 9)},
            "not in the model's catalogue",
        ),
        ({"dataset": examples(2), "per_device_train_batch_size": 32}, "2 histories are fewer than the 4"),
        ({"dataset": examples(3, advantage=[1.0, math.nan, None])}, "1 of 2 values of 'advantage'"),
        ({"dataset": examples(3, advantage=["good"] * 3)}, "3 of 3 values of 'advantage'"),
        (
            {"dataset": Dataset.from_list([{"history": ["m1"], "session": ["m2"]}] * 8 + [{"history": ["m1"]}])},
            "'session' is empty in 1 of 9 rows",
        ),
        (
            {"dataset": Dataset.from_list([{"history": ["m1"], "session": ["m2"]}] * 8 + [{"session": ["m2"]}])},
            "'history' is empty in 1 of 9 rows",
        ),
        (
            {
                "dataset": Dataset.from_list([{"history": ["m1"], "session": ["gone"], "advantage": 1.0}] * 9),
                "ntp_weight": 0.0,
            },
            "not in the model's catalogue",
        ),
        ({"constrained": False}, 'pass rollouts="sample"'),
        ({"top_k": 5}, "top_k does not apply"),
        ({"loss_type": "ppo"}, "loss_type must be one of"),
        ({"delta": 1.5}, "ecpo_delta"),
        ({"temperature": 0.0}, "temperature"),
        ({"reward_weights": [1.0, 2.0]}, "reward weights"),
    ],
)
def test_bad_settings_have_one_clear_error(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


def test_sessions_whose_items_left_the_catalogue_are_counted(tmp_path, caplog):
    processor = OneRecProcessor.from_catalogue(CATALOGUE.retire(["m3", "m4"]), max_history=3)
    rows = [{"history": ["m3", "m1"], "session": [item, "m5"]} for item in ["m2", "m3"] * 8]
    logging.getLogger("onerec_hf").setLevel(logging.WARNING)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, dataset=Dataset.from_list(rows), processor=processor, max_steps=1)
    assert "8 of 16 sessions are left out of the next-token loss" in caplog.text
    assert {tuple(session) for session in trainer._ntp_rows["session"]} == {("m2", "m5")}
    trainer.train()
    with pytest.raises(ValueError, match="no row for the next-token loss"):
        make_trainer(tmp_path, dataset=Dataset.from_list(rows[1::2] * 2), processor=processor)
    # Samples of it are counted at each step.
    logged = Dataset.from_list([{**row, "advantage": 1.0} for row in rows])
    trainer = make_trainer(tmp_path, None, logged, processor=processor, ntp_weight=0.0, num_generations=2)
    batch = rollouts_of(trainer, list(logged.select(range(2))))
    assert batch["tool_mask"].sum(-1).flatten().tolist() == [6, 0]
    assert trainer._metrics["train"]["rollouts/left_out"] == [0.5]


def test_histories_with_too_few_items_left_are_counted(tmp_path, caplog):
    rows = list(examples(24))
    rows[3]["history"] = CATALOGUE.item_ids[:19]
    logging.getLogger("onerec_hf").setLevel(logging.WARNING)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, dataset=Dataset.from_list(rows))
    assert len(trainer.train_dataset) == 23


def test_fewer_legal_sessions_than_asked_for_are_left_out(tmp_path):
    rows = [{"history": CATALOGUE.item_ids[:17], "session": ["m19"]}] * 24
    trainer = make_trainer(tmp_path, dataset=Dataset.from_list(rows), rollout_length=1)
    batch = rollouts_of(trainer, rows[:2])
    assert batch["tool_mask"].sum(-1).flatten().tolist() == ([3] * 3 + [0] * 5) * 2
    assert trainer._metrics["train"]["rollouts/left_out"] == [5 / 8]
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    assert all(bool(each.grad.isfinite().all()) for each in trainer.model.parameters() if each.grad is not None)


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (
            functools.partial(make_model, CATALOGUE),
            {"features": FeatureSchema(user=(Feature("age", edges=(30.0,)),)).config()},
            "have different features",
        ),
        (functools.partial(make_model, CATALOGUE), {"lifelong": {"queries": 4}}, "does not read lifelong histories"),
        (make_lazy, {"lifelong": {"queries": 4}}, "does not read lifelong histories"),
    ],
    ids=["features", "lifelong", "lazy lifelong"],
)
def test_models_that_it_does_not_align_are_refused(tmp_path, make, config, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model=make(**config))
