"""`create_model_card` of the trainers: what the trainer knows, by its snippet a model that loads, and no blanks to fill in."""

import re

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard

from onerec_hf import OneRecProcessor
from onerec_hf.hub_cards.alignment import reward_in_words
from onerec_hf.trainers import (
    OneRecDPOConfig,
    OneRecDPOTrainer,
    OneRecTrainer,
    OneRecTrainingArguments,
    RewardTrainer,
    RewardTrainingArguments,
)
from onerec_hf.trainers.pair_selection import top_k_pairs
from tests.conftest import make_model
from tests.hub_cards.reading import run_snippet, section, table_of
from tests.hub_cards.test_reward_card import make_reward
from tests.trainers.preference_runs import CATALOGUE, make_trainer

QUICK = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no"}
ROWS = Dataset.from_list([{"history": [f"m{i}"], "session": [f"m{i + 1}", f"m{i + 2}"]} for i in range(12)])


def card_of(trainer, **metadata):
    trainer.save_model()
    trainer.create_model_card(**metadata)
    card = ModelCard.load(f"{trainer.args.output_dir}/README.md")
    assert not re.search(r"more information|\[.*needed.*\]|co2", card.content, flags=re.I)
    return card


@pytest.mark.parametrize("packing", [False, True])
def test_of_a_generator(catalogue, processor, tmp_path, packing):
    settings = {
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "predict_with_generate": True,
        "eval_num_beams": 12,
    }
    args = OneRecTrainingArguments(tmp_path / "shop", packing=packing, packing_length=64, **settings, **QUICK)
    trainer = OneRecTrainer(
        make_model(catalogue), args, train_dataset=ROWS, eval_dataset=ROWS, processing_class=processor
    )
    trainer.train()
    card = card_of(trainer, model_name="Films", tags="films", license="mit")
    assert card.data.model_name == "Films"
    assert card.data.license == "mit"
    assert {"films", "onerec", "mixture-of-experts"} <= set(card.data.tags)
    assert card.data.eval_results is None  # of which data set, it does not know
    assert "Not recorded" in section(card.content, "Data")
    run = section(card.content, "The run")
    assert "`OneRecTrainer` on 12 examples: steps 2," in run
    last = [entry for entry in trainer.state.log_history if "eval_recall@10" in entry][-1]
    assert f"| recall@10 | {last['eval_recall@10']:.4f} |" in run
    assert "runtime" not in run
    counted = trainer.tokens_per_expert
    assert counted.shape == (2, 4)
    assert f"Expert load over {counted[0].sum() // 2:,} tokens" in card.content
    assert len(run_snippet(card.content)["sessions"][0]) == 2


def test_before_training_there_is_little_to_say(catalogue, processor, tmp_path):
    args = OneRecTrainingArguments(tmp_path / "shop", **QUICK)
    card = card_of(OneRecTrainer(make_model(catalogue), args, processing_class=processor))
    assert "Expert load" not in card.content
    assert "steps 0, epochs 0" in card.content
    assert "Training loss" not in card.content


def test_of_a_reward_model(tmp_path):
    rows = Dataset.from_list(
        [{"history": ["a"], "session": ["b", "c"], "labels": [0.5, float(i % 2)]} for i in range(8)]
    )
    args = RewardTrainingArguments(tmp_path / "judge", max_steps=2, **QUICK)
    trainer = RewardTrainer(make_reward(), args, rows, rows)
    trainer.train()
    trainer.evaluate()
    card = card_of(trainer)
    assert "`RewardTrainer` on 8 examples: steps 2," in card.content
    last = trainer.state.log_history[-1]
    assert f"| ltr/auc | {last['eval_ltr/auc']:.4f} |" in card.content
    assert len(run_snippet(card.content)["rewards"]) == 1


def likes_even(histories, sessions):
    return [sum(int(item[1:]) % 2 == 0 for item in session) for session in sessions]


@pytest.mark.parametrize("own_selection", [False, True])
def test_of_iterative_alignment(tmp_path, own_selection):
    processor = OneRecProcessor.from_catalogue(CATALOGUE)
    settings = {"dpo_ratio": 0.5, "num_candidates": 6, "num_train_epochs": 2, "bf16": False, "reward_weights": [0.5]}
    trainer = OneRecDPOTrainer(
        make_model(CATALOGUE),
        likes_even,
        args=OneRecDPOConfig(str(tmp_path / "aligned"), **settings, **QUICK),
        train_dataset=ROWS,
        processing_class=processor,
        selection=top_k_pairs(2) if own_selection else None,
    )
    trainer.train()
    card = card_of(trainer)
    told = section(card.content, "Alignment")
    assert "2 iterations, pairs drawn for 50.0% of 12 training examples in each" in told
    assert f"{len(trainer.pairs)} pairs in iteration 1" in told
    assert "Reward: the function likes\\_even (weight 0.5)." in told
    assert "6 candidate sessions per history by beam search" in told
    picked = (
        "picked by the function top\\_k\\_pairs" if own_selection else "the candidate of the largest reward is chosen"
    )
    assert picked in told
    assert {"trl", "dpo"} <= set(card.data.tags)
    assert table_of(told) == []  # nobody measured before
    assert len(run_snippet(card.content)["sessions"]) == 1


def test_a_reward_model_is_told_with_its_objectives(tmp_path):
    model = make_reward(score_weights={"vtr": 1.0, "ltr": 0.5})
    model.save_pretrained(tmp_path / "judge")
    loaded = type(model).from_pretrained(tmp_path / "judge")
    words = reward_in_words(loaded.reward)
    assert (
        words == "the reward model judge, a weighted mean of lifts over base rates of vtr (weight 1), ltr (weight 0.5)"
    )


def test_of_given_pairs(tmp_path):
    trainer = make_trainer(tmp_path / "aligned")
    trainer.train()
    told = section(card_of(trainer).content, "Alignment")
    assert "Preference alignment on given pairs: 8 of them." in told
    assert "Loss: DPO (sigmoid), beta 0.1." in told


def test_of_a_text_model(tmp_path):
    trainer = make_trainer(tmp_path / "t5", "t5", loss_type="sigmoid_norm", reference_free=True)
    card = card_of(trainer, dataset_name="me/pairs")
    assert "A `T5ForConditionalGeneration` trained on preferences" in card.content
    assert "without a reference" in card.content
    assert card.data.datasets == "me/pairs"
    assert "onerec" not in card.data.tags
    scope = run_snippet(card.content)
    assert type(scope["model"]).__name__ == "T5ForConditionalGeneration"
