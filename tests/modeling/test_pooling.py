"""One place per item in the encoder: what a place is, masks and packed rows, generation, the item loss, saving."""

import onnxruntime
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from onerec_hf import OneRecProcessor
from onerec_hf.cli.export import export_onnx
from tests.conftest import make_catalogue, make_model
from tests.modeling.test_packing import PREFIXES, assert_equal_to_windows, pack, windows_of
from tests.rounding import assert_close

CATALOGUE = make_catalogue()
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=8)
HISTORIES, SESSIONS = [["m1", "m2", "m3"], ["m5"]], [["m4", "m6"], ["m7"]]
ITEMS = {"item_head": {"num_items": len(CATALOGUE)}}
CODES = {"item_head": {"num_items": len(CATALOGUE), "score_codes": True}, "encoder_scales_embeddings": True}


def make(**config):
    return make_model(CATALOGUE, encoder_pools_items=True, **config)


@pytest.mark.parametrize("attention", ["softmax", "pointwise"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_place_is_the_sum_of_an_items_embeddings(attention, causal):
    config = {"encoder_attention": attention, "encoder_is_causal": causal}
    model, reads_tokens = make(**config), make_model(CATALOGUE, **config)
    reads_tokens.load_state_dict(model.state_dict())
    batch = PROCESSOR(HISTORIES, SESSIONS)
    embedded = model.model.encoder.embed_tokens(batch["input_ids"])
    places = torch.stack([embedded[:, 4 * i : 4 * i + 4].sum(1) for i in range(3)], dim=1)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    decoder = {name: batch[name] for name in ("decoder_input_ids", "decoder_attention_mask", "labels")}
    wanted = reads_tokens(inputs_embeds=places, attention_mask=mask, **decoder)
    out = model(**batch)
    assert out.encoder_last_hidden_state.shape == (2, 3, 32)
    assert_close(out.encoder_last_hidden_state, wanted.encoder_last_hidden_state)
    assert_close(out.logits, wanted.logits)
    assert_close(out.loss, wanted.loss)


def test_padding_changes_nothing():
    model = make()
    batch = PROCESSOR(HISTORIES, SESSIONS)
    alone = model(**PROCESSOR(HISTORIES[1:], SESSIONS[1:])).logits[0]
    assert_close(model(**batch).logits[1, :3], alone[:3])
    left = {"input_ids": batch["input_ids"].roll(8, 1), "attention_mask": batch["attention_mask"].roll(8, 1)}
    second = {name: value[1:] for name, value in {**batch, **left}.items()}
    assert_close(model(**second).logits[0, :3], alone[:3])


@pytest.mark.parametrize(
    "config", [{}, {"encoder_attention": "pointwise"}, ITEMS], ids=["softmax", "pointwise", "items"]
)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_rows_equal_windows(config, causal):
    model = make(encoder_is_causal=causal, **config)
    examples = PREFIXES if causal else windows_of(PREFIXES)
    assert_equal_to_windows(model, pack(examples, causal), windows_of(PREFIXES))


def test_generate_and_recommend_agree():
    model, inputs = make(), PROCESSOR(HISTORIES)
    asked = {"num_beams": 6, "num_return_sequences": 6, "return_dict_in_generate": True}
    ours = model.recommend(**inputs, session_length=2, **asked)
    theirs = model.generate(**inputs, max_new_tokens=7, length_penalty=0.0, output_scores=True, **asked)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_close(ours.sequences_scores, theirs.sequences_scores)
    fast = model.generate(**inputs, max_new_tokens=7, length_penalty=0.0, **asked)
    assert torch.equal(ours.sequences, fast.sequences)


@pytest.mark.parametrize("config", [ITEMS, CODES], ids=["vectors", "codes"])
def test_the_best_beam_is_as_likely_as_the_forward_says(config):
    model = make(**config)
    for history in HISTORIES:
        inputs = PROCESSOR([history])
        out = model.recommend(
            **inputs, num_beams=40, session_length=1, item_score_weight=0.5, return_dict_in_generate=True
        )
        (item,) = PROCESSOR.batch_decode(out.sequences)
        with torch.no_grad():
            said = model(**PROCESSOR([history], [item]))
            state = said.encoder_last_hidden_state[0, -1]
            encoder = model.model.encoder
            names = (encoder.item_head.output_vectors(encoder.embed_tokens) @ state).log_softmax(-1)
            named = names[encoder.item_head.rows(out.sequences[0, 1:]) - 1]
        labels = out.sequences[0, 1:]
        codes = said.logits[0].log_softmax(-1).gather(1, labels[:, None]).sum()
        assert_close(out.sequences_scores[0], codes + 0.5 * named)


def test_every_weight_learns():
    model = make(**ITEMS).train()
    model(**PROCESSOR(HISTORIES, SESSIONS)).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_it_is_saved(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    inputs = PROCESSOR(HISTORIES)
    assert torch.equal(loaded.recommend(**inputs), model.recommend(**inputs))
    assert not torch.equal(make_model(CATALOGUE).recommend(**inputs), model.recommend(**inputs))


@pytest.mark.slow
def test_it_is_exported(tmp_path):
    differences = export_onnx(make(), PROCESSOR, tmp_path)  # itself compared with the model, on other sizes
    assert differences.keys() == {"encoder", "decoder"}
    batch = PROCESSOR(HISTORIES)
    inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    (states,) = onnxruntime.InferenceSession(tmp_path / "encoder.onnx").run(None, inputs)
    assert states.shape == (2, 3, 32)


def test_half_an_item_is_refused():
    with pytest.raises(ValueError, match="whole items, 4 tokens each; got 6 tokens"):
        make()(inputs_embeds=torch.zeros(1, 6, 32), labels=torch.tensor([[5, 9, 13]]))
