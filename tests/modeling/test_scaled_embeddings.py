"""`decoder_scales_embeddings`: the decoder reads its embeddings times the root of the width, in training and in both ways to generate."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from onerec_hf import OneRecProcessor
from tests.conftest import make_catalogue, make_model
from tests.modeling.test_onerec_v2 import make_lazy
from tests.rounding import assert_close

CATALOGUE = make_catalogue()


def make(kind, scaled):
    if kind == "onerec":
        return make_model(CATALOGUE, decoder_scales_embeddings=scaled)
    return make_lazy(session_length=2, decoder_scales_embeddings=scaled)


@pytest.mark.parametrize("kind", ["onerec", "onerec_v2"])
def test_what_the_decoder_reads(kind):
    model, plain = make(kind, True), make(kind, False)
    plain.load_state_dict(model.state_dict())
    catalogue = model.catalogue
    processor = OneRecProcessor.from_catalogue(catalogue)
    items = catalogue.item_ids
    batch = processor([items[:3], items[4:5]], sessions=[items[5:7], items[7:9]])
    out = model(**batch)
    written = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    embeds = plain.model.decoder.embed_tokens(written) * plain.config.hidden_size**0.5
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert_close(plain(**inputs, decoder_inputs_embeds=embeds).logits, out.logits, terms=4096)
    assert not torch.allclose(plain(**batch).logits, out.logits)
    # Embeddings that are given are not scaled, and a model without the option reads what it read.
    assert_close(model(**inputs, decoder_inputs_embeds=embeds).logits, out.logits, terms=4096)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["onerec", "onerec_v2"])
def test_both_ways_to_generate_agree(kind, tmp_path):
    model = make(kind, True)
    processor = OneRecProcessor.from_catalogue(model.catalogue)
    items = model.catalogue.item_ids
    inputs = processor([items[:3], items[4:5]])
    found = model.recommend(**inputs, num_beams=6, num_return_sequences=6, return_dict_in_generate=True)
    again = model.generate(
        **inputs,
        num_beams=6,
        num_return_sequences=6,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert torch.equal(found.sequences, again.sequences)
    assert_close(found.sequences_scores, again.sequences_scores, terms=4096)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert loaded.config.decoder_scales_embeddings
    assert torch.equal(loaded.recommend(**inputs, num_beams=6), model.recommend(**inputs, num_beams=6))
