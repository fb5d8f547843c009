"""Training by rewards: they rise, ranks and resumes change nothing, adapters and references."""

import numpy as np
import pytest
import torch
from peft import LoraConfig

from tests.conftest import make_model
from tests.ranks import on_ranks
from tests.rounding import BACKWARD, assert_close, distance
from tests.trainers.grpo import CATALOGUE, PROCESSOR, by_hand, examples, likes, make_trainer, rollouts_of, weights_of


def mean_reward(model):
    histories = examples()["history"][:]
    out = model.eval().recommend(**PROCESSOR(histories), num_beams=4, num_return_sequences=4, exclude=histories)
    sessions = PROCESSOR.batch_decode(out)
    return float(np.mean(likes(sessions, sessions)))


@pytest.mark.parametrize("loss_type", ["ecpo", pytest.param("gbpo", marks=pytest.mark.slow)])
def test_training_raises_the_reward(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, loss_type=loss_type, max_steps=40, ntp_weight=0.05, logging_steps=10)
    before = mean_reward(trainer.model)
    trainer.train()
    assert mean_reward(trainer.model) > before + 0.5
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert rewards[-1] > rewards[0] + 0.25  # a step of a few users, while `before` is of all


# In the middle of a rollout, also in a later epoch.
@pytest.mark.parametrize("stop", [pytest.param(3, marks=pytest.mark.slow), 7])
def test_resume_equals_no_interruption(tmp_path, stop):
    settings = {"max_steps": 9, "steps_per_generation": 2, "num_iterations": 2, "gradient_accumulation_steps": 1}
    settings |= {"save_strategy": "steps", "save_steps": stop, "dataset": examples(4), "rollouts": "sample"}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 9
    for name, value in weights_of(whole.model).items():
        assert torch.equal(weights_of(resumed.model)[name], value), name


def one_step(folder, **settings):
    trainer = make_trainer(folder, max_steps=1, **settings)
    trainer.train()
    return {name: value.numpy() for name, value in weights_of(trainer.model).items()}


# A group per rank, and a group that two ranks share.
@pytest.mark.parametrize("count", [pytest.param(8, marks=pytest.mark.slow), 16])
def test_two_ranks_step_as_one_process(tmp_path, count):
    settings = {"num_generations": count, "optim": "sgd", "learning_rate": 0.1}
    wanted = one_step(str(tmp_path), per_device_train_batch_size=16, ntp_batch_size=4, **settings)
    first, second = on_ranks(2, run_on_rank, str(tmp_path), settings, timeout=600)
    as_tensors = [{name: torch.from_numpy(value) for name, value in each.items()} for each in (first, second, wanted)]
    assert_close(as_tensors[0], as_tensors[2], BACKWARD)
    assert distance(as_tensors[0], as_tensors[1]) == 0
    start = weights_of(make_model(CATALOGUE, seed=1))
    assert distance(as_tensors[2], start) > 1e-2


def run_on_rank(folder, settings):
    return one_step(folder, per_device_train_batch_size=8, ntp_batch_size=2, **settings)


def test_a_checkpoint_without_the_rollouts_is_refused(tmp_path):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, save_only_model=True, **settings).train()
    trainer = make_trainer(tmp_path, **{**settings, "max_steps": 2})
    with pytest.raises(ValueError, match=r"checkpoint-1 holds no .* it was saved with save_only_model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_models_with_an_item_head_train_with_recomputed_layers(tmp_path):
    head = {"num_items": 20, "loss_weight": 1.0}
    model = make_model(CATALOGUE, seed=1, item_head=head, encoder_pools_items=True, encoder_is_causal=True)
    model.generation_config.item_score_weight = 1.0  # of rankings, not of the policy
    trainer = make_trainer(tmp_path, model=model, activation_checkpointing=True, num_iterations=2, max_steps=2)
    batch = rollouts_of(trainer)
    session = PROCESSOR.batch_decode(batch["completion_ids"][1, :1])[0]
    wanted = by_hand(model.eval(), examples()[1]["history"], session)
    assert_close(batch["old_per_token_logps"][1, 0, [1, 2, 3, 5, 6, 7]], wanted)
    trainer.train()


def test_lora_trains_the_adapter_alone(tmp_path):
    model = make_model(CATALOGUE, seed=1)
    before = weights_of(model)
    trainer = make_trainer(
        tmp_path, model=model, peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), beta=0.01
    )
    trainer.train()
    base = trainer.model.get_base_model()
    after = {name.replace(".base_layer", ""): v for name, v in base.state_dict().items() if "lora" not in name}
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert any(bool(v.abs().max() > 0) for name, v in base.state_dict().items() if "lora_B" in name)


def test_evaluation_draws_the_same_sessions_each_time(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=examples(3), num_generations_eval=4)
    metrics = [trainer.evaluate() for _ in range(2)]
    assert metrics[0]["eval_reward"] == metrics[1]["eval_reward"]
    assert metrics[0]["eval_rollouts/legal"] == 1


@pytest.mark.parametrize("head", [{"dropout": 0.5}, {"dropout": 0.5, "loss_weight": 1.0}])
def test_disabled_dropout_is_that_of_the_item_head_too(tmp_path, head):
    model = make_model(CATALOGUE, seed=1, item_head={"num_items": 20, **head})
    trainer = make_trainer(tmp_path, model=model, ntp_weight=0.0)
    batch = rollouts_of(trainer)
    parts = [
        torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], -1).flatten(0, 1) for name in ("ids", "mask")
    ]
    length = batch["completion_ids"].shape[-1]
    assert trainer.model.training
    first, second = (trainer._get_per_token_logps_and_entropies(trainer.model, *parts, length)[0] for _ in range(2))
    assert torch.equal(first, second)
