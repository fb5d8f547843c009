"""Floating-point operations of a training step: two per multiplication in matrix products, padding included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onerec_hf.planning.parameters import (
    attention_widths,
    content_dim,
    feature_networks,
    is_pointwise,
    matrix_parameters,
    scored_items,
    static_places,
)

if TYPE_CHECKING:
    from onerec_hf.modeling.configuration_onerec import OneRecConfig
    from onerec_hf.planning.activations import Batch


def forward_flops(config: OneRecConfig, batch: Batch) -> int:
    """
    FLOPs of one forward pass on one GPU, equal to `torch.utils.flop_counter` with eager attention; causal masks save nothing.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> from onerec_hf.planning import Batch
        >>> forward_flops(OneRecConfig(), Batch(users=1, history=1, session=1))
        102760448
    """
    encoder_tokens, decoder_tokens = batch.tokens(config)
    encoder_length, decoder_length = batch.lengths(config)
    width, (heads, keys) = config.hidden_size, attention_widths(config)
    # Every weight matrix of a stack is multiplied with each of its tokens, except the keys and values of cross-attention: with the history's.
    cross = config.decoder_layers * 2 * keys * width
    head = (config.vocab_size or 0) * width
    gate = width * heads if is_pointwise(config) else 0
    encoder = config.encoder_layers * (2 * width * (heads + keys) + gate + 3 * width * config.intermediate_size)
    decoder = matrix_parameters(config) - encoder - head - cross
    products = encoder_tokens * (encoder + cross) + decoder_tokens * (decoder + head)
    if config.num_experts > 1:
        expert = 3 * width * (config.moe_intermediate_size or 0)
        products += config.decoder_layers * decoder_tokens * config.num_experts_per_tok * expert
    # Scores and weighted values.
    products += 2 * heads * config.encoder_layers * encoder_tokens * encoder_length
    products += 2 * heads * config.decoder_layers * decoder_tokens * (decoder_length + encoder_length)
    products += batch.users * scored_items(config) * width
    return 2 * products + content_flops(config, batch) + feature_flops(config, batch)


def feature_flops(config: OneRecConfig, batch: Batch) -> int:
    """FLOPs of the networks of features: that of users runs once a history, the other one at every place."""
    sizes = [rows * columns for rows, columns in feature_networks(config)]
    once, each = (sizes[:2], sizes[2:]) if static_places(config) else ([], sizes)
    return 2 * batch.users * (sum(once) + (batch.history + static_places(config)) * sum(each))


def content_flops(config: OneRecConfig, batch: Batch) -> int:
    """FLOPs of the projection of content vectors: those of the histories and, for the item loss, of all items."""
    return 2 * (batch.users * batch.history + scored_items(config)) * content_dim(config) * config.hidden_size


def step_flops(config: OneRecConfig, batch: Batch, checkpointing: bool = False) -> int:
    """FLOPs of the forward pass, the backward pass (twice as many) and, with checkpointing, the recomputed layers."""
    forward = forward_flops(config, batch)
    logits = batch.tokens(config)[1] * (config.vocab_size or 0) + batch.users * scored_items(config)
    embedding = content_flops(config, batch) + feature_flops(config, batch)
    again = forward - embedding - 2 * logits * config.hidden_size
    # Content vectors are fixed: their projection has one gradient, that of its weight.
    return 3 * forward - content_flops(config, batch) + (again if checkpointing else 0)
