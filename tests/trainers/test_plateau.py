"""A schedule that validation ends: constant, then a decay to 0 over a quarter of all steps."""

import pytest

from onerec_hf.trainers import Budget, BudgetCallback, PlateauDecayCallback
from tests.conftest import make_model
from tests.trainers.test_budget import Clock
from tests.trainers.test_packed_training import CATALOGUE, PREFIXES, WINDOWS, make_trainer


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def scripted_trainer(folder, scores, patience=2, seconds=None, **settings):
    """A training whose evaluations, one after each step, find these scores (the last one again after them); and the learning rates of its steps."""
    defaults = {
        "packing": True,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "constant_with_warmup",
        "learning_rate": 1.0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "ndcg@10",
    }
    trainer = make_trainer(folder, PREFIXES, make_model(CATALOGUE, encoder_is_causal=True), **{**defaults, **settings})
    trainer.add_callback(PlateauDecayCallback(patience))
    rates, step, found = [], trainer.training_step, {}

    def training_step(*args, **kwargs):
        if seconds is not None:
            seconds()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return step(*args, **kwargs) * 0

    def evaluation_loop(dataloader, *args, **kwargs):
        output = trainer.__class__.evaluation_loop(trainer, dataloader, *args, **kwargs)
        at = trainer.state.global_step - 1
        found[at] = output.metrics["eval_ndcg@10"] = scores[min(at, len(scores) - 1)]
        return output

    trainer.training_step, trainer.evaluation_loop = training_step, evaluation_loop
    trainer.eval_dataset = WINDOWS.select(range(2))
    return trainer, rates


RISING = [step / 100 for step in range(100)]


def test_without_a_plateau_the_last_quarter_of_the_steps_decays(tmp_path):
    trainer, rates = scripted_trainer(tmp_path, RISING, max_steps=16)
    trainer.train()
    assert rates == pytest.approx([1.0] * 13 + [0.75, 0.5, 0.25])


def test_a_plateau_begins_the_decay_of_a_quarter_of_all_steps(tmp_path):
    """The fourth evaluation is the best one, so that the constant part ends with the sixth: a decay of two steps is a quarter of eight."""
    trainer, rates = scripted_trainer(tmp_path, [0.1, 0.2, 0.3, 0.4, 0.4, 0.39, 0.5], max_steps=1000)
    trainer.train()
    assert rates == pytest.approx([1.0] * 7 + [0.5])
    assert trainer.state.global_step == 8


def test_evaluations_in_a_row_count(tmp_path):
    scores = [0.1, 0.05, 0.2, 0.15, 0.3, 0.25, 0.2, 0.1]
    trainer, rates = scripted_trainer(tmp_path, scores, max_steps=1000)
    trainer.train()
    assert rates == pytest.approx([1.0] * 8 + [0.5])  # seven steps, then two


def test_a_loss_gets_better_where_it_falls(tmp_path):
    falling = [1 - score for score in RISING]
    settings = {"max_steps": 8, "greater_is_better": False}
    trainer, rates = scripted_trainer(tmp_path, falling, **settings)
    trainer.train()
    assert rates == pytest.approx([1.0] * 7 + [0.5])
    trainer, rates = scripted_trainer(tmp_path, RISING, **settings)
    trainer.train()
    assert len(rates) == 4  # best at the first, plateau at the third


def test_the_decay_follows_a_budget(tmp_path, clock):
    """Steps of one second in a budget of sixteen: the last four seconds decay."""
    budget = BudgetCallback(Budget.parse("16s").start())

    def second():
        clock.now += 1

    trainer, rates = scripted_trainer(tmp_path, RISING, seconds=second, max_steps=1000)
    trainer.add_callback(budget)
    trainer.train()
    assert rates == pytest.approx([1.0] * 13 + [0.75, 0.5, 0.25], abs=1e-2)
    clock.now = 100.0
    trainer, rates = scripted_trainer(tmp_path, [0.1], seconds=second, max_steps=1000)
    trainer.add_callback(BudgetCallback(Budget.parse("16s").start()))
    trainer.train()
    assert (len(rates), rates[:3]) == (4, [1.0] * 3)  # the plateau at the third second, in the clock of the budget


def test_a_resumed_run_goes_on(tmp_path):
    scores = [0.1, 0.2, 0.3, 0.4, 0.4, 0.39, 0.5]
    settings = {"max_steps": 1000, "save_strategy": "steps", "save_steps": 1}
    whole, wanted = scripted_trainer(tmp_path / "whole", scores, **settings)
    whole.train()
    for step in (3, 5, 7):
        resumed, rates = scripted_trainer(tmp_path / f"from-{step}", scores, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert rates == wanted[step:]


def test_another_schedule_is_refused(tmp_path):
    trainer, _ = scripted_trainer(tmp_path, RISING, lr_scheduler_type="reduce_lr_on_plateau", max_steps=2)
    with pytest.raises(ValueError, match=r"lr_scheduler_type=.*does not follow the number of steps"):
        trainer.train()


def test_evaluations_after_the_training_change_nothing(tmp_path):
    trainer, _ = scripted_trainer(tmp_path, RISING, max_steps=4)
    trainer.train()
    assert "test_loss" in trainer.evaluate(WINDOWS.select(range(2)), metric_key_prefix="test")
