"""OneRec-V2 in the trainers: it learns windows and prefixes, balances its experts, and aligns as OneRec does."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM

from onerec_hf import OneRecProcessor, OneRecV2Config, OneRecV2ForConditionalGeneration
from onerec_hf.trainers import (
    OneRecDPOConfig,
    OneRecDPOTrainer,
    OneRecTrainer,
    OneRecTrainingArguments,
    Seq2SeqDPOConfig,
    Seq2SeqDPOTrainer,
)
from tests.conftest import make_catalogue
from tests.rounding import assert_close

CATALOGUE = make_catalogue(30, (4, 4, 4))
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=5)
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "seed": 1}
# Item i is followed by i + 1.
WINDOWS = Dataset.from_list(
    [
        {"history": [f"m{(s + j) % 30}" for j in range(1 + s % 4)], "session": [f"m{(s + 1 + s % 4) % 30}"]}
        for s in range(60)
    ]
)
PREFIXES = Dataset.from_list(
    [
        {
            "history": [f"m{(s + j) % 30}" for j in range(4)],
            "sessions": [[f"m{(s + j + 1) % 30}"] for j in range(4)],
            "history_lengths": [1, 2, 3, 4],
        }
        for s in range(30)
    ]
)
PAIRS = Dataset.from_list(
    [{"history": [f"m{i}"], "chosen": [f"m{i + 1}"], "rejected": [f"m{i + 9}"]} for i in range(8)]
)


def make_lazy(**config):
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "decoder_layers": 2,
        "dropout_rate": 0.0,
    }
    torch.manual_seed(0)
    experts = {"num_experts": 4, "first_dense_layers": 1, "context_groups": 2}
    return OneRecV2ForConditionalGeneration(
        OneRecV2Config(codebook_sizes=CATALOGUE.codebook_sizes, **{**settings, **experts, **config})
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train_dataset", "settings"),
    [
        (WINDOWS, {}),
        (PREFIXES, {}),
        (PREFIXES, {"packing": True, "packing_length": 12, "session_share": 0.7}),
    ],
    ids=["windows", "prefixes", "packed prefixes, some of them"],
)
def test_it_learns_the_next_item(train_dataset, settings, tmp_path):
    args = OneRecTrainingArguments(
        str(tmp_path),
        max_steps=60,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        eval_num_beams=10,
        **QUIET,
        **settings,
    )
    trainer = OneRecTrainer(
        make_lazy(), args, train_dataset=train_dataset, eval_dataset=WINDOWS, processing_class=PROCESSOR
    )
    before, bias = trainer.evaluate(), trainer.model.model.decoder.layers[1].mlp.gate.e_score_correction_bias.clone()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_recall@5"] > 0.7 > before["eval_recall@5"]
    assert trainer.tokens_per_expert.shape == (1, 4)
    assert not torch.equal(trainer.model.model.decoder.layers[1].mlp.gate.e_score_correction_bias, bias)
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(*(each.recommend(**PROCESSOR([["m3"]])) for each in (loaded, trainer.model)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"loss_type": ["sigmoid"], "use_weighting": True}], ids=["sigmoid", "weighted"]
)
def test_preferences_are_scored_by_the_model_s_own_logits(settings, tmp_path):
    model = make_lazy().eval()
    trainer = Seq2SeqDPOTrainer(
        copy.deepcopy(model),
        args=Seq2SeqDPOConfig(str(tmp_path), max_steps=2, learning_rate=1e-2, **QUIET, **settings),
        train_dataset=PAIRS,
        eval_dataset=PAIRS,
        processing_class=PROCESSOR,
    )
    batch = trainer.data_collator([PAIRS[0], PAIRS[5]])
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    for scores, column in ((chosen, "chosen"), (rejected, "rejected")):
        for row, score in zip((PAIRS[0], PAIRS[5]), scores, strict=True):
            with torch.no_grad():
                loss = model(**PROCESSOR([row["history"]], sessions=[row[column]])).loss
            assert_close(score, -3 * loss)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]
    assert all(value == value for value in after.values())  # no metric is NaN
    again = copy.deepcopy(trainer.model).eval()
    assert torch.equal(again.recommend(**PROCESSOR([["m3"]])), trainer.model.eval().recommend(**PROCESSOR([["m3"]])))


@pytest.mark.slow
def test_iterative_alignment_draws_and_trains(tmp_path):
    def prefers_small(histories, sessions):
        return [-float(session[0][1:]) for session in sessions]

    rows = Dataset.from_list([{"history": [f"m{i}"], "session": [f"m{i + 1}"]} for i in range(8)])
    args = OneRecDPOConfig(str(tmp_path), max_steps=2, num_candidates=4, dpo_ratio=1.0, **QUIET)
    trainer = OneRecDPOTrainer(
        make_lazy(), reward_funcs=prefers_small, args=args, train_dataset=rows, processing_class=PROCESSOR
    )
    start = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(*pair) for pair in zip(start, trainer.model.parameters(), strict=True))
