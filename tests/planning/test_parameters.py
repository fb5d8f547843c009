"""Counts from a config alone are those of the model that it makes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration
from onerec_hf.planning import Batch, active_parameters, count_parameters
from onerec_hf.planning.compute import forward_flops, step_flops
from onerec_hf.planning.parameters import buffer_bytes, units
from tests.planning.measuring import VARIANTS, make_model, rows


@st.composite
def configs(draw):
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    experts = draw(st.integers(1, 9))
    item_head = st.builds(
        dict,
        num_items=st.integers(5, 500),
        rank=st.none() | st.integers(1, 7),
        score_codes=st.booleans(),
        content_dim=st.integers(0, 9),
        evidence=st.booleans(),
        neighbours=st.integers(1, 60),
    )
    sides = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), max_size=3)
    of_features = {
        side: [[f"{side}{place}", *sizes] for place, sizes in enumerate(draw(sides))]
        for side in ("user", "interaction", "item")
    }
    return OneRecConfig(
        codebook_sizes=draw(st.lists(st.integers(1, 300), min_size=1, max_size=4)),
        hidden_size=draw(st.integers(1, 12)) * 8 * heads,
        head_dim=draw(st.sampled_from([None, 8, 10])),
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        intermediate_size=draw(st.integers(1, 200)),
        moe_intermediate_size=draw(st.integers(1, 200)),
        encoder_layers=draw(st.integers(0, 3)),
        decoder_layers=draw(st.integers(1, 3)),
        num_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        tie_word_embeddings=draw(st.booleans()),
        encoder_attention=draw(st.sampled_from(["softmax", "pointwise"])),
        encoder_pools_items=draw(st.booleans()),
        encoder_scales_embeddings=draw(st.booleans()),
        item_head=draw(st.none() | item_head),
        features={**of_features, "dim": draw(st.integers(1, 9))} if any(of_features.values()) else None,
    )


@settings(max_examples=40, deadline=None)
@given(configs())
def test_counts_are_those_of_the_model(config):
    with torch.device("meta"):
        model = OneRecForConditionalGeneration(config)
    assert count_parameters(config) == model.num_parameters()
    assert buffer_bytes(config) == sum(buffer.nbytes for buffer in model.buffers())
    idle = sum(
        weight.numel() // config.num_experts * (config.num_experts - config.num_experts_per_tok)
        for name, weight in model.named_parameters()
        if ".experts." in name
    )
    assert active_parameters(config) == model.num_parameters() - idle
    shapes = [shape for unit in units(config) for shape in unit.shapes * unit.copies]
    modules = [tuple(weight.shape) for _, weight in model.named_parameters(remove_duplicate=False)]
    assert sorted(shapes) == sorted(modules)


@pytest.mark.parametrize("experts", [1, 6])
@pytest.mark.parametrize("key_value_heads", [4, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_that_torch_counts(experts, key_value_heads, variant):
    config = OneRecConfig(
        codebook_sizes=[7, 8],
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        encoder_layers=2,
        decoder_layers=3,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        num_experts=experts,
        **VARIANTS[variant],
    )
    config._attn_implementation = "eager"
    model = make_model(config).train()
    if experts > 1:
        model.set_experts_implementation("eager")
    batch = Batch(users=3, history=4, session=2)
    data = rows(config, batch)
    with FlopCounterMode(display=False) as counter:
        loss = model(**data).loss
    assert counter.get_total_flops() == forward_flops(config, batch)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    # The first layer's input is an embedding whose rows need a gradient: every product has both gradients.
    assert counter.get_total_flops() == step_flops(config, batch) - forward_flops(config, batch)
