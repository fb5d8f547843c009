"""Progress of a run: one bar on a terminal, a line per epoch in a pipe."""

import io
import re
import sys

import pytest

from onerec_hf.trainers import Budget, BudgetCallback, PlateauDecayCallback, RunProgress
from onerec_hf.workflows.distributed import say
from tests.trainers.test_packed_training import WINDOWS, make_trainer

EPOCHS = {"per_device_train_batch_size": 12, "max_steps": -1, "num_train_epochs": 3, "disable_tqdm": False}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_pipe_gets_a_line_per_epoch(tmp_path, capsys):
    trainer = make_trainer(tmp_path, WINDOWS, eval_strategy="epoch", **EPOCHS)
    with RunProgress() as progress:
        progress.attach(trainer)
        trainer.train()
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 3
    scores = [entry["eval_ndcg@10"] for entry in trainer.state.log_history if "eval_ndcg@10" in entry]
    for number, line in enumerate(lines):
        found = re.fullmatch(
            r"epoch (\d) of 3, loss [\d.]+, validation ndcg@10 ([\d.]+), about ([\dhms.]+) left", line
        )
        assert found, line
        assert int(found[1]) == number + 1
        assert float(found[2]) == pytest.approx(scores[number], rel=1e-3)
    assert Budget.parse(lines[0].split()[-2]).seconds > 0
    assert lines[-1].endswith("about 0s left")
    assert captured.out == ""  # transformers printed its logs there


def test_a_terminal_gets_one_bar_and_no_logs(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)  # pytest would replace it after a fixture
    trainer = make_trainer(tmp_path, WINDOWS, eval_strategy="epoch", **EPOCHS)
    with RunProgress() as progress:
        progress.bar.mininterval = 0
        progress.stage("semantic IDs")
        progress.attach(trainer, after=60)
        trainer.train()
        say("a message")
        trainer.evaluate()
    shown = terminal.getvalue()
    drawn = [part for part in shown.split("\r") if "%|" in part]
    stages = list(dict.fromkeys(re.sub(r"\x1b\[A|\s", "", part.split(":")[0]) for part in drawn))
    assert stages == ["data", "semanticIDs", "training", "evaluation"]
    assert any(re.search(r"training: +\d+%.*, 1m\d*s? left, loss", part) for part in drawn)
    assert any("a message" in line for line in shown.split("\n"))
    assert "{'" not in shown
    assert "epoch 1 of" not in shown


def test_the_time_left_is_measured(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("onerec_hf.trainers.progress.time.perf_counter", lambda: clock[0])
    trainer = make_trainer(tmp_path, WINDOWS, eval_strategy="epoch", **EPOCHS)
    step, predict, left = trainer.training_step, trainer.prediction_step, []

    def training_step(*args, **kwargs):
        clock[0] += 2
        return step(*args, **kwargs)

    def prediction_step(*args, **kwargs):
        clock[0] += 5
        return predict(*args, **kwargs)

    trainer.training_step, trainer.prediction_step = training_step, prediction_step
    progress = RunProgress(bar=False)
    monkeypatch.setattr(progress, "_show", left.append)
    progress.attach(trainer, after=100)
    trainer.train()
    steps = trainer.state.max_steps
    batches = -(-9 // trainer.args.eval_batch_size)
    assert steps == 9
    # No evaluation is known in the first epoch.
    assert left[:3] == [2 * (steps - done) + 100 for done in (1, 2, 3)]
    assert left[3:6] == [2 * (steps - done) + 2 * 5 * batches + 100 for done in (4, 5, 6)]
    assert left[-1] == 5 * batches + 100


def test_a_budget_bounds_the_time_left(tmp_path):
    trainer = make_trainer(tmp_path, WINDOWS, **{**EPOCHS, "num_train_epochs": 100_000})
    budget = BudgetCallback(Budget.parse("3s").start(), reserve=1.0)
    trainer.add_callback(budget)
    progress, left = RunProgress(bar=False), []
    progress._show = left.append
    progress.attach(trainer, after=1.0)
    trainer.train()
    assert all(1.0 <= seconds <= 3.0 for seconds in left)
    assert left[-1] < 1.5


def test_a_decay_under_a_budget_bounds_the_time_left(tmp_path, monkeypatch):
    """A budget may last longer than a training that validation ends."""
    clock = [0.0]
    monkeypatch.setattr("onerec_hf.trainers.progress.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(Budget, "_now", lambda budget: clock[0])
    trainer = make_trainer(
        tmp_path, WINDOWS, lr_scheduler_type="constant", **{**EPOCHS, "max_steps": 100, "num_train_epochs": 1}
    )
    trainer.args.metric_for_best_model, trainer.args.greater_is_better = "ndcg@10", True
    step, plateau, left = trainer.training_step, PlateauDecayCallback(1), []

    def training_step(*args, **kwargs):
        clock[0] += 2
        if trainer.state.global_step in (2, 5):  # no better: the decay is from step 5 to 7
            plateau.on_evaluate(trainer.args, trainer.state, trainer.control, {"eval_ndcg@10": 0.5})
        return step(*args, **kwargs)

    trainer.training_step = training_step
    progress = RunProgress(bar=False)
    monkeypatch.setattr(progress, "_show", left.append)
    trainer.add_callback(plateau)
    trainer.add_callback(BudgetCallback(Budget.parse("1000s").start(), reserve=100.0))
    progress.attach(trainer, after=10)
    trainer.train()
    assert plateau.decay == (5, 7)
    assert left[0] == 2 * 99 + 10  # the steps, which are fewer than the budget has time for
    assert left[-2:] == [2 + 10, 10]
