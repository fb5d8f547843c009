"""Computed memory and communication against what training steps hold and send: one process, and two gloo ranks."""

import json

import pytest
import torch

from onerec_hf import OneRecConfig
from onerec_hf.planning import Batch, Layout
from onerec_hf.planning.activations import AUTOCAST, BFLOAT16, FLOAT32, activations
from onerec_hf.planning.parameters import autocast_parameters, scored_items
from tests.planning.measuring import VARIANTS, LiveBytes, SavedTensors, make_model, rows
from tests.ranks import torchrun

PRECISIONS = {"float32": FLOAT32, "mixed": AUTOCAST, "bfloat16": BFLOAT16}
SMALL = {
    "codebook_sizes": [61, 61, 61],
    "hidden_size": 64,
    "intermediate_size": 160,
    "moe_intermediate_size": 96,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 8,
}
SIZES = {
    "small": {},
    "dense": {"num_experts": 1},
    "grouped heads": {"num_key_value_heads": 2},
    "plain": {"dropout_rate": 0.0, "cross_attention_rope": False, "encoder_layers": 1},
    "wide": {"hidden_size": 128, "codebook_sizes": [300, 300], "encoder_is_causal": True, "num_experts_per_tok": 4},
    "causal pointwise": {"encoder_attention": "pointwise", "encoder_is_causal": True, "num_key_value_heads": 2},
}
# One layer each: what the decoder keeps is measured above.
SIZES |= {
    name: {"codebook_sizes": [7, 8], "num_experts": 1, "encoder_layers": 1, "decoder_layers": 1, **changes}
    for name, changes in VARIANTS.items()
}


def make(config, dtype):
    torch.manual_seed(0)
    model = make_model(config).train()
    if config.num_experts > 1:
        model.set_experts_implementation("grouped_mm")
    return model.to(torch.bfloat16) if dtype == "bfloat16" else model


def forward(model, dtype, data):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "mixed"):
        return model(**data).loss


def log_softmax(config, batch):
    """Bytes of the one copy of the logits that is saved, of tokens and of items."""
    return 4 * (batch.tokens(config)[1] * config.vocab_size + batch.users * scored_items(config))


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("size", SIZES)
def test_saved_tensors_to_the_byte(size, dtype, padded):
    config, batch = OneRecConfig(**{**SMALL, **SIZES[size]}), Batch(users=6, history=10, session=5)
    model = make(config, dtype)
    saved = SavedTensors(model, copies=torch.bfloat16 if dtype == "mixed" else None)
    with saved:
        forward(model, dtype, rows(config, batch, padded))
    computed = activations(config, batch, PRECISIONS[dtype], accelerator=False, masked=padded)
    assert saved.activations == computed.kept() + log_softmax(config, batch)
    assert saved.copies == (2 * autocast_parameters(config) if dtype == "mixed" else 0)


@pytest.mark.parametrize("variant", ["paper", "pointwise", "item head", "item head of low rank"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_sum_bounds_what_a_step_holds_at_its_peak(dtype, checkpointing, variant):
    sizes = {} if variant == "paper" else {"codebook_sizes": [7, 8]}
    config = OneRecConfig(**{**SMALL, **sizes, **VARIANTS[variant]})
    batch = Batch(users=24, history=20, session=5)
    model, data = make(config, dtype), rows(config, batch)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    forward(model, dtype, data).backward()
    optimizer.step()
    optimizer.zero_grad()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    with LiveBytes([*model.parameters(), *model.buffers(), *data.values(), *moments]) as live:
        loss = forward(model, dtype, data)
        after_forward = live.live
        loss.backward()
    computed = activations(config, batch, PRECISIONS[dtype], accelerator=False)
    memory = Layout("ddp", gpus=1).memory(config, dtype)
    total = computed.kept(checkpointing) + computed.logits + memory["gradients"] + memory["gathered"]
    states = memory["weights"] + memory["optimizer"]
    assert 0.7 * (total + states) < live.peak + states <= total + states
    if checkpointing:  # what of the layers is kept until they are computed again
        outside = computed.shared + computed.boundary + log_softmax(config, batch)
        assert after_forward == pytest.approx(outside + memory["gathered"], rel=0.1)


BATCH = Batch(users=6, history=10, session=5)
STRATEGIES = [
    {"strategy": "ddp", "dtype": "float32"},
    {"strategy": "ddp", "dtype": "mixed"},
    {"strategy": "fsdp", "dtype": "float32", "shards": 2},
    {"strategy": "fsdp", "dtype": "mixed", "shards": 2},
    {"strategy": "fsdp+ep", "dtype": "float32", "shards": 2, "experts": 2},
    {"strategy": "fsdp+ep", "dtype": "mixed", "shards": 2, "experts": 2},
    {"strategy": "fsdp+ep", "dtype": "float32", "shards": 2, "experts": 2, "checkpointing": True},
]


def measured_on_two_ranks(config, folder):
    """Numbers of every strategy: (rank 0's, rank 1's)."""
    make_model(config).save_pretrained(folder)
    strategies = json.dumps([{**strategy, "batch": vars(BATCH)} for strategy in STRATEGIES])
    done = torchrun("-m", "tests.planning.measuring", folder, strategies)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    return list(zip(*ranks, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts": 6, "hidden_size": 96, "num_key_value_heads": 2},
        {
            "encoder_attention": "pointwise",
            "encoder_pools_items": True,
            "codebook_sizes": [3, 3, 7],
            "item_head": {"num_items": 63},  # and one vector more, the same number on both ranks
        },
    ],
)
def test_two_ranks_hold_and_send_what_is_computed(changes, tmp_path):
    config = OneRecConfig(**{**SMALL, **changes})
    for strategy, ranks in zip(STRATEGIES, measured_on_two_ranks(config, tmp_path), strict=True):
        kind, dtype = strategy["strategy"], strategy["dtype"]
        checkpointing = strategy.get("checkpointing", False)
        layout = Layout(kind, 2, strategy.get("shards", 1), strategy.get("experts", 1))
        memory = layout.memory(config, dtype)
        for rank in ranks:
            for name in ("weights", "gradients", "optimizer"):
                assert rank[name] == memory[name], (strategy, name)
        if not checkpointing:
            computed = activations(
                config, BATCH, layout.precision(dtype), accelerator=False, expert_ranks=layout.experts
            )
            kept = computed.kept() + log_softmax(config, BATCH)
            assert [rank["activations"] for rank in ranks] == [kept, kept], strategy
        sent = dict.fromkeys(ranks[0]["collectives"], 0)
        for collective in layout.collectives(config, BATCH, dtype, checkpointing):
            sent[collective.kind] += collective.payload
        for name, payload in sent.items():
            assert sum(rank["collectives"][name] for rank in ranks) == 2 * payload, (strategy, name)
