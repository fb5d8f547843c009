"""Models in bfloat16: what stays float32, and rankings by an item head with evidence."""

import pytest
import torch

from onerec_hf import OneRecForConditionalGeneration, OneRecProcessor
from tests.conftest import make_catalogue, make_model
from tests.rounding import assert_close

CATALOGUE = make_catalogue(14, (3, 3, 4), seed=1)
HEAD = {"num_items": 14, "loss_weight": 1.0, "evidence": True, "neighbours": 4, "content_dim": 3}


@pytest.fixture
def wide():
    model = make_model(CATALOGUE, seed=3, item_head=HEAD)
    head = model.get_encoder().item_head
    head.set_content(torch.tensor(CATALOGUE.codes, dtype=torch.long), torch.randn(14, 3))
    # A count that bfloat16 rounds to 1024.
    head.evidence.set_list("next", torch.randint(1, 15, (14, 4)), torch.full((14, 4), 1027.0))
    head.evidence.interactions.fill_(1027.0)
    head.evidence.set_weights(torch.tensor([1.0, 0.33, 0.33, 0.33, 0.33, 0.33, 0.33]))
    return model


def converted(model, folder):
    model.save_pretrained(folder)
    return OneRecForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("way", ["loaded", "to", "cast"])
def test_buffers_keep_their_precision(wide, tmp_path, way):
    wanted = {name: buffer.clone() for name, buffer in wide.named_buffers()}
    if way == "loaded":
        low = converted(wide, tmp_path)
    else:
        low = wide.to(torch.bfloat16) if way == "to" else wide.bfloat16()
    assert {weight.dtype for weight in low.parameters()} == {torch.bfloat16}
    assert dict(low.named_buffers()).keys() == wanted.keys()
    for name, buffer in low.named_buffers():
        assert buffer.dtype == wanted[name].dtype, name
        assert torch.equal(buffer, wanted[name]), name


def test_item_scores_are_those_of_the_rounded_weights(tmp_path):
    """The states are the encoder's in bfloat16; all that follows is float32."""
    wide = make_model(CATALOGUE, seed=3, item_head={**HEAD, "content_dim": 0})
    low = converted(wide, tmp_path).eval()
    inputs = OneRecProcessor.from_catalogue(CATALOGUE)([["m1", "m9", "m3"], ["m2"]])
    out = {"num_beams": 14, "num_return_sequences": 14, "session_length": 1, "return_dict_in_generate": True}
    found = low.recommend(**inputs, **out, item_score_weight=1.0, decoder_weight=0.0)
    with torch.no_grad():
        states = low.get_encoder()(**inputs).last_hidden_state
    # The same weights in float32.
    rounded = OneRecForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).to(torch.float32).eval()
    encoder = rounded.get_encoder()
    encoder.forward = lambda *_, **__: type("Output", (), {"last_hidden_state": states.float()})
    wanted = rounded.recommend(**inputs, **out, item_score_weight=1.0, decoder_weight=0.0)
    assert torch.equal(found.sequences, wanted.sequences)
    assert_close(found.sequences_scores, wanted.sequences_scores)
