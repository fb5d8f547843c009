"""Floating-point operations of a training step: two per multiplication in matrix products, padding included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onerec_hf.planning.parameters import (
    attention_widths,
    content_dim,
    context_width,
    feature_networks,
    history_places,
    is_lazy,
    is_pointwise,
    matrix_parameters,
    projected_vectors,
    scored_items,
    static_places,
    vector_blocks,
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
    if is_lazy(config):
        return _lazy_flops(config, batch)
    # Every weight matrix of a stack is multiplied with each of its tokens, except the keys and values of cross-attention: with the history's.
    cross = config.decoder_layers * 2 * keys * width
    head = (config.vocab_size or 0) * width
    gate = width * heads if is_pointwise(config) else 0
    encoder = config.encoder_layers * (2 * width * (heads + keys) + gate + 3 * width * config.intermediate_size)
    decoder = matrix_parameters(config) - encoder - head - cross
    products = encoder_tokens * (encoder + cross) + decoder_tokens * (decoder + head)
    products += decoder_tokens * _routed(config)
    # Scores and weighted values.
    products += 2 * heads * config.encoder_layers * encoder_tokens * encoder_length
    products += 2 * heads * config.decoder_layers * decoder_tokens * (decoder_length + encoder_length)
    products += batch.users * scored_items(config) * width
    return 2 * products + vector_flops(config, batch) + content_flops(config, batch) + feature_flops(config, batch)


def vector_flops(config: OneRecConfig, batch: Batch) -> int:
    """FLOPs of the projections of an item head with `rank`: of every place of the histories by every block, and for the item loss of all items."""
    places = batch.users * (history_places(config, batch.history) - static_places(config))
    read = places * sum(rank for _, rank in vector_blocks(config)[1:]) * config.hidden_size
    return 2 * (read + (projected_vectors(config) if scored_items(config) else 0))


def feature_flops(config: OneRecConfig, batch: Batch) -> int:
    """FLOPs of the networks of features: that of users runs once a history, the others at every place."""
    sizes = [rows * columns for rows, columns in feature_networks(config)]
    once, each = (sizes[:2], sizes[2:]) if static_places(config) else ([], sizes)
    return 2 * batch.users * (sum(once) + history_places(config, batch.history) * sum(each))


def _routed(config: OneRecConfig) -> int:
    """Weights of the experts that a token is routed to, in all layers."""
    expert = 3 * config.hidden_size * (config.moe_intermediate_size or 0)
    return config.sparse_layers * config.num_experts_per_tok * expert


def _lazy_flops(config: OneRecConfig, batch: Batch) -> int:
    """Those of OneRec-V2: one matrix per position of the history, the blocks for the session's tokens, a level's codes for each of them."""
    read, tokens = batch.tokens(config)
    history_length, session_length = batch.lengths(config)
    width, (heads, _) = config.hidden_size, attention_widths(config)
    context = context_width(config) * width
    blocks = matrix_parameters(config) - context - (config.vocab_size or 0) * width
    products = read * context + tokens * (blocks + _routed(config)) + _head(config, batch)
    products += 2 * heads * config.decoder_layers * tokens * (history_length + session_length)
    return 2 * products + vector_flops(config, batch) + content_flops(config, batch) + feature_flops(config, batch)


def _head(config: OneRecConfig, batch: Batch) -> int:
    """Products of the heads: with the vocabulary, or with the codes of a level."""
    if is_lazy(config):
        return batch.users * batch.session * sum(config.codebook_sizes or ()) * config.hidden_size
    return batch.tokens(config)[1] * (config.vocab_size or 0) * config.hidden_size


def content_flops(config: OneRecConfig, batch: Batch) -> int:
    """FLOPs of the projection of content vectors: those of the histories and, for the item loss, of all items."""
    items = batch.users * (history_places(config, batch.history) - static_places(config)) + scored_items(config)
    return 2 * items * content_dim(config) * config.hidden_size


def step_flops(config: OneRecConfig, batch: Batch, checkpointing: bool = False) -> int:
    """FLOPs of the forward pass, the backward pass (twice as many) and, with checkpointing, the recomputed layers."""
    forward = forward_flops(config, batch)
    outside = _head(config, batch) + batch.users * scored_items(config) * config.hidden_size
    outside += batch.tokens(config)[0] * context_width(config) * config.hidden_size
    again = (
        forward
        - vector_flops(config, batch)
        - content_flops(config, batch)
        - feature_flops(config, batch)
        - 2 * outside
    )
    # Content vectors are fixed: their projection has one gradient, that of its weight.
    return 3 * forward - content_flops(config, batch) + (again if checkpointing else 0)
