"""The encoder's attention without a softmax: its formula, what it sees, packed rows, saving."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSeq2SeqLM

from onerec_hf import OneRecConfig, OneRecProcessor
from tests.conftest import make_catalogue, make_model
from tests.modeling.test_packing import PREFIXES, assert_equal_to_windows, pack, windows_of
from tests.rounding import assert_close

CATALOGUE = make_catalogue()
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=8)


def make(**config):
    return make_model(CATALOGUE, encoder_attention="pointwise", **config)


@pytest.mark.parametrize("groups", [4, 2])
def test_the_formula(groups):
    attention = make(num_key_value_heads=groups).model.encoder.layers[0].self_attn
    states, turn = torch.randn(1, 5, 32), torch.zeros(1, 5, 8)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    out, _ = attention(states, (turn.cos(), turn.sin()), mask)  # turned by nothing
    q, k, v, u = (F.silu(getattr(attention, f"{name}_proj")(states[0])) for name in "qkvu")
    heads = []
    for head in range(4):
        mine, shared = slice(8 * head, 8 * head + 8), slice(8 * (head * groups // 4), 8 * (head * groups // 4) + 8)
        rows = []
        for i in range(5):
            rows.append(sum(F.silu(q[i, mine] @ k[j, shared] / 8**0.5) / 10 * v[j, shared] for j in range(i + 1)))
        heads.append(torch.stack(rows))
    summed = torch.cat(heads, -1)
    normed = summed / (summed.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_close(out[0], attention.o_proj(normed * u))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing_and_a_causal_one_does_not_look_ahead(causal):
    model = make(encoder_is_causal=causal)
    alone = model.model.encoder(**PROCESSOR([["m5", "m1"]])).last_hidden_state
    beside = model.model.encoder(**PROCESSOR([["m5", "m1"], ["m1", "m2", "m3"]])).last_hidden_state[0, :8]
    assert_close(beside, alone[0])
    longer = model.model.encoder(**PROCESSOR([["m5", "m1", "m7"]])).last_hidden_state[0, :8]
    assert torch.allclose(longer, alone[0], atol=1e-5) is causal


@pytest.mark.parametrize("causal", [False, True])
def test_packed_rows_equal_windows(causal):
    model = make(encoder_is_causal=causal)
    examples = PREFIXES if causal else windows_of(PREFIXES)
    assert_equal_to_windows(model, pack(examples, causal), windows_of(PREFIXES))


def test_it_is_saved_and_recommends(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    inputs = PROCESSOR([["m1", "m2"]])
    assert torch.equal(loaded.recommend(**inputs), model.recommend(**inputs))
    assert not torch.equal(make_model(CATALOGUE).recommend(**inputs), model.recommend(**inputs))


def test_other_names_are_refused():
    with pytest.raises(Exception, match="choose softmax or pointwise"):
        OneRecConfig(encoder_attention="linear")
