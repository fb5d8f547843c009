"""Guards of an alignment: what they stop at, the weights they keep, resumes, ranks and bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset

from onerec_hf import OneRecProcessor
from onerec_hf.trainers import OneRecDPOConfig, OneRecDPOTrainer, OneRecGRPOConfig, OneRecGRPOTrainer
from onerec_hf.trainers.callbacks import LastStepCallback
from onerec_hf.trainers.guards import GuardOptions, Verdict, guard, variety_reward, verdict
from tests.conftest import make_catalogue, make_model
from tests.ranks import on_ranks

CATALOGUE = make_catalogue(30, (4, 4, 4))
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=5)
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
EXAMPLES = Dataset.from_list(
    [
        {"history": [f"m{i % 30}", f"m{(i + 1) % 30}"], "session": [f"m{(i + 2) % 30}", f"m{(i + 3) % 30}"]}
        for i in range(24)
    ]
)
HELD_OUT = EXAMPLES.select(range(6))
FREE = {"max_ntp_rise": -1.0, "max_variety_drop": 1.0, "guard_patience": 0}


def late(histories, sessions):
    return [sum(int(item[1:]) for item in session) / 100 for session in sessions]


class Falling:
    """A judge that is less content at every measurement."""

    __name__ = "falling"

    def __init__(self):
        self.calls = 0

    def __call__(self, histories, sessions):
        self.calls += 1
        return [-float(self.calls)] * len(sessions)


def trainer_of(kind, folder, judge=late, model=None, **settings):
    model = model or make_model(CATALOGUE)
    shared = {"max_steps": 6, "learning_rate": 3e-3, "guard_measurements": 6, "save_strategy": "no", **QUIET}
    if kind == "grpo":
        shared |= {"per_device_train_batch_size": 8, "num_generations": 4, "ntp_batch_size": 4}
        args = OneRecGRPOConfig(str(folder), **{**shared, **settings})
        trainer = OneRecGRPOTrainer
    else:
        shared |= {"per_device_train_batch_size": 8, "num_candidates": 4, "dpo_ratio": 0.5, "num_train_epochs": 2}
        args = OneRecDPOConfig(str(folder), **{**shared, **settings})
        trainer = OneRecDPOTrainer
    return trainer(
        model,
        late,
        args=args,
        train_dataset=EXAMPLES,
        processing_class=PROCESSOR,
        judge_funcs=judge,
        guard_dataset=HELD_OUT,
    )


def weights(model):
    return {name: value.clone() for name, value in model.named_parameters()}


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def watched(trainer):
    return [row for row in trainer.state.log_history if "watched/judge" in row]


@pytest.mark.parametrize(
    ("rows", "limits", "best", "stop"),
    [
        ([(0.0, 1.0, 0.5)], {}, 0, None),
        ([(0.0, 1.0, 0.5), (0.1, 1.0, 0.5), (0.05, 1.0, 0.5)], {}, 1, None),
        ([(0.0, 1.0, 0.5), (0.1, 1.0, 0.5), (0.1, 1.0, 0.5), (0.05, 1.0, 0.5)], {}, 1, "judge is 0.05 after 0.1"),
        ([(0.0, 1.0, 0.5), (-0.1, 1.0, 0.5), (-0.2, 1.0, 0.5)], {}, 0, "guard_patience=2"),
        ([(0.0, 1.0, 0.5), (0.1, 1.0, 0.5), (0.2, 1.2, 0.5), (0.3, 1.2, 0.5)], {}, 1, "max_ntp_rise=0.1"),
        ([(0.0, 1.0, 0.5), (0.1, 1.2, 0.5), (0.2, 1.0, 0.5), (0.1, 1.0, 0.5)], {}, 2, None),
        (
            [(0.0, 1.0, 0.5), (0.1, 1.0, 0.41), (0.2, 1.0, 0.39), (0.3, 1.0, 0.3)],
            {},
            1,
            "variety fell from 0.5 to 0.3",
        ),
        ([(0.0, 1.0, 0.5), (0.1, 9.0, 0.5), (0.2, 9.0, 0.1)], FREE, 2, None),
        ([(0.0, 1.0, 0.5), (0.1, 1.0, 0.5), (0.2, 1.0, 0.5)], {"max_kl": 1.5, "guard_patience": 1}, 1, "2 nats"),
    ],
)
def test_a_verdict_is_of_the_measurements(rows, limits, best, stop):
    rows = [
        {"step": step, "judge": judge, "ntp": ntp, "variety": variety, "kl": float(step)}
        for step, (judge, ntp, variety) in enumerate(rows)
    ]
    limits = {"guard_patience": 2, "max_ntp_rise": 0.1, **limits}
    found = verdict(rows, GuardOptions(**limits), "judge")
    assert found.best == best
    assert found.stop is stop is None or stop in found.stop


def test_without_a_judge_the_latest_weights_within_the_limits_are_kept():
    rows = [{"step": step, "ntp": ntp, "variety": 0.5} for step, ntp in enumerate([1.0, 1.1, 1.0, 2.0])]
    assert verdict(rows, GuardOptions(max_ntp_rise=0.05), None) == Verdict(2)
    assert verdict(rows, GuardOptions(max_ntp_rise=-1.0), None) == Verdict(3)


@pytest.mark.parametrize("kind", ["grpo", "dpo"])
def test_the_weights_of_the_best_measurement_are_kept(kind, tmp_path):
    seen = []

    def peak(histories, sessions):
        """A judge that turns after the third measurement."""
        seen.append(None)
        return [-abs(len(seen) - 4.0)] * len(sessions)

    trainer = trainer_of(kind, tmp_path / "guarded", peak, **{**FREE, "guard_patience": 2})
    trainer.train()
    assert [row["step"] for row in watched(trainer)] == [0, 1, 2, 3, 4, 5]
    assert trainer.state.global_step == 5
    limited = trainer_of(kind, tmp_path / "three", guards=False, max_steps=6)
    limited.add_callback(LastStepCallback(3))
    limited.train()
    assert len(watched(limited)) == 4
    assert same(weights(trainer.model), weights(limited.model))


def test_guards_that_nothing_passes_change_nothing_but_measure(tmp_path):
    guarded = trainer_of("grpo", tmp_path / "guarded", **FREE, max_kl=1e9)
    guarded.train()
    plain = trainer_of("grpo", tmp_path / "plain", guards=False)
    plain.train()
    rows = watched(guarded)
    assert [row["watched/judge"] for row in rows] == [row["watched/judge"] for row in watched(plain)]
    best = max(rows, key=lambda row: row["watched/judge"])
    if best["step"] == 6:
        assert same(weights(guarded.model), weights(plain.model))
    assert rows[0]["watched/kl"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["watched/kl"] > 0.001
    assert not list((tmp_path / "plain").glob("checkpoint-*"))


def test_a_guard_at_the_start_leaves_the_weights_and_says_so(tmp_path, caplog):
    model = make_model(CATALOGUE)
    before = weights(model)
    trainer = trainer_of("grpo", tmp_path, Falling(), model, **{**FREE, "guard_patience": 2})
    with caplog.at_level("WARNING"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert same(before, weights(trainer.model))
    told = [record.getMessage() for record in caplog.records if "guards" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("nothing was gained within the guards")


@pytest.mark.parametrize("kind", ["grpo", "dpo"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(kind, tmp_path):
    settings = {**FREE, "guard_patience": 3, "max_kl": 100.0, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(kind, tmp_path / "whole", **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for path in (tmp_path / "killed").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > 2:
            shutil.rmtree(path)
    # Paths in the state are of the folder that was copied.
    state = tmp_path / "killed" / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text().replace(f"{tmp_path}/whole", f"{tmp_path}/killed"))
    resumed = trainer_of(kind, tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint="last")
    assert watched(whole) == watched(resumed)
    assert same(weights(whole.model), weights(resumed.model))
    assert json.loads(state.read_text())["stateful_callbacks"]["GuardCallback"]["attributes"]["drawn"]


@pytest.mark.parametrize(
    ("kind", "last", "settings"),
    [
        ("grpo", 2, {"guard_measurements": 2, "save_steps": 2}),  # between two measurements
        ("grpo", 0, {"guard_measurements": 3, "save_steps": 10}),  # of the checkpoint before the first step
        pytest.param("dpo", 0, {"guard_measurements": 3, "save_steps": 10}, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumed_anywhere_measures_as_an_uninterrupted_one(kind, last, settings, tmp_path):
    settings = {**FREE, "max_kl": 100.0, "save_strategy": "steps", **settings}
    whole = trainer_of(kind, tmp_path / "whole", **settings)
    whole.train()
    for path in (tmp_path / "whole").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > last:
            shutil.rmtree(path)
    resumed = trainer_of(kind, tmp_path / "whole", **settings)
    resumed.train(resume_from_checkpoint="last")
    assert watched(resumed) == watched(whole)
    assert same(weights(whole.model), weights(resumed.model))


def run_on_rank(folder):
    trainer = trainer_of("grpo", folder, Falling(), per_device_train_batch_size=4, **{**FREE, "guard_patience": 3})
    trainer.train()
    best = trainer.state.best_model_checkpoint
    return (
        trainer.state.global_step,
        best,
        {name: value.detach().numpy() for name, value in weights(trainer.model).items()},
    )


@pytest.mark.slow
def test_ranks_decide_together(tmp_path):
    first, second = on_ranks(2, run_on_rank, str(tmp_path), timeout=300)
    assert first[:2] == second[:2]
    assert first[0] == 3
    assert all(np.array_equal(value, second[2][name]) for name, value in first[2].items())


def fail_on_rank(folder):
    def judge(histories, sessions):
        raise KeyError("an item that the judge does not know")

    try:
        trainer_of("grpo", folder, judge, per_device_train_batch_size=4).train()
    except (KeyError, ValueError) as error:
        return f"{type(error).__name__} {error}"


@pytest.mark.slow
def test_no_rank_waits_for_a_judge_that_failed(tmp_path):
    first, second = on_ranks(2, fail_on_rank, str(tmp_path), timeout=60)
    assert first.startswith("KeyError")
    assert "first rank could not measure held-out users: KeyError" in second


def test_held_out_users_that_cannot_be_measured_are_refused_before_training(tmp_path):
    def make(held_out):
        args = OneRecGRPOConfig(
            str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_steps=3, ntp_batch_size=2, **QUIET
        )
        return OneRecGRPOTrainer(
            make_model(CATALOGUE), late, args=args, train_dataset=EXAMPLES, processing_class=PROCESSOR, guard_dataset=held_out
        )  # fmt: skip

    with pytest.raises(ValueError, match="held-out users lack 'session'"):
        make(HELD_OUT.remove_columns("session"))
    with pytest.raises(ValueError, match="held-out sessions with items of the catalogue: none of 2"):
        make([{"history": ["m1"], "session": ["gone"]}] * 2)


def test_bad_input_has_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="judge_funcs score the sessions of held-out users: pass guard_dataset"):
        OneRecGRPOTrainer(
            make_model(CATALOGUE),
            late,
            args=OneRecGRPOConfig(
                str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_steps=1, ntp_batch_size=2, **QUIET
            ),
            train_dataset=EXAMPLES,
            processing_class=PROCESSOR,
            judge_funcs=late,
        )
    with pytest.raises(ValueError, match=r"must return one finite number, or None, per session.*6 not finite"):
        trainer_of("grpo", tmp_path, lambda histories, sessions: [float("nan")] * len(sessions)).train()
    with pytest.raises(ValueError, match=r"not finite.*leave the judge out"):
        trainer_of("grpo", tmp_path, lambda histories, sessions: [None] * len(sessions)).train()
    with pytest.raises(ValueError, match="max_variety_drop must be between 0 and 1"):
        OneRecGRPOConfig(str(tmp_path), max_variety_drop=20, **QUIET)
    with pytest.raises(ValueError, match="guard_measurements must be at least 1"):
        OneRecDPOConfig(str(tmp_path), guard_measurements=0, **QUIET)
    trainer = trainer_of("dpo", tmp_path, guards=False)
    trainer.args.guards = trainer.args.load_best_model_at_end = True
    with pytest.raises(ValueError, match="leave load_best_model_at_end out, or pass guards=False"):
        guard(trainer, HELD_OUT, late)


def test_the_variety_reward_prefers_what_few_users_get(tmp_path):
    histories = [["a"], ["b"], ["c"]]
    assert variety_reward(histories, [["x"], ["x"], ["x"]]) == [0, 0, 0]
    assert variety_reward(histories, [["x"], ["x"], ["y"]]) == [0.5, 0.5, 1]
    assert variety_reward([["a"], ["a"], ["b"]], [["x"], ["x"], ["y"]]) == [
        1,
        1,
        1,
    ]  # a user's own sessions do not count
    trainer = trainer_of("grpo", tmp_path, guards=False, variety_weight=2.0, max_steps=1, logging_strategy="steps")
    trainer.args.logging_steps = 1
    trainer.train()
    logged = trainer.state.log_history
    row = next(row for row in logged if "reward" in row)
    assert row["reward"] == pytest.approx(row["rewards/late/mean"] + 2 * row["rewards/variety_reward/mean"], abs=1e-5)
    dpo = trainer_of("dpo", tmp_path / "dpo", guards=False, variety_weight=100.0, max_steps=1)
    dpo.train()
    assert min(dpo.pairs["chosen_reward"]) > 10  # the bonus outweighs all else


def test_variety_is_no_reward_where_no_other_one_applies(tmp_path):
    def even(histories, sessions):
        return [None if int(session[0][1:]) % 2 else late([], [session])[0] for session in sessions]

    settings = {"per_device_train_batch_size": 16, "num_generations": 4, "ntp_batch_size": 4, "guards": False, **QUIET}
    args = OneRecGRPOConfig(str(tmp_path), max_steps=1, save_strategy="no", variety_weight=1.0, **settings)
    trainer = OneRecGRPOTrainer(
        make_model(CATALOGUE), even, args=args, train_dataset=EXAMPLES, processing_class=PROCESSOR
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions([row for row in EXAMPLES.select(range(4)) for _ in range(4)])
    sessions = PROCESSOR.batch_decode(batch["completion_ids"].flatten(0, 1))
    without = torch.tensor([bool(int(session[0][1:]) % 2) for session in sessions])
    assert without.any()
    assert not batch["advantages"].flatten()[without].any()
    assert trainer._metrics["train"]["rollouts/left_out"] == [without.float().mean().item()]


def test_an_interrupted_training_leaves_its_arguments(tmp_path):
    calls = []

    def judge(histories, sessions):
        calls.append(None)
        return [float("nan") if len(calls) > 1 else 1.0] * len(sessions)

    trainer = trainer_of("grpo", tmp_path, judge)
    with pytest.raises(ValueError, match="not finite"):
        trainer.train()
    assert not trainer.args.load_best_model_at_end
