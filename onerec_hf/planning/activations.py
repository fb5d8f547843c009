"""
What the forward pass keeps for the backward pass, per layer, in bytes: the tensors that autograd saves, one by one, as
`torch.autograd.graph.saved_tensors_hooks` sees them (tests/planning/test_measured.py). Experts run as "grouped_mm", attention as "sdpa".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onerec_hf.modeling.configuration_onerec import OneRecConfig


@dataclass(frozen=True)
class Batch:
    """
    What one GPU reads in a step, padded to its longest history.

    Args:
        users: examples.
        history: items of a history.
        session: items of a session.
    """

    users: int = 64
    history: int = 50
    session: int = 5

    def lengths(self, config: OneRecConfig) -> tuple[int, int]:
        """Tokens of a history and of a session."""
        return self.history * config.tokens_per_item, self.session * config.tokens_per_item

    def tokens(self, config: OneRecConfig) -> tuple[int, int]:
        """Tokens of the encoder and of the decoder."""
        encoder, decoder = self.lengths(config)
        return self.users * encoder, self.users * decoder


@dataclass(frozen=True)
class Precision:
    """
    Bytes per element of what the forward pass makes.

    Args:
        matrix: inputs and outputs of linear layers and of attention.
        residual: the stream between the layers, and what norms make.
        expert: inside the experts.
        autocast: whether every linear layer casts its input for itself, and its weights.
    """

    matrix: int
    residual: int
    expert: int
    autocast: bool = False


FLOAT32 = Precision(matrix=4, residual=4, expert=4)
BFLOAT16 = Precision(matrix=2, residual=2, expert=2)
# Packed experts are no autocast operation: they multiply in the type of their weights (transformers.integrations.moe).
AUTOCAST = Precision(matrix=2, residual=4, expert=4, autocast=True)


@dataclass(frozen=True)
class Activations:
    """
    Bytes kept for the backward pass on one GPU.

    Args:
        encoder_layer, decoder_layer: of one layer.
        boundary: of what enters the layers, all that checkpointing keeps of them.
        shared: of what stands outside the layers: embeddings, rotary angles, last norms, the encoder's output, the loss's targets.
        logits: the logits' copies at the peak, between forward and backward pass.
        exchange: token rows that expert parallelism has in flight in one layer, beside those that are kept.
        encoder_layers, decoder_layers: how many layers there are.
    """

    encoder_layer: int
    decoder_layer: int
    boundary: int
    shared: int
    logits: int
    exchange: int
    encoder_layers: int
    decoder_layers: int

    def kept(self, checkpointing: bool = False) -> int:
        """All but the logits; with checkpointing, the layers' inputs and one layer at a time."""
        if checkpointing:
            return self.shared + self.boundary + max(self.encoder_layer, self.decoder_layer)
        return self.shared + self.encoder_layers * self.encoder_layer + self.decoder_layers * self.decoder_layer


class _Counter:
    """Bytes per token of the parts that layers are made of."""

    def __init__(self, config: OneRecConfig, precision: Precision, accelerator: bool):
        self.config, self.precision = config, precision
        self.width = config.hidden_size
        self.head_dim = config.head_dim or 0
        self.heads = config.num_attention_heads * self.head_dim
        # On an accelerator dropout keeps a mask of one byte per element, on a CPU one of the element's type.
        self.mask_bytes = 1 if accelerator else None

    def inputs(self, width: int, consumers: int = 1) -> int:
        """The input of `consumers` linear layers."""
        return width * self.precision.matrix * (consumers if self.precision.autocast else 1)

    def norm(self) -> int:
        """Its input and reciprocal deviation in float32, and the normalised states."""
        return self.width * (4 + self.precision.residual) + 4

    def dropout(self, element: int) -> int:
        if not self.config.dropout_rate:
            return 0
        return self.width * (self.mask_bytes or element)

    def attention(self, queries: int, keys: int, users: int, masked: bool) -> int:
        """Of `queries` and `keys` tokens, all users together: q, k, v, output, log-sum-exp, and the mask as additive one."""
        config, matrix = self.config, self.precision.matrix
        # With a mask, grouped keys and values are repeated to all heads.
        groups = config.num_attention_heads if masked else config.num_key_value_heads or 0
        total = matrix * (2 * queries * self.heads + 2 * keys * groups * self.head_dim)
        total += 4 * queries * config.num_attention_heads
        return total + (matrix * queries * (keys // users) if masked else 0)

    def feed_forward(self) -> int:
        """gate, its activation, up, and their product."""
        return self.inputs(self.width, 2) + 4 * self.config.intermediate_size * self.precision.matrix

    def experts(self, expert_parallel: bool) -> int:
        config, precision = self.config, self.precision
        routed, inner = config.num_experts_per_tok, config.moe_intermediate_size or 0
        router_element = 2 if precision.autocast else 4
        router = router_element * (self.width + config.num_experts) + 8 * routed
        # Sorted rows, gate and up, the gate's activation, the product, the result; indices and the gate's weight.
        row = precision.expert * (2 * self.width + 4 * inner + 1) + 3 * 8
        if expert_parallel:
            # The rows are sorted by rank too, and a mask keeps out those that no expert of this GPU wants.
            row += precision.expert + 8 + 1
        return router + routed * row


def activations(
    config: OneRecConfig,
    batch: Batch,
    precision: Precision,
    accelerator: bool = True,
    masked: bool = True,
    expert_ranks: int = 1,
) -> Activations:
    """
    Args:
        accelerator: whether the model runs on a GPU; a CPU keeps larger dropout masks.
        masked: whether the batch holds padding. A batch without any needs no masks.
        expert_ranks: GPUs that share the experts; as many token rows arrive as leave, as balanced experts have it.
    """
    count = _Counter(config, precision, accelerator)
    width, matrix, residual = config.hidden_size, precision.matrix, precision.residual
    encoder_tokens, decoder_tokens = batch.tokens(config)
    sparse = config.num_experts > 1

    encoder_layer = encoder_tokens * (
        2 * count.norm() + count.inputs(width, 3) + count.feed_forward() + 2 * count.dropout(matrix)
    ) + count.attention(encoder_tokens, encoder_tokens, batch.users, masked)

    decoder_token = 3 * count.norm() + count.inputs(width, 3) + count.inputs(width) + 2 * count.dropout(matrix)
    if sparse:
        decoder_token += count.experts(expert_ranks > 1) + count.dropout(residual)
    else:
        decoder_token += count.feed_forward() + count.dropout(matrix)
    decoder_layer = decoder_tokens * decoder_token
    if sparse:
        decoder_layer += 4 * config.num_experts // expert_ranks  # where each expert's rows end
        if residual == 2:  # the router works in float32
            decoder_layer += 4 * config.num_experts * width
    decoder_layer += count.attention(decoder_tokens, decoder_tokens, batch.users, masked)
    decoder_layer += count.attention(decoder_tokens, encoder_tokens, batch.users, masked)
    if precision.autocast:  # each layer's keys and values cast the encoder's output for themselves
        decoder_layer += encoder_tokens * count.inputs(width, 2)

    angles = 2 * (config.head_dim or 0) * residual
    tables = [encoder_tokens, batch.lengths(config)[1]]  # a session's positions are every user's
    if config.cross_attention_rope:
        tables += [encoder_tokens, decoder_tokens]
    shared = (encoder_tokens + decoder_tokens) * (8 + count.dropout(residual) + count.norm()) + angles * sum(tables)
    # The head's input, the targets, their number (which the cross-entropy keeps, and the division by it).
    shared += decoder_tokens * (count.inputs(width) + 8) + 12
    if not precision.autocast:
        shared += encoder_tokens * matrix * width
    # The logits in their own type, their float32 copy (the log-softmax, and its gradient) and, from bfloat16, one copy more.
    logits = decoder_tokens * (config.vocab_size or 0) * (8 if matrix == 4 else 10)
    exchange = 2 * decoder_tokens * config.num_experts_per_tok * width * precision.expert if expert_ranks > 1 else 0
    boundary = residual * width * (config.encoder_layers * encoder_tokens + config.decoder_layers * decoder_tokens)
    return Activations(
        encoder_layer,
        decoder_layer,
        boundary,
        shared,
        logits,
        exchange,
        config.encoder_layers,
        config.decoder_layers,
    )
