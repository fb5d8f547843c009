"""What every transformers Trainer takes is taken: plain arguments, model_init and searches, adapters, users without targets, any dataset format."""

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from onerec_hf import ItemCatalogue, OneRecForSessionReward, OneRecProcessor, OneRecRewardConfig, RewardItems
from onerec_hf.baselines import SequentialRecommender
from onerec_hf.data import UserSequences, prefix_examples
from onerec_hf.trainers import (
    OneRecDPOConfig,
    OneRecDPOTrainer,
    OneRecTrainer,
    OneRecTrainingArguments,
    RewardTrainer,
    Seq2SeqDPOConfig,
    Seq2SeqDPOTrainer,
    SequentialTrainer,
    SequentialTrainingArguments,
)
from tests.conftest import make_model

ROWS = [{"history": [f"m{i}", f"m{i + 1}"], "session": [f"m{i + 2}"]} for i in range(12)]
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


@pytest.fixture
def rows():
    return Dataset.from_list(ROWS)


def arguments(folder, **options):
    return OneRecTrainingArguments(str(folder), **{"max_steps": 2, "eval_num_beams": 10, **QUIET, **options})


@pytest.mark.parametrize("kind", [TrainingArguments, Seq2SeqTrainingArguments])
def test_arguments_of_other_trainers_are_taken(model, processor, rows, tmp_path, kind):
    args = kind(str(tmp_path), max_steps=2, seed=5, learning_rate=0.01, **QUIET)
    trainer = OneRecTrainer(model, args, rows, rows, processor)
    assert (trainer.args.seed, trainer.args.learning_rate, trainer.args.max_steps) == (5, 0.01, 2)
    trainer.train()
    # Seq2SeqTrainingArguments say themselves whether evaluations generate.
    assert ("eval_ndcg@10" in trainer.evaluate()) == (kind is not Seq2SeqTrainingArguments)


def test_plain_arguments_of_the_other_trainers(model, processor, rows, tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, seed=5, **QUIET)
    pairs = rows.map(lambda row: {"chosen": row["session"], "rejected": ["m30"]})
    sequences = [row["history"] + row["session"] for row in ROWS]
    recommender = SequentialRecommender.from_items([f"m{i}" for i in range(40)], hidden_size=8)
    for trainer in (
        Seq2SeqDPOTrainer(model, args=args, train_dataset=pairs, processing_class=processor),
        OneRecDPOTrainer(make_model(processor.catalogue), args=args, train_dataset=pairs, processing_class=processor),
        SequentialTrainer(recommender, args, sequences, rows),
    ):
        assert trainer.args.seed == 5
        assert trainer.train().global_step == 1


@pytest.mark.parametrize("kind", [Seq2SeqDPOConfig, OneRecDPOConfig])
def test_a_cpu_needs_no_bf16_option(tmp_path, kind):
    assert kind(str(tmp_path), report_to="none").bf16 == (torch.cuda.is_available())
    assert kind(str(tmp_path), report_to="none", use_cpu=True, bf16=True).bf16
    assert not kind(str(tmp_path), report_to="none", use_cpu=True).bf16


def test_model_init_makes_each_model_with_the_catalogue(processor, rows, tmp_path):
    made = []

    def fresh():
        model = make_model(processor.catalogue, seed=torch.initial_seed() % 1000)
        model.catalogue = None
        made.append(model)
        return model

    trainer = OneRecTrainer(None, arguments(tmp_path), rows, rows, processor, model_init=fresh)
    trainer.train()
    assert "eval_ndcg@10" in trainer.evaluate()
    assert len(made) == 2
    assert trainer.model is made[-1]
    later = OneRecTrainer(make_model(processor.catalogue), arguments(tmp_path), rows, rows, processor)
    later.model_init = fresh
    later.train()
    assert "eval_ndcg@10" in later.evaluate()
    for model, init in ((None, None), (made[0], fresh)):
        with pytest.raises(ValueError, match="pass either model or model_init"):
            OneRecTrainer(model, arguments(tmp_path), rows, rows, processor, model_init=init)


def test_rows_made_for_a_causal_encoder_need_one_in_every_trial(processor, tmp_path):
    users = [[f"m{i + j}" for j in range(6)] for i in range(8)]
    flat = [item for user in users for item in user]
    table = pd.DataFrame(
        {"user_id": [u for u, user in enumerate(users) for _ in user], "item_id": flat, "timestamp": range(len(flat))}
    )
    prefixes = prefix_examples(UserSequences.from_interactions(table), 2, 10)
    causal = iter([True, False])
    trainer = OneRecTrainer(
        None,
        arguments(tmp_path),
        prefixes,
        processing_class=processor,
        model_init=lambda: make_model(processor.catalogue, encoder_is_causal=next(causal)),
    )
    with pytest.raises(ValueError, match="encoder_is_causal=False after one with True"):
        trainer.train()


@pytest.mark.slow
def test_a_search_maximises_the_ranking(processor, rows, tmp_path):
    pytest.importorskip("optuna").logging.set_verbosity(40)
    trainer = OneRecTrainer(
        None, arguments(tmp_path), rows, rows, processor, model_init=lambda trial: make_model(processor.catalogue)
    )
    found = {}
    report = trainer.evaluate

    def evaluate(*args, **kwargs):
        metrics = report(*args, **kwargs)
        found[trainer.args.learning_rate] = metrics["eval_ndcg@10"]
        return metrics

    trainer.evaluate = evaluate
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-6, 0.1])}, n_trials=3
    )
    assert best.objective == max(found.values())
    with pytest.raises(ValueError, match="the objective is eval_ndcg@10, to maximize"):
        trainer.hyperparameter_search(direction="minimize")


def test_users_without_targets_are_ranked_for(model, processor, rows, tmp_path):
    trainer = OneRecTrainer(model, arguments(tmp_path), rows, processing_class=processor)
    histories = rows.remove_columns("session")
    done = trainer.predict(histories)
    assert done.predictions.shape == (12, 10)
    assert done.label_ids is None
    assert (done.predictions == trainer.predict(rows).predictions).all()
    with pytest.raises(ValueError, match=r"evaluate\(\) needs the column 'session'.* predict\(\)"):
        trainer.evaluate(histories)
    recommender = SequentialRecommender.from_items([f"m{i}" for i in range(40)], hidden_size=8)
    sequential = SequentialTrainer(
        recommender, SequentialTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    )
    assert sequential.predict(histories).predictions.shape == (12, 10)


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow", "polars"])
def test_datasets_of_any_format(model, processor, rows, tmp_path, kind):
    if kind == "polars":
        pytest.importorskip("polars")
    for data in (rows, rows.map(lambda row: {name: [int(item[1:]) for item in row[name]] for name in row})):
        owner, reader = model, processor
        if data is not rows:
            sizes = processor.catalogue.codebook_sizes
            catalogue = ItemCatalogue(range(40), processor.catalogue.codes, sizes)  # integers become tensors
            owner, reader = make_model(catalogue), OneRecProcessor.from_catalogue(catalogue, max_history=10)
        wanted = OneRecTrainer(owner, arguments(tmp_path), data, data, reader).evaluate()
        formatted = data.with_format(kind)
        trainer = OneRecTrainer(owner, arguments(tmp_path), formatted, formatted, reader)
        assert trainer.evaluate()["eval_loss"] == wanted["eval_loss"]
        assert trainer.evaluate(formatted)["eval_ndcg@10"] == wanted["eval_ndcg@10"]
        assert trainer.predict(formatted).predictions.shape == (12, 10)
        trainer.train()


def test_an_adapter_is_trained_by_its_config(model, processor, rows, tmp_path):
    before = {name: value.clone() for name, value in model.named_parameters()}
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = OneRecTrainer(model, arguments(tmp_path), rows, rows, processor, peft_config=config)
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    assert "eval_ndcg@10" in trainer.evaluate()
    after = trainer.model.get_base_model().state_dict()
    for name, value in before.items():
        wrapped = name.replace("_proj.", "_proj.base_layer.")
        assert torch.equal(value, after[wrapped if wrapped in after else name])
    with pytest.raises(ValueError, match="the model has an adapter already"):
        OneRecTrainer(trainer.model, arguments(tmp_path), rows, rows, processor, peft_config=config)


def test_the_reward_trainer_takes_plain_arguments_and_model_init(tmp_path):
    def fresh():
        model = OneRecForSessionReward(OneRecRewardConfig(num_items=40, hidden_size=8, objectives=["vtr"]))
        model.set_items(RewardItems([f"m{i}" for i in range(40)]))
        return model

    rows = Dataset.from_list([{**row, "labels": [float(place % 2)]} for place, row in enumerate(ROWS)])
    args = TrainingArguments(str(tmp_path), max_steps=1, **QUIET)
    trainer = RewardTrainer(None, args, rows.with_format("torch"), rows, model_init=fresh)
    trainer.train()
    assert "eval_vtr/auc" in trainer.evaluate(rows.with_format("arrow"))
