"""A budget of time: the schedule and the training end where it ends."""

import json

import pytest
import torch

from onerec_hf.trainers import Budget, BudgetCallback
from onerec_hf.trainers.budget import duration
from tests.conftest import make_model
from tests.ranks import on_ranks
from tests.trainers.test_packed_training import CATALOGUE, PREFIXES, make_trainer


class Clock:
    """A clock that only the test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(Budget, "_now", lambda budget: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def timed_trainer(folder, clock, budget, seconds_per_step, **settings):
    """Steps take these seconds; returns the trainer and the learning rates of its steps."""
    defaults = {"packing": True, "per_device_train_batch_size": 2, "lr_scheduler_type": "linear", "learning_rate": 1.0}
    trainer = make_trainer(folder, PREFIXES, make_model(CATALOGUE, encoder_is_causal=True), **{**defaults, **settings})
    trainer.add_callback(budget)
    rates, step = [], trainer.training_step

    def training_step(*args, **kwargs):
        clock.now += seconds_per_step
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return step(*args, **kwargs) * 0

    trainer.training_step = training_step
    return trainer, rates


def test_texts():
    assert [Budget.parse(text).seconds for text in ("2h", "10m", "90s", "1h30m", "1.5m", " 10m ")] == [
        7200,
        600,
        90,
        5400,
        90,
        600,
    ]
    assert [Budget.parse(text).cpu for text in ("10m", "10m-cpu")] == [False, True]
    assert [duration(seconds) for seconds in (0.25, 59.6, 3600, 3661)] == ["0.25s", "1m", "1h", "1h1m1s"]
    for text in ("", "ten", "10", "0m", "-5m", "10m-gpu", "m", "-cpu", "10d"):
        with pytest.raises(ValueError, match="is not a time: write 2h, 10m or 90s"):
            Budget.parse(text)


def test_cpu_time_counts_work_and_not_sleep():
    import time

    wall, cpu = Budget.parse("1h").start(), Budget.parse("1h-cpu").start()
    time.sleep(0.3)
    assert wall.spent >= 0.3
    assert cpu.spent < 0.25
    while cpu.spent < 0.05:
        torch.ones(100, 100) @ torch.ones(100, 100)
    assert Budget.parse("1h").spent == 0


def test_the_schedule_ends_where_the_budget_ends(tmp_path, clock):
    """Linear without warmup: the rate is what is left of the time; ten steps of one second in a budget of twelve with two in reserve."""
    callback = BudgetCallback(Budget.parse("12s").start(), reserve=2.0)
    trainer, rates = timed_trainer(tmp_path, clock, callback, 1.0, max_steps=1000)
    trainer.train()
    assert rates == pytest.approx([1 - step / 10 for step in range(10)])
    assert (trainer.state.global_step, callback.ended, callback.progress) == (10, True, 1.0)


def test_the_time_before_the_training_counts(tmp_path, clock):
    budget = Budget.parse("12s").start()
    clock.now += 7  # semantic IDs
    trainer, rates = timed_trainer(tmp_path, clock, BudgetCallback(budget), 1.0, max_steps=1000)
    trainer.train()
    assert rates == pytest.approx([1 - step / 5 for step in range(5)])


def test_steps_end_the_training_where_they_are_fewer(tmp_path, clock):
    callback = BudgetCallback(Budget.parse("1h").start())
    trainer, rates = timed_trainer(tmp_path, clock, callback, 1.0, max_steps=4)
    trainer.train()
    assert rates == pytest.approx([1, 0.75, 0.5, 0.25])
    assert not callback.ended


@pytest.mark.parametrize(
    ("seconds", "warmup", "wanted"),
    [(20, 1000, [0, 0.5]), (40, 2, [0, 0.5]), (20, 0.2, [0, 0.25, 0.5, 0.75])],
    ids=["many steps take a tenth of the time", "few steps are steps", "a share is one of the time"],
)
def test_warmup(tmp_path, clock, seconds, warmup, wanted):
    callback = BudgetCallback(Budget.parse(f"{seconds}s").start())
    trainer, rates = timed_trainer(tmp_path, clock, callback, 1.0, max_steps=100_000, warmup_steps=warmup)
    trainer.train()
    assert rates[: len(wanted)] == pytest.approx(wanted)
    assert rates[len(wanted) :] == pytest.approx(
        [1 - step / seconds for step in range(len(wanted), seconds)], abs=1e-4
    )


def test_no_time_left_is_an_error(clock):
    budget = Budget.parse("10s").start()
    clock.now += 6
    with pytest.raises(
        ValueError,
        match=r"--budget 10s: 6s are spent before the first training step and the evaluation takes about 4s, so no step fits\. Raise it above 10s",
    ):
        BudgetCallback(budget, reserve=4).check()
    BudgetCallback(budget, reserve=3.9).check()


def test_one_step_is_trained_whatever_it_takes(tmp_path, clock):
    callback = BudgetCallback(Budget.parse("1s").start())
    trainer, _ = timed_trainer(tmp_path, clock, callback, 50.0, max_steps=1000)
    trainer.train()
    assert trainer.state.global_step == 1


def test_time_spent_survives_a_resume(tmp_path, clock):
    saving = {"max_steps": 1000, "save_strategy": "steps", "save_steps": 4}
    trainer, rates = timed_trainer(tmp_path, clock, BudgetCallback(Budget.parse("10s").start()), 1.0, **saving)
    trainer.train()
    assert rates == pytest.approx([1 - step / 10 for step in range(10)])
    clock.now += 1000  # the machine was off
    budget = Budget.parse("10s").start()
    resumed, later = timed_trainer(tmp_path, clock, BudgetCallback(budget), 1.0, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert later == pytest.approx(rates[4:])
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["BudgetCallback"]["attributes"] == {"spent": 10, "began": 0, "progress": 1}


def test_a_checkpoint_without_a_budget_goes_on_with_one(tmp_path, clock):
    saving = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "packing": True}
    make_trainer(tmp_path, PREFIXES, **saving).train()
    trainer, _ = timed_trainer(tmp_path, clock, BudgetCallback(Budget.parse("2s").start()), 1.0, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 6


def progress_of_a_rank(rank_seconds):
    from types import SimpleNamespace

    import torch.distributed as dist

    callback = BudgetCallback(Budget.parse("10s").start())
    callback.budget.carry(rank_seconds[dist.get_rank()])
    callback.on_pre_optimizer_step(SimpleNamespace(device="cpu"), None, None)
    return callback.progress


@pytest.mark.slow
def test_ranks_follow_the_slowest():
    first, second = on_ranks(2, progress_of_a_rank, [2.0, 5.0])
    assert first == second
    assert 0.5 <= first < 0.8


def test_schedules_that_do_not_follow_steps_are_refused(tmp_path, clock):
    trainer, _ = timed_trainer(
        tmp_path,
        clock,
        BudgetCallback(Budget.parse("2s").start()),
        1.0,
        lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="steps",
        eval_steps=1,
    )
    with pytest.raises(ValueError, match="cannot end with a budget; use linear, cosine or constant"):
        trainer.train()


def test_the_weights_at_the_end_are_evaluated(tmp_path, clock):
    for settings in ({"eval_strategy": "steps", "eval_steps": 1000}, {"eval_strategy": "epoch"}):
        callback = BudgetCallback(Budget.parse("2s").start())
        trainer, _ = timed_trainer(tmp_path, clock, callback, 1.0, max_steps=1000, **settings)
        trainer.train()
        evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_ndcg@10" in entry]
        assert evaluated[-1] == trainer.state.global_step
