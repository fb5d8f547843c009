"""Policy optimisation of models with features: what is drawn is scored with the same features, and what was not positive may be drawn again."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from onerec_hf import OneRecProcessor
from onerec_hf.modeling.features import Feature, FeatureSchema
from onerec_hf.trainers import OneRecGRPOConfig, OneRecGRPOTrainer
from tests.conftest import make_model
from tests.rounding import assert_close, distance
from tests.trainers import grpo
from tests.trainers.grpo import CATALOGUE

SCHEMA = FeatureSchema(
    user=(Feature("city", values=("Rome", "Paris")),),
    interaction=(Feature("positive", values=("0", "1")), Feature("like", values=("0", "1"))),
    item=(Feature("year", edges=(1990.0,)),),
)
ITEMS = SCHEMA.encode_items([{"year": 1985 + i} for i in range(20)])
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, 3, SCHEMA, ITEMS)
QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}


def row(history, city="Rome", likes=(), refused=(), session=("m1",)):
    entries = [{"item": item, "positive": item not in refused, "like": item in likes} for item in history]
    return {
        "history": list(history),
        "session": list(session),
        "history_positive": [item not in refused for item in history],
        "user_features": SCHEMA.encode_users([{"city": city}])[0].tolist(),
        "history_features": SCHEMA.encode_interactions(entries).flatten().tolist(),
    }


# The first four have the same items, and different features each.
ROWS = [
    row(["m3", "m4"]),
    row(["m3", "m4"], "Paris"),
    row(["m3", "m4"], likes=["m4"]),
    row(["m3", "m4"], refused=["m3"]),
    row(["m5", "m6", "m7", "m8", "m9"], "Paris", refused=["m5", "m9"]),  # longer than what the encoder reads
    row([f"m{i}" for i in range(16)], likes=["m10"], refused=[f"m{i}" for i in range(15)]),
]


def make(seed=1):
    model = make_model(
        CATALOGUE, seed=seed, features={**SCHEMA.config(), "not_positive": SCHEMA.not_positive, "dim": 6}
    )
    torch.manual_seed(1)
    model.model.encoder.features.table.weight.data[1:].normal_(std=0.5)
    return model


def likes(histories, sessions):
    return [float(sum(int(item[1:]) < 10 for item in session)) for session in sessions]


def make_trainer(folder, rewards=likes, dataset=None, **settings):
    defaults = {"per_device_train_batch_size": 16, "num_generations": 4, "learning_rate": 3e-3, "max_steps": 2}
    return OneRecGRPOTrainer(
        make(),
        rewards,
        OneRecGRPOConfig(str(folder), **{**defaults, **QUIET, "ntp_batch_size": 3, "num_iterations": 2, **settings}),
        Dataset.from_list(ROWS * 2) if dataset is None else dataset,
        processing_class=PROCESSOR,
    )


def inputs_of(example, session=None):
    given = {name: [example[name]] for name in ("user_features", "history_features")}
    return PROCESSOR([example["history"]], None if session is None else [session], **given)


def by_hand(model, example, session):
    """(codes,) log-probabilities of one session, from a forward of one row; positive items of the history are left out."""
    had = [item for item, kept in zip(example["history"], example["history_positive"], strict=True) if kept]
    return grpo.by_hand(model, had, session, inputs=inputs_of(example, session)).detach()


@pytest.mark.parametrize("how", ["distinct", "sample"])
def test_sessions_are_drawn_and_scored_with_the_features(tmp_path, how):
    trainer = make_trainer(tmp_path, rollouts=how, num_generations=8)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    # The order in which TRL hands over rows: a group, then the next one.
    batch = trainer._generate_and_score_completions([each for each in ROWS for _ in range(8)])
    assert batch["feature_ids"].shape == (6, 8, 17, SCHEMA.slots)
    assert trainer._feature_ids is None
    drawn_again = False
    for group, example in enumerate(ROWS):
        sessions = PROCESSOR.batch_decode(batch["completion_ids"][group])
        one = trainer.model.recommend(
            **inputs_of(example),
            num_beams=8,
            num_return_sequences=8,
            do_sample=True,
            generator=[trainer._random(group, example["history"], "train")],
            exclude=[[m for m, kept in zip(example["history"], example["history_positive"], strict=True) if kept]],
        )
        if how == "distinct":
            assert sessions == PROCESSOR.batch_decode(one)
        for slot, session in enumerate(sessions):
            old = batch["old_per_token_logps"][group, slot, [1, 2, 3, 5, 6, 7]]
            assert_close(old, by_hand(make(), example, session))
            drawn_again |= bool(set(session) & set(example["history"]))
    assert drawn_again  # an item that was not positive
    # With the codes of another row, the probabilities are others: nothing above is true of every feature.
    other = {**ROWS[0], "user_features": ROWS[1]["user_features"]}
    session = PROCESSOR.batch_decode(batch["completion_ids"][0])[0]
    assert float((by_hand(make(), ROWS[0], session) - by_hand(make(), other, session)).abs().max()) > 1e-3
    loss = trainer._compute_loss(trainer.model, batch)  # ratios of 1: the policy has not moved
    assert torch.isfinite(loss)


def test_the_policy_trains_with_features_and_resumes(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "beta": 0.1}
    whole = make_trainer(tmp_path / "whole", **settings)
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.train()
    after = whole.model.state_dict()
    table = "model.encoder.features.table.weight"
    assert not torch.equal(before[table], after[table])
    assert distance(before, after) > 1e-3
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))  # in the middle of a rollout
    for name, value in after.items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_free_sessions_and_logged_samples_read_features(tmp_path):
    free = make_trainer(tmp_path, constrained=False, rollouts="sample", rollout_length=1)
    free.model.train()
    batch = free._generate_and_score_completions([each for each in ROWS[:4] for _ in range(4)])
    for group, example in enumerate(ROWS[:4]):
        for slot, tokens in enumerate(batch["completion_ids"][group]):
            with torch.no_grad():
                logits = make()(**inputs_of(example), decoder_input_ids=tokens[None, :3]).logits[0]
            wanted = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
            assert_close(batch["old_per_token_logps"][group, slot, [1, 2, 3]], wanted)
    logged = Dataset.from_list([{**row(["m3", "m4"], refused=["m3"], session=["m3"]), "advantage": 1.0}] * 16)
    trainer = make_trainer(tmp_path, None, logged, loss_type="gbpo", learning_rate=1e-2)
    before = by_hand(make(), logged[0], ["m3"]).sum()
    trainer.train()
    assert (
        trainer.state.log_history[-1]["rollouts/left_out"] == 0
    )  # an item that was not positive is no item of the history
    assert by_hand(trainer.model.eval(), logged[0], ["m3"]).sum() > before + 0.05


def test_rewards_read_positive_histories(tmp_path):
    seen = []

    def reward(histories, sessions, **columns):
        seen.extend(histories)
        return np.zeros(len(sessions)).tolist()

    trainer = make_trainer(tmp_path, reward)
    trainer._generate_and_score_completions([ROWS[4]] * 4 + [ROWS[0]] * 4)
    assert seen == [["m6", "m7", "m8"]] * 4 + [["m3", "m4"]] * 4


@pytest.mark.parametrize("name", ["user_features", "history_features"])
def test_missing_columns_are_refused_before_training(tmp_path, name):
    with pytest.raises(ValueError, match=f"lack the column '{name}'"):
        make_trainer(tmp_path, dataset=Dataset.from_list(ROWS * 2).remove_columns(name))
