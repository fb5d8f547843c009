"""
OneRec-V2's lazy decoder against an encoder-decoder (half of the layers each) and a naive decoder-only model (history and target in one causal stack),
at equal width, depth and data: the kinds of table 2 of arXiv 2508.20900, at a size for a CPU.

    python benchmarks/speed/v2.py --json benchmarks/results/v2.json

All are dense, read one position per history item, and learn one target of three codes per user. Rows, per context (positions of the history):

    KIND/CONTEXT/flops       forward and backward pass per target (torch.utils.flop_counter; the attention of all positions, masked or not)
    KIND/CONTEXT/activations bytes that autograd saves per target, float32
    KIND/CONTEXT/seconds     CPU seconds of forward and backward pass per target, one thread, interleaved; median, spread = fastest and slowest
    packed_prefixes_break_even_CONTEXT  targets per user from which the encoder-decoder on packed prefixes (one encoder pass for all targets of a
                             history) costs fewer FLOPs per target than the lazy decoder with a context of its own for each
    lazy_flops_over_encoder_decoder_CONTEXT  ratio of the FLOPs per target

`--quick`: width 64 and contexts of 64 and 512.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/speed/v2.py`

from transformers.masking_utils import create_causal_mask

from benchmarks.harness import finish, interleaved, one_thread, parser, say
from onerec_hf import (
    OneRecConfig,
    OneRecForConditionalGeneration,
    OneRecV2Config,
    OneRecV2ForConditionalGeneration,
)
from onerec_hf.modeling.layers_onerec import (
    OneRecEncoderLayer,
    OneRecRMSNorm,
    OneRecRotaryEmbedding,
    pooled_embeddings,
)
from onerec_hf.modeling.modeling_onerec import session_loss

CODES, LAYERS, HEAD_DIM = [256, 256, 256], 8, 64
KINDS = ("encoder_decoder", "decoder_only", "lazy")
PREFIXED = "encoder_decoder"  # whose encoder is causal, so that packed prefixes may share a pass


def arguments():
    options = parser(__doc__)
    options.add_argument("--width", type=int, default=256)
    options.add_argument("--contexts", type=int, nargs="+", default=[64, 256, 512, 2048])
    options.add_argument("--repetitions", type=int, default=5)
    return options.parse_args()


class DecoderOnly(nn.Module):
    """One causal stack over the history's positions and the target's tokens; it predicts behind the target's tokens alone."""

    def __init__(self, config: OneRecConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size or 0, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([OneRecEncoderLayer(config, i) for i in range(config.encoder_layers)])
        self.norm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.rotary_emb = OneRecRotaryEmbedding(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size or 0, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of histories (users, t) without padding and targets (users, levels)."""
        config, steps = self.config, labels.shape[1]
        history = pooled_embeddings(self.embed_tokens(input_ids), config.encoder_stride)
        begin = torch.full_like(labels[:, :1], config.bos_token_id or 0)
        states = torch.cat([history, self.embed_tokens(torch.cat([begin, labels[:, :-1]], 1))], 1)
        places = torch.arange(states.shape[1], device=states.device)[None]
        mask = create_causal_mask(
            config=config, inputs_embeds=states, attention_mask=None, past_key_values=None, position_ids=None
        )
        positions, states = self.rotary_emb(states, places), self.dropout(states)
        for layer in self.layers:
            states = layer(states, attention_mask=mask, position_embeddings=positions)
        logits = self.lm_head(self.norm(states[:, -steps:]))
        return session_loss(logits, labels, config.tokens_per_item, labels.numel())


def make(kind: str, width: int, attention: str = "sdpa", layers: int = LAYERS) -> nn.Module:
    """A model of a kind in training mode."""
    shared: dict[str, Any] = {
        "codebook_sizes": CODES,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": max(1, width // HEAD_DIM),
        "num_experts": 1,
        "session_length": 1,
        "encoder_pools_items": True,
    }
    torch.manual_seed(0)
    if kind == "lazy":
        config = OneRecV2Config(decoder_layers=layers, **shared)
        config._attn_implementation = attention
        return OneRecV2ForConditionalGeneration(config).train()
    stacks = (layers // 2, layers // 2) if kind == "encoder_decoder" else (layers, 0)
    config = OneRecConfig(encoder_layers=stacks[0], decoder_layers=stacks[1], encoder_is_causal=True, **shared)
    config._attn_implementation = attention
    return (OneRecForConditionalGeneration if kind == "encoder_decoder" else DecoderOnly)(config).train()


def batch_of(context: int, users: int, targets: int = 1, device: str = "cpu") -> dict[str, torch.Tensor]:
    """
    Random histories of so many items, without padding, and targets of each user; several read prefixes of one history. On "meta" a single one reads a
    prefix, too: its mask is then made without looking at data.
    """
    torch.manual_seed(0)
    offsets = torch.tensor(OneRecConfig(codebook_sizes=CODES).level_offsets)
    history = torch.randint(256, (users, context, 3)) + offsets
    tokens = torch.cat([torch.full((users, context, 1), 3), history], -1).flatten(1)
    batch = {"input_ids": tokens, "labels": torch.randint(256, (users * targets, 3)) + offsets}
    if targets > 1 or device == "meta":
        stops = torch.arange(context - targets + 1, context + 1) * 4
        batch["history_ranges"] = torch.stack([torch.zeros_like(stops), stops], -1).expand(users, -1, -1)
    return {name: value.to(device) for name, value in batch.items()}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(model, DecoderOnly):
        return model(batch["input_ids"], batch["labels"])
    mask = None if "history_ranges" in batch else torch.ones_like(batch["input_ids"])
    return model(**batch, attention_mask=mask).loss


def count_flops(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """FLOPs of forward and backward pass; on "meta" nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        loss_of(model, batch).backward()
    return counter.get_total_flops()


def saved_bytes(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of the storages, other than weights, that autograd saves for the backward pass."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, batch)
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def flops_rows(width: int, context: int, layers: int = LAYERS) -> list[dict[str, Any]]:
    """FLOPs per target of each kind, lazy over encoder-decoder, and where packed prefixes become cheaper."""
    from onerec_hf.evaluation.results import result_row

    several, models = 4, {kind: make(kind, width, "eager", layers).to("meta") for kind in KINDS}
    flops = {kind: count_flops(model, batch_of(context, 1, device="meta")) for kind, model in models.items()}
    together = count_flops(models[PREFIXED], batch_of(context, 1, several, device="meta"))
    decoder = (together - flops[PREFIXED]) / (several - 1)  # of one more target
    encoder, saved = flops[PREFIXED] - decoder, flops["lazy"] - decoder
    rows = [result_row(f"{kind}/{context}/flops", count, "FLOP") for kind, count in flops.items()]
    ratio = flops["lazy"] / flops[PREFIXED]
    rows.append(result_row(f"lazy_flops_over_encoder_decoder_{context}", ratio, "ratio", against=PREFIXED))
    rows.append(result_row(f"packed_prefixes_break_even_{context}", encoder / saved, "targets"))
    return rows


def measured_rows(width: int, context: int, repetitions: int) -> list[dict[str, Any]]:
    """Activation memory and CPU time per target of each kind."""
    from onerec_hf.evaluation.results import result_row

    users = max(1, 2048 // context)
    models, batch = {kind: make(kind, width) for kind in KINDS}, batch_of(context, users)
    rows = [
        result_row(f"{kind}/{context}/activations", saved_bytes(model, batch) / users, "bytes")
        for kind, model in models.items()
    ]
    runs = {kind: lambda model=model: loss_of(model, batch).backward() for kind, model in models.items()}
    interleaved(runs, 1)  # warm
    cpu, _ = interleaved(runs, repetitions)
    for kind, seconds in cpu.items():
        each = [value / users for value in seconds]
        spread = [min(each), max(each)]
        rows.append(result_row(f"{kind}/{context}/seconds", statistics.median(each), "s", spread=spread))
    return rows


def main() -> None:
    options = arguments()
    if options.quick:
        options.width, options.contexts, options.repetitions = 64, [64, 512], 2
    one_thread()
    rows = []
    for context in options.contexts:
        rows += flops_rows(options.width, context)
        rows += measured_rows(options.width, context, options.repetitions)
        say(f"context {context}: {len(rows)} rows")
    finish(rows, options.json, width=options.width, layers=LAYERS)


if __name__ == "__main__":
    main()
