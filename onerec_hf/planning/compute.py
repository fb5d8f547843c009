"""Floating-point operations of a training step: two per multiplication of the matrix products, all tokens counted, padding too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onerec_hf.planning.parameters import matrix_parameters

if TYPE_CHECKING:
    from onerec_hf.modeling.configuration_onerec import OneRecConfig
    from onerec_hf.planning.activations import Batch


def forward_flops(config: OneRecConfig, batch: Batch) -> int:
    """
    Of one forward pass on one GPU, as `torch.utils.flop_counter` counts them with eager attention: causal masks save nothing.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> from onerec_hf.planning import Batch
        >>> forward_flops(OneRecConfig(), Batch(users=1, history=1, session=1))
        102760448
    """
    encoder_tokens, decoder_tokens = batch.tokens(config)
    encoder_length, decoder_length = batch.lengths(config)
    width, heads = config.hidden_size, config.num_attention_heads * (config.head_dim or 0)
    keys = (config.num_key_value_heads or 0) * (config.head_dim or 0)
    # Every weight matrix of a stack meets each of its tokens, but for the keys and values of cross-attention, which meet the history's.
    cross = config.decoder_layers * 2 * keys * width
    head = (config.vocab_size or 0) * width
    encoder = config.encoder_layers * (2 * width * (heads + keys) + 3 * width * config.intermediate_size)
    decoder = matrix_parameters(config) - encoder - head - cross
    products = encoder_tokens * (encoder + cross) + decoder_tokens * (decoder + head)
    if config.num_experts > 1:
        expert = 3 * width * (config.moe_intermediate_size or 0)
        products += config.decoder_layers * decoder_tokens * config.num_experts_per_tok * expert
    # Scores and weighted values.
    products += 2 * heads * config.encoder_layers * encoder_tokens * encoder_length
    products += 2 * heads * config.decoder_layers * decoder_tokens * (decoder_length + encoder_length)
    return 2 * products


def step_flops(config: OneRecConfig, batch: Batch, checkpointing: bool = False) -> int:
    """Forward and backward pass (twice the forward one), and what checkpointing computes again: the layers, without the head."""
    forward = forward_flops(config, batch)
    again = forward - 2 * batch.tokens(config)[1] * (config.vocab_size or 0) * config.hidden_size
    return 3 * forward + (again if checkpointing else 0)
