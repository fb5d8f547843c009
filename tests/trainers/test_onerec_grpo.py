"""Policy optimisation: the policy is what draws, ECPO and GBPO have the papers' gradients, ranks and resumes change nothing, rewards rise."""

import functools
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from onerec_hf import (
    OneRecForSessionReward,
    OneRecProcessor,
    OneRecRewardConfig,
    OneRecV2Config,
    OneRecV2ForConditionalGeneration,
    RewardItems,
)
from onerec_hf.modeling.features import Feature, FeatureSchema
from onerec_hf.trainers import NonFiniteError, OneRecGRPOConfig, OneRecGRPOTrainer
from onerec_hf.trainers.onerec_grpo_config import LOSSES
from onerec_hf.trainers.policy_losses import gbpo_old_logps
from onerec_hf.trainers.rollouts import ROLLOUTS, code_places, roll_out, token_log_probs
from tests.conftest import make_catalogue, make_model
from tests.ranks import on_ranks
from tests.rounding import BACKWARD, assert_close, close, distance

CATALOGUE = make_catalogue(20, (4, 4, 4), seed=1)
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=3)
CODES = {item: tuple(codes) for item, codes in zip(CATALOGUE.item_ids, CATALOGUE.codes.tolist(), strict=True)}
LIKED = {f"m{i}" for i in range(5)}


def likes(histories, sessions):
    """How many items of a session are among the first five."""
    assert len(histories) == len(sessions)
    return [float(sum(item in LIKED for item in session)) for session in sessions]


def examples(count=24, **columns):
    rng = np.random.default_rng(0)
    names = np.array(CATALOGUE.item_ids)
    rows = []
    for row in range(count):
        history, session = rng.choice(names, 2 + row % 4, replace=False).tolist(), rng.choice(names, 2, replace=False)
        rows.append({"history": history, "session": session.tolist(), **{n: v[row] for n, v in columns.items()}})
    return Dataset.from_list(rows)


def make_trainer(folder, rewards=likes, dataset=None, model=None, peft_config=None, processor=PROCESSOR, **settings):
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "num_generations": 8,
        "learning_rate": 3e-3,
        "ntp_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }
    eval_dataset = settings.pop("eval_dataset", None)
    return OneRecGRPOTrainer(
        make_model(CATALOGUE, seed=1) if model is None else model,
        rewards,
        args=OneRecGRPOConfig(str(folder), **{**defaults, **settings}),
        train_dataset=examples() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=peft_config,
    )


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def rollouts_of(trainer, rows=None):
    """The batch of one step, as TRL hands it to the loss."""
    rows = list(examples(2)) if rows is None else rows
    count = trainer.num_generations
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as training sets it
    return trainer._generate_and_score_completions([row for row in rows for _ in range(count)])


def by_hand(model, history, session, temperature=1.0, constrained=True, exclude_seen=True, inputs=None):
    """(codes,) log-probabilities of a session's codes: a plain forward of one row, and the legal next codes looked up item by item."""
    inputs = PROCESSOR([history], [session]) if inputs is None else inputs
    logits = model(**inputs).logits[0] / temperature
    offsets, found = model.config.level_offsets, []
    left = {item for item in CODES if not (exclude_seen and item in history)}
    for place, item in enumerate(session):
        for level in range(3):
            scores = logits[place * 4 + level]
            token = CODES[item][level] + offsets[level]
            if constrained:
                below = {CODES[each][level] for each in left if CODES[each][:level] == CODES[item][:level]}
                tokens = sorted(code + offsets[level] for code in below)
                scores, token = scores[tokens], tokens.index(token)
            found.append(scores.log_softmax(-1)[token])
        left.discard(item)
    return torch.stack(found)


# -- the policy ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_that_sessions_were_drawn_with(tmp_path, temperature):
    trainer = make_trainer(tmp_path, temperature=temperature)
    model, rows = trainer.model, [row for row in examples(3) for _ in range(8)]
    histories = examples(3)["history"][:]
    drawn = model.recommend(
        **PROCESSOR(histories),
        num_beams=8,
        num_return_sequences=8,
        exclude=histories,
        do_sample=True,
        temperature=temperature,
        return_dict_in_generate=True,
    )
    whole = PROCESSOR([row["history"] for row in rows], max_history=9)  # longer than what the encoder reads
    turned = [torch.cat([mask[mask == 0], mask[mask == 1]]) for mask in whole["attention_mask"]]
    ids = [torch.cat([row[row == 0], row[row != 0]]) for row in whole["input_ids"]]  # TRL pads prompts on the left
    inputs = torch.cat([torch.stack(ids), drawn.sequences], 1)
    mask = torch.cat([torch.stack(turned), torch.ones_like(drawn.sequences)], 1)
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(model, inputs, mask, 8, batch_size=7)
    assert_close(logps.sum(1), drawn.sampling_scores)
    assert bool((logps[:, [0, 4]] == 0).all())  # BOS is given
    assert float(entropies.min()) >= 0
    for place, row in enumerate(rows):
        session = PROCESSOR.batch_decode(drawn.sequences[place : place + 1])[0]
        assert_close(logps[place, [1, 2, 3, 5, 6, 7]], by_hand(model, row["history"], session, temperature))


@pytest.mark.parametrize("how", ["sample", "free"])
def test_frequencies_of_drawn_sessions_are_their_probabilities(how):
    model, history = make_model(CATALOGUE, seed=1), ["m1", "m2"]
    generators, free = [torch.Generator().manual_seed(0)], how == "free"
    tokens = roll_out(
        model, PROCESSOR, [history], 4000, generators, "sample", 1.5, session_length=2, constrained=not free
    )
    assert tokens.shape == (4000, 8)
    assert bool((tokens[:, [0, 4]] == 1).all())
    if not free:
        sessions = PROCESSOR.batch_decode(tokens[:200])
        assert all(len(set(session) - set(history)) == 2 for session in sessions)
    # The two codes after the second BOS, given the most frequent first item.
    items, counts = tokens[:, 1:4].unique(dim=0, return_counts=True)
    common = items[counts.argmax()]
    following = tokens[(tokens[:, 1:4] == common).all(1)]
    one = PROCESSOR([history])
    decoder = torch.cat([torch.tensor([1]), common, torch.tensor([1, 0])])[None]
    logits = model(**one, decoder_input_ids=decoder[:, :5]).logits[0, -1] / 1.5
    if not free:
        first = CATALOGUE.ids(
            CATALOGUE.indices_of_codes(common[None] - torch.tensor(model.config.level_offsets)).numpy()
        )
        left = {CODES[item][0] + 4 for item in CODES if item not in {*history, *first}}
        logits = torch.where(torch.isin(torch.arange(len(logits)), torch.tensor(sorted(left))), logits, -math.inf)
    wanted = logits.softmax(-1)
    got = torch.bincount(following[:, 5], minlength=len(wanted)) / len(following)
    noise = (wanted * (1 - wanted) / len(following)).sqrt()
    assert bool(((got - wanted).abs() <= 5 * noise + 1e-6).all())


def test_free_policy_is_the_full_softmax(tmp_path):
    trainer = make_trainer(tmp_path, constrained=False, rollouts="sample", rollout_length=1)
    history, session = ["m1", "m2"], ["m3"]
    logits = trainer.model(**PROCESSOR([history], [session])).logits
    sequence = torch.cat([torch.tensor([[1]]), PROCESSOR([history], [session])["labels"]], 1)
    logps, _ = token_log_probs(logits, sequence, code_places(3, 4))
    assert_close(logps[0], by_hand(trainer.model, history, session, constrained=False))


@pytest.mark.parametrize("how", ROLLOUTS)
def test_rollouts_are_legal_and_do_not_depend_on_the_batch(how):
    model, histories = make_model(CATALOGUE, seed=1), examples(3)["history"][:]

    def draw(some):
        generators = [torch.Generator().manual_seed(len(history)) for history in some]
        return PROCESSOR.batch_decode(roll_out(model, PROCESSOR, some, 6, generators, how))

    sessions = draw(histories)
    for place, session in enumerate(sessions):
        assert len(set(session) - set(histories[place // 6])) == 2
    assert sessions[6:12] == draw(histories[1:2])
    if how != "sample":
        assert len({tuple(session) for session in sessions[:6]}) == 6


def test_encoder_runs_once_per_history(tmp_path):
    trainer, seen = make_trainer(tmp_path, steps_per_generation=2, ntp_weight=0.0, max_steps=2), []
    trainer.train()
    trainer.model.get_encoder().register_forward_hook(
        lambda module, args, kwargs, out: seen.append(len(out[0])), with_kwargs=True
    )
    batch = rollouts_of(trainer, list(examples(4)))
    assert seen[0] == 4  # drawing
    assert batch["prompt_ids"].shape[:2] == (4, 8)
    seen.clear()
    trainer._compute_loss(trainer.model, {name: v if v.dim() == 0 else v[2:] for name, v in batch.items()})
    assert seen == [2]


# -- the objectives --------------------------------------------------------------------------------------------------------------------
def objective(loss_type, now, old, advantage, epsilon=0.2, delta=0.1):
    """The papers' equations for one sample or token."""
    pi, fixed, before = now.exp(), now.detach().exp(), old.exp()
    if loss_type == "gbpo":
        bound = fixed if advantage >= 0 else 1 - fixed
        return pi / torch.maximum(before, bound) * advantage
    if loss_type == "ecpo" and advantage < 0:
        before = torch.maximum(fixed / (1 + epsilon + delta), before)
    ratio = pi / before
    return torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["ecpo", "gbpo", "grpo"])
def test_gradient_is_that_of_the_papers_equations(tmp_path, loss_type, level):
    if (loss_type, level) == ("grpo", "sequence"):
        level = "token"  # TRL's ratio of sequences is another one
    trainer = make_trainer(
        tmp_path, loss_type=loss_type, importance_sampling_level=level, num_iterations=2, ntp_weight=0.0
    )
    batch = rollouts_of(trainer)
    assert "old_per_token_logps" in batch
    # As if the policy had moved far in both directions, for good and bad sessions.
    torch.manual_seed(0)
    moved = 0.6 * torch.randn(2, 8, 1) * (batch["old_per_token_logps"] != 0)
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + moved
    batch["advantages"] = torch.tensor([[1.5, -1.5] * 4, [-0.5, -0.5, 0.5, 0.5] * 2])
    model, rows, total = trainer.model, list(examples(2)), 0.0
    trainer.model.zero_grad()
    loss = trainer._compute_loss(model, batch)
    loss.backward()
    got = {name: each.grad.clone() for name, each in model.named_parameters()}
    model.zero_grad()
    codes, ratios = [1, 2, 3, 5, 6, 7], []
    for group, row in enumerate(rows):
        for slot in range(8):
            session = PROCESSOR.batch_decode(batch["completion_ids"][group, slot : slot + 1])[0]
            now, advantage = by_hand(model, row["history"], session), float(batch["advantages"][group, slot])
            if level == "sequence":
                now, old = now.sum()[None], batch["old_per_token_logps"][group, slot]
            else:
                old = batch["old_per_token_logps"][group, slot, codes]
            ratios.append((now - old).exp().detach())
            total = total + objective(loss_type, now, old, advantage).mean()
    wanted = -total / 16
    assert float(torch.cat(ratios).min()) < 0.8
    assert float(torch.cat(ratios).max()) > 1.3
    assert loss.item() == close(wanted.item(), scale=1.0)
    wanted.backward()
    assert_close(got, {name: each.grad for name, each in model.named_parameters()}, BACKWARD)


def test_gradient_of_a_bad_sample_is_bounded_with_gbpo_alone():
    logit = torch.tensor([-2.0, -6.0, -12.0], requires_grad=True)
    now = torch.nn.functional.logsigmoid(logit)
    old = now.detach() - 10  # drawn when it was still less probable
    bad = torch.tensor([-1.0] * 3)
    (-((now - old).exp() * bad)).sum().backward(retain_graph=True)
    assert float(logit.grad.min()) > 1e4  # GRPO does not clip the ratio of a bad sample
    logit.grad = None
    (-((now - gbpo_old_logps(now, old, bad)).exp() * bad)).sum().backward()
    assert_close(logit.grad, logit.detach().sigmoid())  # that of binary cross-entropy


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_trains(tmp_path, loss_type):
    level = "sequence" if loss_type == "luspo" else "token"
    settings = {"importance_sampling_level": level, "num_iterations": 2, "max_steps": 2, "ntp_weight": 0.0}
    trainer = make_trainer(tmp_path, loss_type=loss_type, **settings)
    before = weights_of(trainer.model)
    trainer.train()
    assert distance(before, weights_of(trainer.model)) > 0
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_next_token_loss_is_added(tmp_path):
    losses, lengths = [], [1 + (row > 9) for row in range(24)]
    dataset = examples()
    dataset = dataset.remove_columns("session").add_column(
        "session", [session[:length] for session, length in zip(dataset["session"], lengths, strict=True)]
    )
    for weight in (0.0, 2.0):
        trainer = make_trainer(tmp_path, dataset=dataset, ntp_weight=weight)
        batch = rollouts_of(trainer)
        trainer.current_gradient_accumulation_steps = 2
        losses.append(sum(trainer._compute_loss(trainer.model, batch).item() for _ in range(2)))
    rows = dataset.select(np.random.default_rng((3, 0)).integers(24, size=8).tolist())
    assert len({sum(map(len, rows["session"][:4])), sum(map(len, rows["session"][4:]))}) == 2
    with torch.no_grad():
        ntp = float(trainer.model(**PROCESSOR(rows["history"][:], rows["session"][:])).loss)
    assert losses[1] - losses[0] == close(2.0 * ntp)
    assert np.mean(trainer._metrics["train"]["loss/ntp"]) == close(ntp)


def test_reference_is_off_by_default_and_a_frozen_copy_with_beta(tmp_path):
    assert make_trainer(tmp_path).ref_model is None
    trainer = make_trainer(tmp_path, beta=0.1, max_steps=3)
    before = weights_of(trainer.model)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-4
    after = weights_of(trainer.ref_model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


# -- training --------------------------------------------------------------------------------------------------------------------------
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


# -- free decoding ---------------------------------------------------------------------------------------------------------------------
def half_trained():
    """A model whose free sessions are legal now and then."""
    model, rows = make_model(CATALOGUE, seed=1), examples()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(12):
        model(**PROCESSOR(rows["history"][:], rows["session"][:])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_format_reward_is_added_for_k_legal_sessions_of_a_group(tmp_path):
    free = {"constrained": False, "rollouts": "sample", "rollout_length": 1, "scale_rewards": "none"}
    plain = rollouts_of(make_trainer(tmp_path, model=half_trained(), format_samples=0, **free))
    trainer = make_trainer(tmp_path, model=half_trained(), format_samples=5, format_weight=0.5, **free)
    batch = rollouts_of(trainer)
    assert torch.equal(batch["completion_ids"], plain["completion_ids"])
    items = PROCESSOR.item_indices(batch["completion_ids"].flatten(0, 1)).view(2, 8)
    added = batch["advantages"] - plain["advantages"]
    assert set(added.flatten().tolist()) <= {0.0, 0.5}
    assert bool((added[items < 0] == 0).all())
    picked = trainer._format_samples(16).view(2, 8)
    assert picked.sum(1).tolist() == [5, 5]
    assert torch.equal(added > 0, picked & (items >= 0))
    assert 0 < int((items >= 0).sum()) < 16
    assert trainer._metrics["train"]["rollouts/legal"] == [float((items >= 0).float().mean())]
    # Illegal sessions are left out of the rewards' mean.
    assert bool((plain["advantages"][items < 0] == 0).all())


def test_format_reward_raises_the_share_of_legal_items(tmp_path):
    free = {"constrained": False, "rollouts": "sample", "rollout_length": 1}
    trainer = make_trainer(tmp_path, model=half_trained(), max_steps=20, ntp_weight=0.0, **free)
    trainer.train()
    legal = [entry["rollouts/legal"] for entry in trainer.state.log_history if "rollouts/legal" in entry]
    assert np.mean(legal[-5:]) > np.mean(legal[:3]) + 0.2


# -- samples of another policy ---------------------------------------------------------------------------------------------------------
def test_logged_samples_need_no_reward_and_have_the_current_probability_as_old(tmp_path):
    dataset = examples(24, advantage=[1.0, -1.0, 0.0] * 8)
    rows = [row for row in dataset if not set(row["history"]) & set(row["session"])]
    settings = {"dataset": Dataset.from_list(rows), "loss_type": "gbpo", "ntp_weight": 0.0, "max_steps": 6}
    trainer = make_trainer(tmp_path, None, per_device_train_batch_size=4, num_generations=2, **settings)
    model = make_model(CATALOGUE, seed=1)
    batch = rollouts_of(trainer, rows[:4])
    assert batch["advantages"].flatten().tolist() == [row["advantage"] for row in rows[:4]]
    loss, wanted = trainer._compute_loss(trainer.model, batch), 0.0
    for row in rows[:4]:
        pi = by_hand(model, row["history"], row["session"]).exp().detach()
        ratio = {1: torch.ones_like(pi), 0: torch.zeros_like(pi), -1: pi / torch.maximum(pi, 1 - pi)}[row["advantage"]]
        wanted = wanted - float(ratio.mean()) * row["advantage"] / 4
    assert loss.item() == close(wanted, scale=1.0)
    trainer.train()
    changes = {1.0: [], -1.0: []}
    for row in rows:
        if row["advantage"]:
            before, after = (
                by_hand(each, row["history"], row["session"]).sum().item() for each in (model, trainer.model)
            )
            changes[row["advantage"]].append(after - before)
    assert np.mean(changes[1.0]) > 0.3 > np.mean(changes[-1.0])


def test_logged_and_drawn_samples_share_a_batch(tmp_path):
    rows = list(examples(2, advantage=[None, 0.7]))
    rows[1]["session"] = ["m19", "m18"]
    trainer = make_trainer(tmp_path, dataset=examples(24, advantage=[None, 0.7] * 12), num_iterations=2)
    batch = rollouts_of(trainer, rows)
    assert batch["off_policy"].tolist() == [[False] * 8, [True] * 8]
    assert batch["advantages"][1].tolist() == close([0.7] * 8)
    assert trainer._metrics["train"]["rollouts/left_out"] == [0.0]
    assert PROCESSOR.batch_decode(batch["completion_ids"][1]) == [["m19", "m18"]] * 8
    assert math.isfinite(trainer._compute_loss(trainer.model, batch).item())


def test_logged_samples_that_the_policy_cannot_draw_are_counted(tmp_path):
    rows = [{"history": ["m1"], "session": ["m1", "m2"], "advantage": 1.0}]
    rows += [{"history": ["m1"], "session": ["m3", "m3"], "advantage": 1.0}]
    rows += [{"history": ["m1"], "session": ["m2", "m3"], "advantage": 1.0}]
    trainer = make_trainer(
        tmp_path, None, dataset=Dataset.from_list(rows), per_device_train_batch_size=3, num_generations=3
    )
    batch = rollouts_of(trainer, rows)
    assert batch["tool_mask"].sum(-1).flatten().tolist() == [0, 0, 6]
    assert trainer._metrics["train"]["rollouts/left_out"] == close([2 / 3])


def make_lazy(**config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "decoder_layers": 2}
    model = OneRecV2ForConditionalGeneration(
        OneRecV2Config(codebook_sizes=CATALOGUE.codebook_sizes, session_length=2, **sizes, **config)
    )
    model.set_catalogue(CATALOGUE)
    return model


@pytest.mark.parametrize("constrained", [True, False])
def test_logged_samples_of_unequal_length_have_a_finite_loss_on_a_lazy_decoder(tmp_path, constrained):
    rows = [{"history": ["m1"], "session": ["m2", "m3"][: 1 + place % 2], "advantage": 1.0} for place in range(4)]
    settings = {"per_device_train_batch_size": 4, "num_generations": 2, "ntp_weight": 0.0, "loss_type": "gbpo"}
    settings |= {} if constrained else {"constrained": False, "rollouts": "sample"}
    trainer = make_trainer(tmp_path, None, Dataset.from_list(rows * 4), make_lazy(), **settings)
    loss = trainer._compute_loss(trainer.model, rollouts_of(trainer, rows[:2]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(bool(each.grad.isfinite().all()) for each in trainer.model.parameters() if each.grad is not None)


def test_a_nonfinite_loss_stops_with_its_sessions(tmp_path):
    model = make_model(CATALOGUE, seed=1)
    trainer = make_trainer(tmp_path, model=model, ntp_weight=0.0)
    model.model.decoder.norm.register_forward_hook(
        lambda module, args, out: out * math.nan if out.requires_grad else out
    )
    with pytest.raises(NonFiniteError, match="the examples are in") as raised:
        trainer.train()
    written = [json.loads(line) for line in Path(raised.value.path).read_text().splitlines()]
    histories = examples()["history"][:]
    assert len(written) == 16
    for row in written:
        assert row["history"] in histories
        assert len(set(row["session"]) - set(row["history"])) == 2


# -- bad input -------------------------------------------------------------------------------------------------------------------------
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
