"""`train` with refit: evaluated without the held-out items, saved after a training on everything."""

import json

import pytest
import torch

from onerec_hf.workflows import DataSettings, load_dataset, train
from onerec_hf.workflows.refit import everything
from tests.cli.commands import codes, contents
from tests.workflows.conftest import TINY
from tests.workflows.test_pace import STOPPING
from tests.workflows.test_training import parameters, rows_of

EPOCHS = {**TINY, "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 20, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def data(tables):
    return load_dataset(**tables)


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory):
    return train(data, output_dir=tmp_path_factory.mktemp("evaluated") / "out", **EPOCHS)


@pytest.fixture(scope="module")
def refitted(data, tmp_path_factory):
    return train(data, output_dir=tmp_path_factory.mktemp("refitted") / "out", refit=True, **EPOCHS)


def test_everything_is_trained_on(data):
    whole = everything(data)
    assert len(whole.train) == len(data.train) + 2 * 30  # two held-out items of each user are targets
    targets = set(zip(whole.train["user_id"], (tuple(session) for session in whole.train["session"]), strict=True))
    for held_out in (data.validation, data.test):
        last = list(zip(held_out["user_id"], held_out["session"], strict=True))
        assert all(any(user == u and item in session for u, session in targets) for user, (item,) in last)
    assert whole.test[:] == data.test[:]
    assert sum(map(len, everything(data.on_prefixes()).train["sessions"])) == len(whole.train)
    assert len(data.train_sequences.item_ids) == 300
    assert len(whole.train_sequences.item_ids) == 360


def test_the_metrics_are_of_the_first_model_and_the_weights_of_the_second(evaluated, refitted, data):
    assert rows_of(refitted.folder) == rows_of(evaluated.folder)
    assert codes(refitted.folder) == codes(evaluated.folder)
    first, second = parameters(evaluated.folder), parameters(refitted.folder)
    assert not all(torch.equal(value, second[name]) for name, value in first.items())
    assert all(torch.equal(value, second[name]) for name, value in refitted.model.named_parameters())
    steps = -(-270 // 20) * 2
    assert refitted.trainer.state.global_step == round(steps * 330 / 270)
    results = json.loads((refitted.folder / "results.json").read_text())
    assert results["refit"]["interactions"] == 360
    note = "The metrics are of the model that was trained without the held-out items."
    assert results["refit"]["note"].startswith(note)
    card = (refitted.folder / "README.md").read_text()
    assert note in card
    assert "on all 360 interactions" in card
    assert note not in (evaluated.folder / "README.md").read_text()
    assert "refit" not in json.loads((evaluated.folder / "results.json").read_text())


def test_the_weights_are_those_of_a_training_on_everything(refitted, data, tmp_path):
    settings = {name: value for name, value in EPOCHS.items() if name != "codebook_sizes"} | {"num_train_epochs": 30}
    again = train(
        everything(data),
        output_dir=tmp_path / "out",
        semantic_ids=str(refitted.folder),
        **{**settings, "max_steps": refitted.trainer.state.global_step},
    )
    mine, theirs = parameters(again.folder), parameters(refitted.folder)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_the_folder_is_that_of_any_training(evaluated, refitted):
    assert contents(refitted.folder).keys() == contents(evaluated.folder).keys()
    popularity = refitted.processor.catalogue.popularity
    assert popularity.sum() == 360
    assert evaluated.processor.catalogue.popularity.sum() == 300
    from transformers import AutoProcessor

    assert AutoProcessor.from_pretrained(refitted.folder).catalogue.popularity.tolist() == popularity.tolist()


def test_a_refit_lasts_as_long_as_the_best_weights_were_trained(data, tmp_path):
    settings = {**STOPPING, "num_train_epochs": 12, "learning_rate": 0.05}  # it overfits soon
    refitted = train(data, output_dir=tmp_path / "out", refit=True, **settings)
    (best,) = (tmp_path / "out" / "checkpoints").glob("checkpoint-*")
    steps = int(best.name.removeprefix("checkpoint-"))
    assert steps < 12 * 34
    assert refitted.trainer.state.global_step == round(steps * 330 / 270)
    assert refitted.trainer.state.max_steps == round(12 * 34 * 330 / 270)


@pytest.mark.slow
def test_a_refit_decays_as_the_training_that_a_plateau_ended(data, tmp_path):
    settings = {**STOPPING, "num_train_epochs": 12, "lr_scheduler_type": "constant_with_warmup"}
    settings |= {"early_stopping_patience": None, "decay_on_plateau": 1}
    refitted = train(data, output_dir=tmp_path / "out", refit=True, **settings)
    (saved,) = (tmp_path / "out" / "checkpoints").glob("checkpoint-*")
    state = json.loads((saved / "trainer_state.json").read_text())
    steps = int(saved.name.removeprefix("checkpoint-"))
    assert refitted.trainer.state.global_step == round(steps * 330 / 270)
    args = refitted.trainer.args
    assert state["max_steps"] == 12 * 34
    assert args.lr_scheduler_type == "warmup_stable_decay"
    # A decay of a quarter of all steps.
    assert args.lr_scheduler_kwargs["num_decay_steps"] == pytest.approx(args.max_steps / 4, abs=2)
    assert args.max_steps < 12 * 34


def test_a_refit_starts_from_the_same_model(data, evaluated, tmp_path):
    settings = {name: value for name, value in EPOCHS.items() if name != "codebook_sizes"}
    again = train(data, output_dir=tmp_path / "out", model=str(evaluated.folder), refit=True, **settings)
    assert codes(again.folder) == codes(evaluated.folder)
    assert json.loads((again.folder / "results.json").read_text())["refit"]["interactions"] == 360


def test_a_refit_needs_a_table(files, tmp_path):
    from onerec_hf.data import ExampleSettings, prepare_log

    prepare_log(files["interactions"], tmp_path / "ready", settings=ExampleSettings(), num_shards=2)
    with pytest.raises(ValueError, match="--refit goes with --interactions"):
        train(DataSettings(prepared=str(tmp_path / "ready")), output_dir=tmp_path / "out", refit=True, **EPOCHS)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_interrupted_refit_says_how_to_go_on(data, tmp_path, monkeypatch):
    import signal

    from onerec_hf.trainers.callbacks import LastStepCallback

    def on_step_end(self, args, state, control, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LastStepCallback, "on_step_end", on_step_end)
    call = {"output_dir": tmp_path / "out", "refit": True, "save_strategy": "epoch", **EPOCHS}
    with pytest.raises(KeyboardInterrupt, match='resume with the same call and resume_from_checkpoint="last"'):
        train(data, **call)
    monkeypatch.undo()
    done = train(data, resume_from_checkpoint="last", **call)
    assert json.loads((done.folder / "results.json").read_text())["refit"]["interactions"] == 360


def test_evidence_counts_everything_with_the_weights_of_the_evaluated_model(data, tmp_path):
    head = {"item_head": True, "item_head_evidence": True, "item_score_weight": 1.0, "max_steps": 2}
    settings = {**TINY, **head}
    evaluated = train(data, output_dir=tmp_path / "evaluated", **settings)
    refitted = train(data, output_dir=tmp_path / "refitted", refit=True, **settings)
    assert rows_of(refitted.folder) == rows_of(evaluated.folder)
    first, second = (result.model.get_encoder().item_head.evidence for result in (evaluated, refitted))
    assert torch.equal(first.weights, second.weights)
    assert (first.interactions.sum(), second.interactions.sum()) == (300, 360)
