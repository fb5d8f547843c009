"""The FLOPs that benchmarks/speed/v2.py counts are those that `plan` computes, and its decoder-only model reads what the others read."""

import pytest
import torch.nn.functional as F

from benchmarks.speed import v2
from onerec_hf.planning import Batch
from onerec_hf.planning.compute import step_flops


@pytest.mark.parametrize("context", [5, 64])
def test_counted_flops_are_planned_ones(context):
    lazy = v2.make("lazy", 64, "eager", layers=2)
    planned = step_flops(lazy.config, Batch(users=2, history=context, session=1))
    assert v2.count_flops(lazy, v2.batch_of(context, 2)) == planned
    model, batch = v2.make("encoder_decoder", 64, "eager", layers=2), v2.batch_of(context, 2)
    batch["labels"] = F.pad(batch["labels"], (0, 1), value=-100)  # plan counts the separator of the next item, too
    assert v2.count_flops(model, batch) == step_flops(model.config, Batch(users=2, history=context, session=1))


@pytest.mark.parametrize("kind", v2.KINDS)
def test_counting_needs_no_computing(kind):
    wanted = v2.count_flops(v2.make(kind, 64, "eager", layers=2), v2.batch_of(16, 2))
    assert v2.count_flops(v2.make(kind, 64, "eager", layers=2).to("meta"), v2.batch_of(16, 2, device="meta")) == wanted


def test_a_break_even_is_where_both_cost_the_same():
    rows = {row["name"]: row["value"] for row in v2.flops_rows(64, 16, layers=2)}
    targets = rows["packed_prefixes_break_even_16"]
    assert rows["lazy_flops_over_encoder_decoder_16"] < 1 < targets
    several = v2.count_flops(v2.make("encoder_decoder", 64, "eager", layers=2), v2.batch_of(16, 1, 3))
    one = rows["encoder_decoder/16/flops"]
    decoder = (several - one) / 2
    assert (one - decoder) / targets + decoder == pytest.approx(rows["lazy/16/flops"])


def test_the_decoder_only_model_is_causal_and_reads_the_whole_history():
    model, batch = v2.make("decoder_only", 64, layers=2).eval(), v2.batch_of(6, 1)
    embedded = model.embed_tokens(batch["input_ids"]).detach().requires_grad_()
    model.embed_tokens.forward = lambda tokens: (
        embedded if tokens.shape[1] == 24 else F.embedding(tokens, model.embed_tokens.weight)
    )
    model(batch["input_ids"], batch["labels"]).backward()
    assert bool((embedded.grad.abs().sum(-1) > 0).all())
    assert v2.saved_bytes(model.train(), batch) > 0
