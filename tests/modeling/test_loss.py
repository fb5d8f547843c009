"""The session loss: weights of a session's items and label smoothing equal a hand computation, in the loss of codes and in that of items."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf import OneRecProcessor
from onerec_hf.modeling.modeling_onerec import session_loss
from tests.conftest import make_catalogue, make_model
from tests.rounding import assert_close

CATALOGUE = make_catalogue()
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=8)
BATCH = PROCESSOR([["m1", "m2", "m3"], ["m5"]], [["m4", "m6"], ["m7"]])


@settings(deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0.0, 0.1, 0.9]))
def test_each_code_token_costs_what_its_item_weighs(data, rows, items, levels, smoothing):
    weights = data.draw(st.none() | st.lists(st.floats(0.1, 5), min_size=1, max_size=items))
    lengths = data.draw(st.lists(st.integers(1, items), min_size=rows, max_size=rows))
    torch.manual_seed(0)
    stride = levels + 1
    logits, labels = torch.randn(rows, items * stride, 11), torch.full((rows, items * stride), -100)
    wanted, tokens = 0.0, 0
    for row, length in enumerate(lengths):
        for item in range(length):
            for place in range(item * stride, item * stride + levels):
                labels[row, place] = (row + place) % 11
                log_probs = logits[row, place].log_softmax(-1)
                cost = -(1 - smoothing) * log_probs[labels[row, place]] - smoothing * log_probs.mean()
                wanted += cost * (
                    1 if weights is None else (weights + items * weights[-1:])[item] * len(weights) / sum(weights)
                )
                tokens += 1
    value = session_loss(logits, labels, stride, tokens, weights, smoothing)
    assert_close(value, torch.as_tensor(wanted / tokens))
    half = session_loss(logits, labels, stride, torch.tensor(2 * tokens), weights, smoothing)
    assert_close(half, value / 2)


def test_session_weights_weigh_the_items_of_a_session():
    model = make_model(CATALOGUE)
    log_probs = model(**BATCH).logits.log_softmax(-1)
    costs = F.nll_loss(log_probs.flatten(0, 1), BATCH["labels"].flatten(), reduction="none").view(2, -1)
    assert_close(model(**BATCH).loss, costs.sum() / 9)
    weighted = model(**BATCH, session_weights=[3, 1]).loss
    assert_close(weighted, (1.5 * costs[:, :3].sum() + 0.5 * costs[:, 3:].sum()) / 9)


def test_smoothing_reaches_the_loss_of_items():
    model = make_model(CATALOGUE, item_head={"num_items": len(CATALOGUE)})
    out = model(**BATCH, smoothing=0.2)
    model.config.item_head.loss_weight = 0
    plain = model(**BATCH, smoothing=0.2)
    embedding = model.model.encoder.item_head
    states = torch.stack([out.encoder_last_hidden_state[0, 11], out.encoder_last_hidden_state[1, 3]])
    scores = states @ embedding.vectors.weight[1:].T
    named = embedding.rows(BATCH["labels"][:, :3]) - 1
    wanted = 3 / 9 * F.cross_entropy(scores, named, label_smoothing=0.2, reduction="sum")
    assert_close(out.loss - plain.loss, wanted, scale=float(out.loss.detach()))
