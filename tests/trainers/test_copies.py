"""Copies of a model that a trainer was made with: they compute with their own weights, and can be pickled."""

import copy
import pickle

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments, Seq2SeqDPOConfig, Seq2SeqDPOTrainer

PAIRS = [{"history": [f"m{i}"], "chosen": [f"m{i + 1}"], "rejected": [f"m{i + 9}"]} for i in range(16)]


def dpo(model, folder, pairs=PAIRS, **options):
    args = Seq2SeqDPOConfig(
        str(folder), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    return Seq2SeqDPOTrainer(model, args=args, train_dataset=Dataset.from_list(pairs), **options)


def zeroed(model):
    """A copy with other weights."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data.zero_()
    return copied.eval()


@pytest.mark.parametrize("trainers", [1, 2])
def test_a_copy_after_preference_training_has_its_own_weights(model, processor, batch, tmp_path, trainers):
    expected = zeroed(model)(**batch).loss.item()
    for number in range(trainers):
        trainer = dpo(model, tmp_path / str(number), processing_class=processor)
    for when in ("before", "after"):
        assert zeroed(trainer.model)(**batch).loss.item() == pytest.approx(expected), when
        trainer.train()


def test_a_copy_scores_as_the_trainer_does(model, processor, tmp_path):
    trainer = dpo(model, tmp_path, processing_class=processor)
    scored = trainer.data_collator([trainer.train_dataset[0]])
    labels = scored["input_ids"]
    scored = {name: value for name, value in scored.items() if name != "completion_mask"}
    own = trainer.model.eval()(**scored, labels=labels, fused_lm_head=True).log_probs
    copied = copy.deepcopy(trainer.model)
    assert torch.equal(copied(**scored, labels=labels, fused_lm_head=True).log_probs, own)
    other = zeroed(trainer.model)(**scored, labels=labels, fused_lm_head=True).log_probs
    assert not torch.allclose(other, own)


def test_a_model_can_be_pickled_after_training(model, processor, batch, tmp_path):
    dpo(model, tmp_path / "dpo", processing_class=processor).train()
    args = OneRecTrainingArguments(
        str(tmp_path / "ntp"), max_steps=1, use_cpu=True, report_to="none", activation_checkpointing=True
    )
    examples = Dataset.from_list([{"history": ["m1"], "session": ["m2"]}])
    OneRecTrainer(model, args, train_dataset=examples, processing_class=processor).train()
    again = pickle.loads(pickle.dumps(model)).eval()
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    sessions = [each.recommend(batch["input_ids"], batch["attention_mask"]) for each in (again, model)]
    assert torch.equal(*sessions)


def test_a_text_model_is_copied_and_pickled_too(tmp_path):
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, num_heads=2, num_layers=1, d_ff=8, decoder_start_token_id=0)
    text = T5ForConditionalGeneration(config)
    tokens = {"input_ids": torch.tensor([[5, 6, 1]]), "labels": torch.tensor([[7, 8, 1]])}
    expected = zeroed(text)(**tokens).loss.item()
    pairs = [{"prompt_ids": [5, 1], "chosen_ids": [7, 1], "rejected_ids": [8, 1]} for _ in range(4)]

    words = WordLevel({"<pad>": 0, "</s>": 1, "a": 5}, unk_token="a")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="</s>")
    trainer = dpo(text, tmp_path, pairs, processing_class=tokenizer)
    trainer.train()
    assert zeroed(trainer.model)(**tokens).loss.item() == pytest.approx(expected)
    again = pickle.loads(pickle.dumps(trainer.model)).eval()
    assert torch.equal(again(**tokens).logits, trainer.model.eval()(**tokens).logits)
