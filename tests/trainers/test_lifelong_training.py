"""Trainers of models with a lifelong pathway: evaluation, preferences, and processors of other models."""

import math

import pytest
import torch
from datasets import Dataset

from onerec_hf import OneRecProcessor
from onerec_hf.modeling.lifelong_history import LifelongHistory
from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments, Seq2SeqDPOConfig, Seq2SeqDPOTrainer
from tests.modeling.test_lifelong import HISTORIES, made

WINDOWS = Dataset.from_dict({"history": HISTORIES, "session": [[9], [7], [12]]})
PAIRS = Dataset.from_dict({"history": HISTORIES, "chosen": [[9], [7], [12]], "rejected": [[1], [2], [4]]})
QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}


def make_trainer(folder, model, processor, **settings):
    arguments = OneRecTrainingArguments(str(folder), max_steps=1, **QUIET, **settings)
    return OneRecTrainer(model, arguments, train_dataset=WINDOWS, eval_dataset=WINDOWS, processing_class=processor)


def make_dpo(folder, model, processor):
    arguments = Seq2SeqDPOConfig(str(folder), max_steps=1, learning_rate=1e-2, logging_steps=1, **QUIET)
    return Seq2SeqDPOTrainer(model, args=arguments, train_dataset=PAIRS, processing_class=processor)


@pytest.mark.parametrize("make", [make_trainer, make_dpo])
def test_a_processor_with_another_number_of_queries_is_refused(tmp_path, make):
    model, processor = made()
    lifelong = LifelongHistory(processor.lifelong.vectors, 3, 4)
    other = OneRecProcessor.from_catalogue(model.catalogue, max_history=4, lifelong=lifelong)
    with pytest.raises(ValueError, match="different lifelong pathways"):
        make(tmp_path, model, other)


def test_evaluation_ranks_what_recommend_finds(tmp_path):
    model, processor = made()
    found = model.recommend(**processor(HISTORIES), session_length=1, num_beams=40, num_return_sequences=20)
    items = [item for (item,) in processor.batch_decode(found)]
    hits = [target[0] in items[20 * user : 20 * user + 20] for user, target in enumerate(WINDOWS["session"])]
    assert 0 < sum(hits) < 3
    trainer = make_trainer(tmp_path, model, processor, eval_top_k=[20], eval_num_beams=40, eval_exclude_seen=False)
    assert trainer.evaluate()["eval_recall@20"] == pytest.approx(sum(hits) / 3)


def test_dpo_takes_a_step(tmp_path):
    model, processor = made()
    before = model.model.encoder.lifelong.queries.detach().clone()
    trainer = make_dpo(tmp_path, model, processor)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert not torch.equal(model.model.encoder.lifelong.queries, before)
