"""OneRec-V2: parameters, FLOPs and activation memory computed from its config are those of the model."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from onerec_hf import OneRecV2Config, OneRecV2ForConditionalGeneration
from onerec_hf.cli.plan import load_config
from onerec_hf.planning import Batch, Layout, active_parameters, count_parameters, layouts, make_plan
from onerec_hf.planning.activations import AUTOCAST, BFLOAT16, FLOAT32, activations
from onerec_hf.planning.compute import forward_flops, step_flops
from onerec_hf.planning.parameters import autocast_parameters, buffer_bytes, units
from tests.planning.measuring import LiveBytes, SavedTensors, rows

SMALL = {
    "codebook_sizes": [61, 60, 59],
    "hidden_size": 64,
    "intermediate_size": 160,
    "moe_intermediate_size": 96,
    "decoder_layers": 3,
    "num_attention_heads": 4,
}
SIZES = {
    "plain": {},
    "no dropout, no rope": {"dropout_rate": 0.0, "cross_attention_rope": False, "tie_word_embeddings": False},
    "shared keys and values": {"context_groups": 2, "context_split": 2, "context_layers": 2, "num_key_value_heads": 2},
    "tokens": {"encoder_pools_items": False, "context_groups": 1},
    "experts": {"num_experts": 8, "first_dense_layers": 1},
    "experts, none of them shared": {"num_experts": 8, "num_shared_experts": 0},
    "vectors": {"item_head": {"num_items": 50, "content_dim": 5, "loss_weight": 0}},
    "features": {"features": {"user": [["age", 9, 1], ["tags", 7, 2]], "item": [["year", 6, 1]], "dim": 5}},
}
each_size = pytest.mark.parametrize("size", SIZES)


def lazy_rows(config, batch, padded=True):
    """The decoder does not read the last code."""
    data = rows(config, batch, padded)
    return data | {name: data[name][:, :-1] for name in ("labels", "decoder_attention_mask")}


def make(size, experts="grouped_mm", attention=None):
    config = OneRecV2Config(**{**SMALL, **SIZES[size]})
    config._attn_implementation = attention
    model = OneRecV2ForConditionalGeneration(config).train()
    if config.num_experts > 1:
        model.set_experts_implementation(experts)
    return config, model


@each_size
def test_counts_are_those_of_the_model(size):
    config, model = make(size)
    assert count_parameters(config) == model.num_parameters()
    assert buffer_bytes(config) == sum(buffer.nbytes for buffer in model.buffers())
    idle = sum(w.numel() // 8 * 6 for name, w in model.named_parameters() if ".experts." in name)
    assert active_parameters(config) == model.num_parameters() - idle
    shapes = [shape for unit in units(config) for shape in unit.shapes * unit.copies]
    assert sorted(shapes) == sorted(tuple(w.shape) for _, w in model.named_parameters(remove_duplicate=False))


@each_size
@pytest.mark.parametrize("session", [1, 2])
def test_flops_are_those_that_torch_counts(size, session):
    config, model = make(size, "eager", "eager")
    batch = Batch(users=3, history=7, session=session)
    with FlopCounterMode(display=False) as counter:
        loss = model(**lazy_rows(config, batch, padded=False)).loss
    assert counter.get_total_flops() == forward_flops(config, batch)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == step_flops(config, batch) - forward_flops(config, batch)


@each_size
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
def test_saved_tensors_to_the_byte(size, padded):
    config, model = make(size)
    batch = Batch(users=6, history=10, session=2)
    for dtype, precision in (("float32", FLOAT32), ("mixed", AUTOCAST), ("bfloat16", BFLOAT16)):
        model.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        saved = SavedTensors(model, copies=torch.bfloat16 if dtype == "mixed" else None)
        with saved, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "mixed"):
            model(**lazy_rows(config, batch, padded))
        computed = activations(config, batch, precision, accelerator=False, masked=padded)
        log_softmax = 4 * batch.users * batch.session * sum(config.codebook_sizes)
        assert saved.activations == computed.kept() + log_softmax, dtype
        assert saved.copies == (2 * autocast_parameters(config) if dtype == "mixed" else 0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", ["plain", "experts"])
def test_the_sum_bounds_what_a_step_holds_at_its_peak(size, checkpointing):
    config, model = make(size)
    batch = Batch(users=24, history=40, session=2)
    data = lazy_rows(config, batch)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model(**data).loss.backward()
    model.zero_grad()
    with LiveBytes([*model.parameters(), *model.buffers(), *data.values()]) as live:
        model(**data).loss.backward()
    computed = activations(config, batch, FLOAT32, accelerator=False)
    total = computed.kept(checkpointing) + computed.logits + computed.exchange
    total += Layout("ddp", gpus=1).memory(config, "float32")["gradients"]
    assert 0.6 * total < live.peak <= total


def test_plan_reads_the_config(tmp_path):
    config, _ = make("experts")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    read = load_config(str(tmp_path / "config.json"))
    assert type(read) is OneRecV2Config
    plan = make_plan(read, Layout("ddp", gpus=1), Batch(users=8))
    assert plan.fits
    assert plan.flops == step_flops(config, Batch(users=8))
    problems = {layout.strategy: layout.problem(read) for layout in layouts(read, 8)}
    assert problems["fsdp"] is None
    assert problems["fsdp+ep"] == "OneRec-V2 does not distribute its experts"
    assert all(plan.memory.values() for plan in [make_plan(read, Layout("fsdp", 8, 8), Batch(users=8))])
