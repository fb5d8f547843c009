"""`train` with a budget, early stopping on validation NDCG and few validation users."""

import json

import pytest

from onerec_hf.trainers import Budget, OneRecTrainer
from onerec_hf.workflows import load_dataset, train
from onerec_hf.workflows.dataset import sample
from tests.workflows.conftest import TINY
from tests.workflows.test_training import parameters, rows_of

PACED = {**TINY, "max_steps": -1, "num_train_epochs": 1000, "per_device_train_batch_size": 20, "warmup_steps": 3}


@pytest.fixture
def clock(monkeypatch):
    """A training step takes a second, a batch of an evaluation half a second, the rest nothing."""

    class Clock:
        now, steps = 0.0, 0

    step, predict = OneRecTrainer.training_step, OneRecTrainer.prediction_step

    def training_step(self, *args, **kwargs):
        Clock.now, Clock.steps = Clock.now + 1, Clock.steps + 1
        return step(self, *args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        Clock.now += 0.5
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(OneRecTrainer, "training_step", training_step)
    monkeypatch.setattr(OneRecTrainer, "prediction_step", prediction_step)
    monkeypatch.setattr(Budget, "_now", lambda budget: Clock.now)
    return Clock


def test_the_run_ends_within_the_budget(tables, tmp_path, clock, capsys):
    """30 test users are 4 batches, 2 seconds: an estimate takes two such evaluations."""
    data = load_dataset(**tables)
    train(data, output_dir=tmp_path / "out", budget="40s", **{**PACED, "disable_tqdm": False})
    assert (
        clock.steps == 40 - 4 - 4
    )  # the estimate; a tenth of the budget for the evaluation, which is more than 2 seconds
    assert clock.now == 40 - 2
    epochs, said = clock.steps / -(-len(data.train) // 20), capsys.readouterr().err
    assert f"--budget 40s: the training ended after {epochs:.3g} of at most 1000 epochs (32 steps)" in said
    assert "it/s]" not in said  # no bars of transformers, neither of the estimate nor of the training


def test_evaluations_during_the_training_count(tables, tmp_path, clock):
    result = train(
        load_dataset(**tables),
        output_dir=tmp_path / "out",
        budget="100s",
        eval_strategy="epoch",
        save_strategy="best",
        metric_for_best_model="ndcg@10",
        load_best_model_at_end=True,
        validation_users=8,
        **PACED,
    )
    assert 98 - 10 <= clock.now <= 100
    assert len(result.trainer.eval_dataset) == 8
    evaluated = [entry["step"] for entry in result.trainer.state.log_history if "eval_ndcg@10" in entry]
    assert len(evaluated) > 3
    assert evaluated[-1] == clock.steps == result.trainer.state.global_step


@pytest.mark.parametrize(
    ("budget", "measured"), [("80s", True), ("40s", False)]
)  # of 30 users 4 batches, each 3 times: 6 seconds
def test_the_worth_of_features_counts(tables, tmp_path, clock, capsys, budget, measured):
    interactions = tables["interactions"].assign(hour=lambda table: table.index % 3, day=lambda table: table.index % 2)
    data = load_dataset(**{**tables, "interactions": interactions}, interaction_features=["hour", "day"])
    result = train(data, output_dir=tmp_path / "out", budget=budget, **PACED)
    assert any(name.startswith("feature_worth/") for name in result.metrics) == measured
    seconds = int(budget[:-1])
    assert seconds - 0.1 * seconds <= clock.now <= seconds
    assert ("too short to measure what each of 2 features is worth" in capsys.readouterr().err) != measured


def test_the_worth_of_features_may_be_left_out(tables, tmp_path):
    interactions = tables["interactions"].assign(hour=lambda table: table.index % 3)
    data = load_dataset(**{**tables, "interactions": interactions}, interaction_features=["hour"])
    result = train(data, output_dir=tmp_path / "out", feature_worth=False, **TINY)
    assert not any(name.startswith("feature_worth/") for name in result.metrics)


def test_a_budget_of_less_than_an_epoch_is_stated(tables, tmp_path, clock, capsys):
    result = train(
        load_dataset(**tables), output_dir=tmp_path / "out", budget="8s", **{**PACED, "per_device_train_batch_size": 4}
    )
    assert result.trainer.state.epoch < 1
    assert "which is less than one epoch: some training examples were never read" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").is_file()


def test_a_budget_of_no_step_is_an_error(tables, tmp_path, clock):
    with pytest.raises(
        ValueError, match=r"--budget 6s: 4s are spent before the first training step .* Raise it above 6s"
    ):
        train(load_dataset(**tables), output_dir=tmp_path / "out", budget="6s", **PACED)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="budget 'soon' is not a time"):
        train(load_dataset(**tables), output_dir=tmp_path / "out", budget="soon", **PACED)


def test_an_estimate_leaves_the_training_as_it_is(tables, tmp_path):
    """Dropout, order and initial weights: a budget that does not end the training changes nothing but the schedule."""
    data, settings = load_dataset(**tables), {**TINY, "lr_scheduler_type": "constant"}
    plain = train(data, output_dir=tmp_path / "plain", **settings)
    paced = train(data, output_dir=tmp_path / "paced", budget="10h", **settings)
    assert rows_of(plain.folder) == rows_of(paced.folder)
    mine, theirs = parameters(plain.folder), parameters(paced.folder)
    assert all((value == theirs[name]).all() for name, value in mine.items())


STOPPING = {
    **TINY,
    "max_steps": -1,
    "num_train_epochs": 30,
    "learning_rate": 0.03,
    "eval_strategy": "epoch",
    "save_strategy": "best",
    "metric_for_best_model": "ndcg@10",
    "load_best_model_at_end": True,
    "save_total_limit": 1,
    "early_stopping_patience": 2,
    "keep_checkpoints": True,
}


@pytest.fixture(scope="module")
def stopped(tables, tmp_path_factory):
    return train(load_dataset(**tables), output_dir=tmp_path_factory.mktemp("stopped") / "out", **STOPPING)


def test_early_stopping_keeps_the_best_weights(stopped):
    state = stopped.trainer.state
    scores = {entry["step"]: entry["eval_ndcg@10"] for entry in state.log_history if "eval_ndcg@10" in entry}
    best = max(scores, key=lambda step: scores[step])
    assert state.global_step < state.max_steps
    assert list(scores)[-1] == state.global_step
    assert len(scores) == list(scores).index(best) + 1 + 2  # patience
    assert state.best_global_step == best
    (kept,) = (stopped.folder / "checkpoints").glob("checkpoint-*")
    assert kept.name == f"checkpoint-{best}"
    saved, mine = parameters(kept), parameters(stopped.folder)
    assert all((value == saved[name]).all() for name, value in mine.items())
    assert stopped.trainer.evaluate()["eval_ndcg@10"] == scores[best]


@pytest.mark.slow
def test_a_killed_run_with_early_stopping_ends_as_the_whole_one(tables, stopped, tmp_path, monkeypatch):
    step, count = OneRecTrainer.training_step, iter(range(1, 10_000))
    last = stopped.trainer.state.global_step

    class Killed(BaseException):
        pass

    def training_step(self, *args, **kwargs):
        if next(count) == last:
            raise Killed
        return step(self, *args, **kwargs)

    call = {"output_dir": tmp_path / "out", **STOPPING}
    with monkeypatch.context() as patch:
        patch.setattr(OneRecTrainer, "training_step", training_step)
        with pytest.raises(Killed):
            train(load_dataset(**tables), **call)
    resumed = train(load_dataset(**tables), resume_from_checkpoint="last", **call)
    assert resumed.trainer.state.global_step == last
    assert rows_of(resumed.folder) == rows_of(stopped.folder)


def test_validation_users_are_the_same_every_time(tables, tmp_path):
    data = load_dataset(**tables)
    assert sample(data.validation, 1000) is data.validation
    few = sample(data.validation, 7)["user_id"][:]
    assert few == sample(data.validation, 7)["user_id"][:]
    assert len(set(few)) == 7
    with pytest.raises(ValueError, match="--validation_users must be at least 1"):
        train(data, output_dir=tmp_path / "out", validation_users=0, **TINY)
    assert json.dumps(few) != json.dumps(data.validation[:7]["user_id"])
