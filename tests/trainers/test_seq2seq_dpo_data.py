"""Seq2SeqDPOTrainer: what it takes, in which form, and what it refuses."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
)

from onerec_hf.trainers import Seq2SeqDPOTrainer
from tests.conftest import make_model
from tests.rounding import close
from tests.trainers.preference_runs import (
    CATALOGUE,
    MAKERS,
    PROCESSOR,
    TOKENIZER,
    arguments,
    assert_same,
    bart_config,
    item_pairs,
    losses,
    make_bart,
    make_tokenizer,
    make_trainer,
    state_of,
    text_pairs,
)


def test_text_rows_in_every_form(tmp_path):
    """Strings, an implicit prompt, conversations, a stream, tokens: the same training."""
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    chatty = make_tokenizer()
    chatty.chat_template = template
    # TRL cuts an implicit prompt where the characters of the two answers begin to differ.
    plain = text_pairs(16).filter(lambda row: row["chosen"][0] != row["rejected"][0])
    implicit = plain.map(
        lambda row: {which: f"{row['prompt']} {row[which]}" for which in ("chosen", "rejected")},
        remove_columns=["prompt"],
    )
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    conversations = plain.map(
        lambda row: {name: [{"role": role, "content": row[name]}] for name, role in roles.items()},
        remove_columns=plain.column_names,
    )
    wanted = make_trainer(tmp_path, "bart", train_dataset=plain)
    wanted.train()
    tokens = wanted.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    for dataset, tokenizer in (
        (implicit, TOKENIZER),
        (conversations, chatty),
        (tokens, TOKENIZER),
    ):
        trainer = Seq2SeqDPOTrainer(
            make_bart(), args=arguments(tmp_path), train_dataset=dataset, processing_class=tokenizer
        )
        trainer.train()
        assert losses(trainer) == close(losses(wanted))
    stream = make_trainer(tmp_path, "bart", train_dataset=plain.to_iterable_dataset())
    stream.train()
    assert losses(stream)[0] == close(math.log(2))
    items = make_trainer(tmp_path, train_dataset=item_pairs().to_iterable_dataset())
    items.train()
    assert losses(items)[0] == close(math.log(2))


def test_several_rejected_texts(tmp_path):
    several = text_pairs().map(lambda row: {"rejected": [row["rejected"], "the mat", "far away log"]})
    trainer = make_trainer(tmp_path, "t5", train_dataset=several, loss_type="s_dpo")
    trainer.train()
    assert losses(trainer)[0] == close(math.log(4))
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize("kind", MAKERS)
def test_weights_in_bf16(tmp_path, kind):
    trainer = make_trainer(tmp_path, kind, MAKERS[kind]().to(torch.bfloat16))
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=2e-2)


def test_lengths_are_bounded(tmp_path):
    trainer = make_trainer(tmp_path, "bart", max_length=2, max_prompt_length=3, pad_to_multiple_of=8)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    assert batch["input_ids"].shape == (16, 8)
    assert batch["encoder_input_ids"].shape == (8, 8)
    assert batch["completion_mask"].sum(1).max() == 2
    assert batch["encoder_attention_mask"].sum(1).max() == 3
    history = make_trainer(tmp_path).data_collator([item_pairs()[5]])
    assert history["encoder_input_ids"].shape == (1, 5 * 4)  # six items, the processor reads five


def test_a_collator_of_ones_own(tmp_path):
    def collate(rows):
        return make_trainer(tmp_path).data_collator([row["pair"] for row in rows])

    nested = Dataset.from_list([{"pair": row} for row in item_pairs()])
    trainer = Seq2SeqDPOTrainer(
        make_model(CATALOGUE),
        args=arguments(tmp_path, remove_unused_columns=False),
        data_collator=collate,
        train_dataset=nested,
        processing_class=PROCESSOR,
    )
    trainer.train()
    wanted = make_trainer(tmp_path)
    wanted.train()
    assert losses(trainer) == losses(wanted)


def test_refuses(tmp_path):
    decoder_only = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is a decoder-only model.*Use trl\.DPOTrainer"):
        make_trainer(tmp_path, "t5", decoder_only)
    marian = MarianMTModel(bart_config(MarianConfig))
    marian.final_logits_bias.normal_()
    with pytest.raises(ValueError, match="applies more than a matrix product"):
        make_trainer(tmp_path, "bart", marian)
    with pytest.raises(ValueError, match=r"lacks the columns \['chosen'\]"):
        make_trainer(tmp_path, train_dataset=item_pairs().remove_columns("chosen"))
    with pytest.raises(ValueError, match="cannot be combined"):
        arguments(tmp_path, loss_type=["simpo", "sft"])
    with pytest.raises(ValueError, match="loss has no reference"):
        arguments(tmp_path, loss_type="cpo", sync_ref_model=True)
    with pytest.raises(ValueError, match=r"label_smoothing in \[0, 0.5"):
        arguments(tmp_path, loss_type="cdpo", label_smoothing=0.5)


def test_a_checkpoint_loads_and_starts_a_run_by_path(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    again = Seq2SeqDPOTrainer(
        str(tmp_path / "checkpoint-3"), args=arguments(tmp_path / "b"), train_dataset=item_pairs()
    )
    assert_same(state_of(again.model), state_of(trainer.model))
    assert again.processing_class.max_history == 5
