"""SequentialTrainer: what it learns, which checkpoint it keeps, how it resumes, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from onerec_hf.baselines import NextItemCollator, NextItemDataset, SequentialRecommender
from onerec_hf.evaluation import ndcg_at_k
from onerec_hf.trainers import NonFiniteError, SequentialTrainer, SequentialTrainingArguments, fit_sequential

ARCHITECTURES = ("sasrec", "hstu", "gru4rec")
QUIET = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}


def make(items=range(30), features=None, **config) -> SequentialRecommender:
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "max_history": 4, "dropout_rate": 0.0, **config}
    return SequentialRecommender.from_items(items, features, **settings)


def arguments(folder, **settings) -> SequentialTrainingArguments:
    return SequentialTrainingArguments(str(folder), **{"save_strategy": "best", **QUIET, **settings})


def held_out(*pairs) -> Dataset:
    return Dataset.from_list([{"history": history, "session": [item]} for history, item in pairs])


HISTORIES = [np.arange(stop - 4, stop) for stop in (4, 5, 12, 29)]


@pytest.mark.parametrize(
    "setting", [{}, {"bf16": True}, {"target_share": 0.5}, {"label_smoothing_factor": 0.1}], ids=str
)
def test_training_reaches_the_oldest_items_of_long_sequences(setting):
    training = {"num_train_epochs": 100, "learning_rate": 1e-2, "seed": 0, "use_cpu": True, **setting}
    model = fit_sequential(
        [np.arange(30)] * 4, hidden_size=16, num_hidden_layers=1, dropout_rate=0.0, max_history=4, **training
    )
    assert model.rank(HISTORIES, 1)[:, 0].tolist() == [4, 5, 12, 29]
    assert model.item_embedding.weight.dtype == torch.float32


def test_bfloat16_trains_other_weights():
    found = [
        fit_sequential(
            [np.arange(9)], hidden_size=8, num_train_epochs=3, use_cpu=True, bf16=bf16
        ).item_embedding.weight
        for bf16 in (False, True)
    ]
    assert not torch.equal(*found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_transformers_trainer_trains_it(architecture, loss, tmp_path):
    model = make(architecture=architecture, loss=loss)
    dataset = NextItemDataset([np.arange(10), np.arange(5, 15)], model.config.max_history)
    settings = {"num_train_epochs": 30, "learning_rate": 1e-2, "save_strategy": "no", "remove_unused_columns": False}
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **settings, **QUIET),
        train_dataset=dataset,
        data_collator=NextItemCollator(),
    )
    before = trainer.train().training_loss
    trainer.args.num_train_epochs = 60
    assert trainer.train().training_loss < before


def test_features_are_trained(tmp_path):
    model = make(range(10), features=np.random.default_rng(0).normal(size=(10, 3)))
    before = model.feature_proj.weight.detach().clone()
    SequentialTrainer(model, arguments(tmp_path, num_train_epochs=2), [[0, 2, 4, 6]] * 4).train()
    assert not torch.equal(before, model.feature_proj.weight)


class Metrics(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if "eval_ndcg@10" in metrics:
            self.found.append(metrics["eval_ndcg@10"])


def test_the_best_checkpoint_is_kept_and_training_stops_after_it(tmp_path):
    # What is held out contradicts what is trained on: validation is best early.
    sequences = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] * 2
    validation = held_out(([0, 1, 2], 9), ([5, 6], 3), ([0], 8))
    metrics = Metrics()
    settings = {"num_train_epochs": 80, "learning_rate": 1e-2, "early_stopping_patience": 6, "save_strategy": "epoch"}
    model = make(range(12), dropout_rate=0.3)
    trainer = SequentialTrainer(model, arguments(tmp_path, **settings), sequences, validation, callbacks=[metrics])
    trainer.train()
    best = int(np.argmax(metrics.found))
    assert len(metrics.found) == best + 1 + 6 < 80
    assert trainer.state.best_metric == max(metrics.found)
    assert trainer.evaluate()["eval_ndcg@10"] == max(metrics.found)
    by_hand = ndcg_at_k(model.rank(list(map(np.array, validation["history"])), 10), validation["session"], 10)
    assert by_hand == pytest.approx(max(metrics.found))
    assert trainer.evaluate(validation.select([2]), metric_key_prefix="one").keys() >= {
        "one_recall@5",
        "one_coverage@10",
    }


def test_without_validation_the_last_weights_are_kept(tmp_path):
    args = arguments(tmp_path, num_train_epochs=2)
    trainer = SequentialTrainer(make(), args, [range(10)])
    assert trainer.train().global_step == 2
    assert args.load_best_model_at_end  # the caller's arguments are untouched


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_a_resumed_training_equals_one_without_an_interruption(loss, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 7

    rng = np.random.default_rng(0)
    sequences = [rng.permutation(30)[:10].tolist() for _ in range(12)]
    settings = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 7}
    settings |= {"lr_scheduler_type": "cosine", "warmup_steps": 2, "target_share": 0.7, "eval_strategy": "no"}
    settings["load_best_model_at_end"] = False

    def trainer(folder, **more):
        model = make(architecture="sasrec", loss=loss, dropout_rate=0.3)
        return SequentialTrainer(model, arguments(tmp_path / folder, **settings), sequences, **more)

    whole = trainer("whole")  # which seeds
    whole.train()
    first = trainer("cut", callbacks=[Stop()])
    first.train()
    assert first.state.global_step == 7 < whole.state.global_step
    second = trainer("cut")
    second.train(resume_from_checkpoint="last")
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], weight, rtol=0, atol=0, msg=name)


def test_a_cosine_rises_and_ends_with_no_learning_rate(monkeypatch, tmp_path):
    rates, step = [], torch.optim.AdamW.step

    def seen(optimizer, *arguments, **more):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *arguments, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    settings = {"num_train_epochs": 10, "per_device_train_batch_size": 2, "lr_scheduler_type": "cosine"}
    args = arguments(tmp_path, learning_rate=0.5, warmup_steps=0.1, **settings)
    SequentialTrainer(make(), args, [[0, 2, 4, 6]] * 5).train()
    expected = [0, 1 / 3, 2 / 3, *((1 + np.cos(np.pi * done / 27)) / 2 for done in range(27))]
    assert rates == pytest.approx([0.5 * factor for factor in expected])


def test_smoothing_reaches_the_loss(tmp_path):
    model = make()
    trainer = SequentialTrainer(model, arguments(tmp_path, label_smoothing_factor=0.3), [range(5)])
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    with torch.no_grad():
        expected = model(**batch, label_smoothing=0.3).loss
        assert trainer.compute_loss(model, batch) == expected != model(**batch).loss


def test_bad_data_is_refused(tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="train_dataset: 1 of 3 item ids are not among the model's 30 items"):
        SequentialTrainer(make(), args, [[1, 2, 99]])
    with pytest.raises(ValueError, match="train_dataset: the model's item ids are of type int; got 'a'"):
        SequentialTrainer(make(), args, [["a", "b"]])
    with pytest.raises(ValueError, match="no training sequence has two items"):
        SequentialTrainer(make(), args, [[1], [2]])
    with pytest.raises(ValueError, match="no training sequence has two items"):
        SequentialTrainer(make(), args, [])
    with pytest.raises(ValueError, match=r"eval_dataset, column 'session': 1 of 1 item ids"):
        SequentialTrainer(make(), args, [[1, 2]], held_out(([1], 77)))
    with pytest.raises(ValueError, match=r"eval_dataset: 1 histories are empty \(first: row 1\)"):
        SequentialTrainer(make(), args, [[1, 2]], held_out(([1], 2), ([], 3)))
    with pytest.raises(ValueError, match=r"eval_dataset has no column 'session' \(found: history\)"):
        SequentialTrainer(make(), args, [[1, 2]], held_out(([1], 2)).remove_columns("session"))
    bare = make()
    bare._items = bare.item_keys = None
    with pytest.raises(ValueError, match="the model has no item ids"):
        SequentialTrainer(bare, args, [[1, 2]])
    with pytest.raises(ValueError, match="features needs item_ids"):
        fit_sequential([[1, 2]], features=np.zeros((2, 3)))
    with pytest.raises(TypeError, match="hidden_sise"):
        fit_sequential([[1, 2]], hidden_sise=3)


def test_a_nonfinite_loss_names_its_examples(tmp_path):
    model = make(["a", "b", "c"])
    torch.nn.init.constant_(model.item_embedding.weight, torch.nan)
    with pytest.raises(NonFiniteError, match="training stopped at step 1") as caught:
        SequentialTrainer(model, arguments(tmp_path), [["b", "a", "c"]]).train()
    with open(caught.value.path) as file:
        example = json.loads(file.read())
    assert (example["history"], example["targets"]) == (["b", "a"], ["a", "c"])


@pytest.mark.parametrize("setting", [{"target_share": 0}, {"eval_top_k": []}, {"early_stopping_patience": 0}], ids=str)
def test_bad_arguments_are_refused(setting, tmp_path):
    with pytest.raises(ValueError, match=next(iter(setting))):
        arguments(tmp_path, **setting)


def test_one_call_writes_a_folder_with_its_card(tmp_path):
    sequences, validation = [["a", "b", "c", "d"], ["b", "c", "a"]], held_out((["a"], "e"))
    settings = {"hidden_size": 8, "num_train_epochs": 2, **QUIET}
    model = fit_sequential(sequences, validation, output_dir=str(tmp_path), architecture="gru4rec", **settings)
    assert model.items.item_ids == ["a", "b", "c", "d", "e"]
    loaded = SequentialRecommender.from_pretrained(tmp_path)
    assert loaded.recommend([["a"]]) == model.recommend([["a"]])
    card = (tmp_path / "README.md").read_text()
    assert "GRU4Rec" in card
    assert "`SequentialTrainer` on 2 examples" in card


@pytest.mark.parametrize("strategy", ["save_strategy", "eval_strategy"])
def test_without_checkpoints_or_evaluations_the_last_weights_stay(tmp_path, strategy):
    args = SequentialTrainingArguments(str(tmp_path), **{strategy: "no"}, report_to="none")
    assert not args.load_best_model_at_end
