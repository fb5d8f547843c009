"""The policy is what draws, free or constrained, and ECPO and GBPO have the papers' gradients."""

import math

import numpy as np
import pytest
import torch

from onerec_hf.trainers.onerec_grpo_config import LOSSES
from onerec_hf.trainers.policy_losses import gbpo_old_logps
from onerec_hf.trainers.rollouts import ROLLOUTS, code_places, roll_out, token_log_probs
from tests.conftest import make_model
from tests.rounding import BACKWARD, assert_close, close, distance
from tests.trainers.grpo import CATALOGUE, CODES, PROCESSOR, by_hand, examples, make_trainer, rollouts_of, weights_of


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
