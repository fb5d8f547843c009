"""Iterative preference alignment: pairs from rewards, a reference that follows, and a model that gets what the reward asks for."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from onerec_hf import OneRecProcessor
from onerec_hf.trainers import OneRecDPOConfig, OneRecDPOTrainer
from onerec_hf.trainers.pair_selection import best_worst, one_against, random_pair, top_k_pairs
from tests.conftest import make_catalogue, make_model
from tests.ranks import torchrun
from tests.rounding import BACKWARD, assert_close, close

CATALOGUE = make_catalogue(20, (4, 4, 4), seed=1)
LIKED = {f"m{i}" for i in range(5)}


def likes(histories, sessions):
    """How many items of a session are among the first five."""
    assert len(histories) == len(sessions)
    return [float(sum(item in LIKED for item in session)) for session in sessions]


def examples(count=24):
    rng = np.random.default_rng(0)
    names = np.array(CATALOGUE.item_ids)
    return Dataset.from_list(
        [
            {
                "history": rng.choice(names, 3, replace=False).tolist(),
                "session": rng.choice(names, 2, replace=False).tolist(),
            }
            for _ in range(count)
        ]
    )


def make_trainer(folder, rewards=likes, dataset=None, callbacks=None, select=None, **settings):
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-3,
        "dpo_ratio": 0.5,
        "num_candidates": 8,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }
    return OneRecDPOTrainer(
        make_model(CATALOGUE, seed=1),
        rewards,
        args=OneRecDPOConfig(str(folder), **{**defaults, **settings}),
        train_dataset=examples() if dataset is None else dataset,
        processing_class=OneRecProcessor.from_catalogue(CATALOGUE),
        callbacks=callbacks,
        selection=select,
    )


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.integers(0, 9))
def test_selections_prefer_the_larger_reward(rewards, seed):
    rewards = np.array(rewards)
    for select in (best_worst, random_pair, top_k_pairs(3)):
        pairs = select(rewards, np.random.default_rng(seed))
        assert all(rewards[chosen] >= rewards[rejected] for chosen, rejected in pairs)
    assert rewards[best_worst(rewards, np.random.default_rng(0))[0][0]] == rewards.max()
    assert len(top_k_pairs(3)(rewards, np.random.default_rng(0))) == min(3, len(rewards) // 2)


def test_pairs_are_the_best_and_worst_of_the_models_own_candidates(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.begin_iteration(0)
    pairs = trainer.pairs
    assert len(set(pairs["row"])) == len(pairs) <= 12
    processor, model = trainer.processing_class, trainer.model
    for pair in pairs:
        out = model.recommend(
            **processor([pair["history"]]), num_beams=8, num_return_sequences=8, exclude=[pair["history"]]
        )
        sessions = processor.batch_decode(out)
        rewards = likes([pair["history"]] * 8, sessions)
        assert pair["chosen"] == sessions[int(np.argmax(rewards))]
        assert pair["rejected"] == sessions[int(np.argmin(rewards))]
        assert (pair["chosen_reward"], pair["rejected_reward"]) == (max(rewards), min(rewards))
        assert pair["iteration"] == 0
        assert pair["history"] == trainer._examples[pair["row"]]["history"]


@pytest.mark.parametrize("candidates", ["beam", "sample"])
def test_candidates_do_not_depend_on_who_shares_a_batch(tmp_path, candidates):
    tables = []
    for size in (1, 5, 12):
        trainer = make_trainer(tmp_path, candidates=candidates, draw_batch_size=size)
        trainer.begin_iteration(0)
        tables.append(trainer.pairs.to_list())
    assert tables[0] == tables[1] == tables[2]
    assert len(tables[0]) > 5


def test_loss_is_ntp_plus_lambda_times_dpo(tmp_path):
    trainer = make_trainer(tmp_path, dpo_weight=0.3, ntp_weight=2.0, beta=0.2)
    trainer.begin_iteration(0)
    # A policy that has left its reference.
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    rows = [row for row in trainer.train_dataset if row["row"] in trainer._pairs][:3]
    rows += [row for row in trainer.train_dataset if row["row"] not in trainer._pairs][:2]
    batch = trainer.data_collator(rows)
    trainer.model.eval()
    with torch.no_grad():
        loss = float(trainer._compute_loss(trainer.model, batch, False))
    processor = trainer.processing_class

    def log_probability(model, history, session):
        one = processor([history], sessions=[session])
        with torch.no_grad():
            return -float(model(**one, num_items_in_batch=1).loss)

    tokens = sum(len(row["session"]) * 3 for row in rows)
    ntp = -sum(log_probability(trainer.model, row["history"], row["session"]) for row in rows) / tokens
    dpo = []
    for row in rows[:3]:
        (pair,) = trainer._pairs[row["row"]]
        margin = 0.0
        for sign, side in ((1, "chosen"), (-1, "rejected")):
            for model, direction in ((trainer.model, 1), (trainer.ref_model, -1)):
                margin += sign * direction * log_probability(model, pair["history"], pair[side])
        dpo.append(float(np.log1p(np.exp(-0.2 * margin))))
    assert loss == close(2.0 * ntp + 0.3 * np.mean(dpo))


def test_alignment_raises_the_reward_of_what_is_generated(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=6, dpo_ratio=1.0, learning_rate=2e-3, beta=0.5, ntp_weight=0.1)
    histories = examples()["history"]
    processor = trainer.processing_class

    def mean_reward():
        out = trainer.model.recommend(**processor(histories), num_beams=4, num_return_sequences=4)
        sessions = processor.batch_decode(out)
        return float(np.mean(likes([None] * len(sessions), sessions)))

    before = mean_reward()
    trainer.train()
    after = mean_reward()
    assert after > before + 0.3
    logged = [entry for entry in trainer.state.log_history if "loss/dpo" in entry]
    assert {"loss/ntp", "rewards/accuracies"} <= logged[0].keys()
    counted = [entry["pairs/count"] for entry in trainer.state.log_history if "pairs/count" in entry]
    assert len(counted) == 6


def test_each_iteration_has_the_last_policy_as_reference_and_draws_anew(tmp_path):
    seen = []
    trainer = make_trainer(tmp_path, num_train_epochs=4, epochs_per_iteration=2)
    begin = trainer.begin_iteration

    def watched(iteration):
        policy = weights_of(trainer.model)
        begin(iteration)
        seen.append((iteration, trainer.pairs["chosen"], trainer.pairs["row"], policy, weights_of(trainer.ref_model)))

    trainer.begin_iteration = watched
    trainer.train()
    assert [iteration for iteration, *_ in seen] == [0, 0, 1, 1]
    for index in (0, 2):
        _, _, _, policy, reference = seen[index]
        assert all(torch.equal(policy[name], reference[name]) for name in policy)
    for index in (1, 3):  # the second epoch of an iteration keeps pairs and reference
        assert seen[index][1:3] == seen[index - 1][1:3]
        assert all(
            torch.equal(a, b) for a, b in zip(seen[index][4].values(), seen[index - 1][4].values(), strict=True)
        )
    assert seen[0][2] != seen[2][2]


@pytest.mark.parametrize("stop", [3, 4, 6])  # within an iteration, and at its end
def test_resume_equals_no_interruption(tmp_path, stop):
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": stop, "candidates": "sample"}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == whole.state.global_step == 12
    for name, value in weights_of(whole.model).items():
        assert torch.equal(weights_of(resumed.model)[name], value), name
    assert resumed.pairs.to_list() == whole.pairs.to_list()
    saved = json.loads((tmp_path / "whole" / f"checkpoint-{stop}" / "pairs.json").read_text())
    assert saved["iteration"] == (stop - 1) // 4
    assert not list((tmp_path / "whole").rglob("*.tmp"))


def test_offline_pairs_need_no_reward(tmp_path):
    rows = examples()
    rows = rows.add_column("chosen", [["m1", "m2"]] * len(rows)).add_column("rejected", [["m9", "m8"]] * len(rows))
    trainer = make_trainer(tmp_path, rewards=None, dataset=rows, beta=0.5, learning_rate=2e-3, num_train_epochs=3)
    trainer.train()
    accuracies = [entry["rewards/accuracies"] for entry in trainer.state.log_history if "rewards/accuracies" in entry]
    assert np.mean(accuracies[-3:]) > 0.8


def test_evaluation_is_the_next_token_loss(tmp_path):
    trainer = make_trainer(tmp_path)
    metrics = trainer.evaluate(examples(6))
    assert metrics["eval_loss"] > 0


def test_several_rewards_are_weighted_and_checked(tmp_path):
    def length(histories, sessions):
        return [len(session) for session in sessions]

    trainer = make_trainer(tmp_path, rewards=[likes, length], reward_weights=[2.0, -1.0])
    assert trainer.rewards([["m1"]] * 2, [["m0", "m9"], ["m9"]]).tolist() == [0.0, -1.0]
    with pytest.raises(ValueError, match=r"1 reward_weights for 2 reward functions; pass one weight per function"):
        make_trainer(tmp_path, rewards=[likes, length], reward_weights=[2.0])
    for wrong in (lambda histories, sessions: [1.0], lambda histories, sessions: [float("nan")] * len(sessions)):
        with pytest.raises(ValueError, match="must return one finite number per session"):
            make_trainer(tmp_path, rewards=wrong).begin_iteration(0)


def test_no_pair_trains_on_next_tokens_alone(tmp_path):
    trainer = make_trainer(tmp_path, min_margin=100.0, num_train_epochs=1)
    trainer.train()
    assert len(trainer.pairs) == 0
    assert all("loss/dpo" not in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dpo_ratio": 0.0}, r"dpo_ratio=0.0 must be in \(0, 1\]"),
        ({"candidates": "greedy"}, 'candidates must be "beam" or "sample"'),
        ({"selection": "worst"}, "selection must be one of"),
        ({"num_candidates": 1}, "num_candidates at least 2"),
        ({"sync_ref_model": True}, "sync_ref_model is not supported: the reference"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers must be 0"),
    ],
)
def test_refuses_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


def test_refuses_what_cannot_be_aligned(tmp_path):
    with pytest.raises(ValueError, match="neither reward_funcs nor columns chosen and rejected"):
        make_trainer(tmp_path, rewards=None)
    with pytest.raises(ValueError, match=r"lacks \['session'\]"):
        make_trainer(tmp_path, dataset=examples().remove_columns("session"))
    with pytest.raises(ValueError, match="reward_funcs must be functions, reward models or their paths"):
        make_trainer(tmp_path, rewards=3)


def test_histories_without_a_pair_and_short_of_candidates_are_counted(tmp_path, caplog):
    """Nobody is told apart by a constant reward; a catalogue of 20 items holds 17 sessions of one item for a history of three."""

    def constant(histories, sessions):
        return [1.0] * len(sessions)

    trainer = make_trainer(tmp_path, constant, num_candidates=32, candidate_length=1)
    with caplog.at_level("WARNING"):
        trainer.begin_iteration(0)
    assert "12 of 12 histories gave no pair" in caplog.text
    assert "12 had fewer than num_candidates=32" in caplog.text
    assert "this iteration trains on L_NTP only" in caplog.text
    assert (
        trainer._metrics["train"]["pairs/without"] == trainer._metrics["train"]["pairs/short_of_candidates"] == [12.0]
    )


def test_one_against_several_trains_s_dpo(tmp_path):
    trainer = make_trainer(tmp_path, select=one_against(3), loss_type="s_dpo", num_train_epochs=1, dpo_ratio=1.0)
    trainer.begin_iteration(0)
    assert len(trainer.pairs) > 0
    for pair in trainer.pairs:
        assert len(pair["rejected"]) == 3
        assert pair["chosen"] not in pair["rejected"]
        assert pair["chosen_reward"] == likes([[]], [pair["chosen"]])[0]
        assert pair["rejected_reward"] == max(likes([[]] * 3, pair["rejected"])) < pair["chosen_reward"]
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss/dpo" in entry)
    assert first["loss/dpo"] == close(np.log(4))


def test_one_row_is_enough(tmp_path):
    trainer = make_trainer(tmp_path, dataset=examples(1), dpo_ratio=0.01)
    trainer.train()
    assert {pair["row"] for pair in trainer.pairs} <= {0}
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": ["m1", "x9"]}, r"1 of \d+ items of 'history' are not in the model's catalogue \(first: 'x9'\)"),
        ({"session": []}, r"'session' is empty in 1 of 24 rows \(first: row 5\)"),
        ({"rejected": ["m1", "m2"]}, r"chosen equals rejected in 1 of 24 rows \(first: row 5\)"),
        ({"rejected": ["m1", "other"]}, r"items of 'rejected' are not in the model's catalogue \(first: 'other'\)"),
    ],
)
def test_refuses_rows_that_cannot_be_trained_on(tmp_path, change, message):
    rows = [{**row, "chosen": ["m1", "m2"], "rejected": ["m9", "m8"]} for row in examples()]
    rows[5].update(change)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rewards=None, dataset=Dataset.from_list(rows))


RANKS = """
import sys
from safetensors.torch import save_file
from onerec_hf.workflows.distributed import leave
from tests.trainers.test_onerec_dpo import RANK_SETTINGS, make_trainer, ragged

folder = sys.argv[1]
trainer = make_trainer(folder, dataset=ragged(), per_device_train_batch_size=3, **RANK_SETTINGS)
trainer.train()
trainer = make_trainer(folder, dataset=ragged(), per_device_train_batch_size=3, **RANK_SETTINGS)
trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
if trainer.is_world_process_zero():
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    save_file({name: value.clone() for name, value in state.items()}, f"{folder}/weights.safetensors")
    trainer.pairs.to_json(f"{folder}/pairs.jsonl")
del trainer
leave()
"""
# Few pairs: most steps have a rank with none.
RANK_SETTINGS = {
    "candidates": "sample",
    "dpo_ratio": 0.2,
    "optim": "sgd",
    "learning_rate": 0.05,
    "save_strategy": "steps",
    "save_steps": 3,
    "beta": 0.5,
}


def ragged():
    """Sessions of one item and of two, so that ranks hold different numbers of tokens."""
    return Dataset.from_list(
        [{**row, "session": row["session"][: 1 + place % 2]} for place, row in enumerate(examples())]
    )


@pytest.mark.slow
def test_two_ranks_draw_and_train_as_one(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = torchrun(script, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = make_trainer(tmp_path / "alone", dataset=ragged(), **RANK_SETTINGS)
    alone.train()
    assert len(alone.pairs) > 0
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for theirs, mine in zip(pairs, alone.pairs, strict=True):
        assert theirs == mine
    steps = alone.state.global_step
    assert_close(load_file(tmp_path / "weights.safetensors"), alone.model.state_dict(), terms=steps * BACKWARD)


def test_a_history_of_every_item_gives_no_pair(tmp_path):
    whole = {"history": list(CATALOGUE.item_ids), "session": ["m1", "m2"]}
    rows = Dataset.from_list([*examples(6).to_list(), whole])
    trainer = make_trainer(tmp_path, dataset=rows, dpo_ratio=1.0)
    trainer.begin_iteration(0)
    assert 6 not in trainer.pairs["row"]
    assert trainer._metrics["train"]["pairs/without"][0] >= 1
