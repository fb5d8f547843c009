"""Seq2SeqDPOTrainer on other encoder-decoder families of transformers: padded batches score as rows by themselves, and what is saved loads."""

import math

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    LongT5Config,
    LongT5ForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from tests.rounding import close
from tests.trainers.preference_runs import (
    assert_same,
    bart_config,
    by_hand,
    losses,
    make_trainer,
    state_of,
    text_pairs,
)


def t5_config(cls):
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return cls(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, **tokens)


def t5gemma_config():
    tokens = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    half = {**tokens, **sizes, **heads}
    return T5GemmaConfig(encoder=half, decoder=half, decoder_start_token_id=2, **tokens)


FAMILIES = {
    "mt5": lambda: MT5ForConditionalGeneration(t5_config(MT5Config)),
    "umt5": lambda: UMT5ForConditionalGeneration(t5_config(UMT5Config)),
    "longt5": lambda: LongT5ForConditionalGeneration(t5_config(LongT5Config)),
    "mbart": lambda: MBartForConditionalGeneration(bart_config(MBartConfig)),
    "pegasus": lambda: PegasusForConditionalGeneration(bart_config(PegasusConfig)),
    "marian": lambda: MarianMTModel(bart_config(MarianConfig)),
    "m2m": lambda: M2M100ForConditionalGeneration(bart_config(M2M100Config)),
    "t5gemma": lambda: T5GemmaForConditionalGeneration(t5gemma_config()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(tmp_path, family):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    trainer = make_trainer(tmp_path / "run", "bart", model)
    before = state_of(model)
    kind = "t5" if "t5" in family and family != "t5gemma" else "bart"  # what the decoder begins with
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    got = trainer.compute_ref_log_probs(trainer.ref_model, batch)[0].tolist()
    plain = FAMILIES[family]()
    plain.load_state_dict(before)
    assert got == close([by_hand(plain, kind, row, "chosen")[0] for row in text_pairs()])
    trainer.train()
    assert losses(trainer)[0] == close(math.log(2))
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved")
    assert_same(state_of(again), state_of(trainer.model))
    with torch.no_grad():
        prompt = torch.tensor([[4, 5, 6]])
        first, second = (each.eval().generate(input_ids=prompt, max_new_tokens=5) for each in (again, trainer.model))
    assert torch.equal(first, second)
