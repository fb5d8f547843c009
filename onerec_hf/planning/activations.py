"""
Activation memory: the bytes that the forward pass keeps for the backward pass, per layer. They count the tensors that autograd saves, one by one, and
equal what `torch.autograd.graph.saved_tensors_hooks` measures (tests/planning/test_measured.py). Experts run as "grouped_mm", attention as "sdpa".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onerec_hf.planning.parameters import (
    attention_widths,
    features,
    history_places,
    is_lazy,
    is_pointwise,
    item_head,
    scored_items,
    shared_inner,
    vector_blocks,
)

if TYPE_CHECKING:
    from onerec_hf.modeling.configuration_onerec import OneRecConfig


@dataclass(frozen=True)
class Batch:
    """
    The batch of one GPU and step, padded to the longest history.

    Args:
        users: number of examples.
        history: items per history.
        session: items per session.
    """

    users: int = 64
    history: int = 50
    session: int = 5

    def lengths(self, config: OneRecConfig) -> tuple[int, int]:
        """
        Positions of a history (its tokens, or its items with `encoder_pools_items`), and of user features, and tokens of a session; OneRec-V2 does not
        read the last code.
        """
        places = history_places(config, self.history)
        session = self.session * config.tokens_per_item - (1 if is_lazy(config) else 0)
        return places * config.tokens_per_item // config.encoder_stride, session

    def tokens(self, config: OneRecConfig) -> tuple[int, int]:
        """Positions of the encoder and tokens of the decoder, all users together."""
        encoder, decoder = self.lengths(config)
        return self.users * encoder, self.users * decoder


@dataclass(frozen=True)
class Precision:
    """
    Bytes per element in the forward pass.

    Args:
        matrix: inputs and outputs of linear layers and of attention.
        residual: the residual stream and the outputs of norms.
        expert: inside the experts.
        autocast: whether every linear layer casts its input and its weights.
    """

    matrix: int
    residual: int
    expert: int
    autocast: bool = False


FLOAT32 = Precision(matrix=4, residual=4, expert=4)
BFLOAT16 = Precision(matrix=2, residual=2, expert=2)
# Autocast does not cover packed experts: they multiply in the type of their weights (transformers.integrations.moe).
AUTOCAST = Precision(matrix=2, residual=4, expert=4, autocast=True)


@dataclass(frozen=True)
class Activations:
    """
    Bytes kept for the backward pass on one GPU.

    Args:
        encoder_layer, decoder_layer: one layer; of OneRec-V2, a block with experts and a dense one.
        boundary: the inputs of all layers, the only tensors of a layer that checkpointing keeps.
        shared: outside the layers: embeddings, rotary angles, final norms, the encoder's output, targets, the item head.
        logits: copies of the logits (tokens, and items of the item head) at the peak, between forward and backward pass.
        exchange: token rows that expert parallelism sends in one layer, in addition to those that are kept; of OneRec-V2, gradients of the keys and
            values, which exist until the last of the blocks that share them is done.
        encoder_layers, decoder_layers: number of layers.
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
        """Everything except the logits; with checkpointing, the layers' inputs and one layer at a time."""
        if checkpointing:
            return self.shared + self.boundary + max(self.encoder_layer, self.decoder_layer)
        return self.shared + self.encoder_layers * self.encoder_layer + self.decoder_layers * self.decoder_layer


class _Counter:
    """Bytes per token of the parts of a layer."""

    def __init__(self, config: OneRecConfig, precision: Precision, accelerator: bool):
        self.config, self.precision = config, precision
        self.width = config.hidden_size
        self.head_dim = config.head_dim or 0
        self.heads, self.keys = attention_widths(config)
        # Dropout keeps a mask: one byte per element on an accelerator, the element's type on a CPU.
        self.mask_bytes = 1 if accelerator else None

    def inputs(self, width: int, consumers: int = 1) -> int:
        """The input of `consumers` linear layers."""
        return width * self.precision.matrix * (consumers if self.precision.autocast else 1)

    def norm(self, width: int | None = None, residual: int | None = None) -> int:
        """Input and reciprocal deviation in float32, and the normalised states."""
        width = self.width if width is None else width
        return width * (4 + (self.precision.residual if residual is None else residual)) + 4

    def dropout(self, element: int) -> int:
        if not self.config.dropout_rate:
            return 0
        return self.width * (self.mask_bytes or element)

    def attention(self, queries: int, keys: int, users: int, masked: bool) -> int:
        """All users together: q, k, v, output, log-sum-exp, and the additive mask."""
        config, matrix = self.config, self.precision.matrix
        # With a mask, grouped keys and values are repeated for all heads.
        groups = config.num_attention_heads if masked else config.num_key_value_heads or 0
        total = matrix * (2 * queries * self.heads + 2 * keys * groups * self.head_dim)
        total += 4 * queries * config.num_attention_heads
        return total + (matrix * queries * (keys // users) if masked else 0)

    def pointwise_attention(self, tokens: int, users: int) -> int:
        """
        All users together: outputs of the linear maps before and after activation and rotation, input and result of the norm in float32 (in mixed precision the input in bfloat16, too), gated output.
        Per token and head a row of attention weights, before and after activation, and the mask: quadratic in the history.
        """
        matrix, length = self.precision.matrix, tokens // users
        states = matrix * (8 * self.heads + 2 * self.keys) + (10 if self.precision.autocast else 8) * self.heads + 4
        weights = length * (2 * matrix * self.config.num_attention_heads + 1)
        return tokens * (states + weights)

    def item_head(self, users: int, history_items: int) -> int:
        """
        The vectors' indices; for the loss, the ends of the histories, a mask of sessions, states and targets; with `score_codes` or content the summed
        vectors of all items, and the indices of `embedding_bag` or the content vectors. With `rank` the places and the short vectors of each block, and
        the vectors of all items.
        """
        head = item_head(self.config)
        if head is None:
            return 0
        content, items = self.precision.matrix * head.content_dim, scored_items(self.config)
        blocks = vector_blocks(self.config)
        # Per block where its vectors stand and a mask, and short vectors before their projection.
        rows = 9 * len(blocks) + sum(self.precision.matrix * rank for _, rank in blocks[1:]) if blocks else 8
        read = users * history_items * (rows + content)
        if not items:
            return read
        loss = users * (3 * 8 + 1 + self.inputs(self.width)) + 4
        of_item = content
        if head.score_codes or content or blocks:
            of_item += self.width * self.precision.matrix
        if blocks:
            of_item += 8
            loss += 8  # row 0
            if not (head.score_codes or content or self.precision.autocast):
                loss += self.width * self.precision.matrix
        if head.score_codes:
            of_item += 8 * (self.config.num_codebooks + 3)
        return read + loss + items * of_item

    def features(self, users: int, places: int) -> int:
        """
        Rows of the table and which slots are filled; the concatenated embeddings of each network, its inner states before and after the activation,
        and whether a place has such features.
        """
        own = features(self.config)
        if own is None:
            return 0
        total = users * 8 * bool(own.user)  # where the states of users are added
        for side, rows in ((own.user or [], users), (own.all[len(own.user or ()) :], places)):
            if not side:
                continue
            several = sum(slots > 1 for _, _, slots in side)
            inputs = self.inputs(len(side) * own.dim) + self.inputs(self.width)
            states = self.precision.matrix * (self.width + 1)
            slots = sum(slots for _, _, slots in side)
            total += rows * (8 * slots + inputs + states + several * self.precision.residual)
        # The other network, with a copy of the embeddings if they are cast, and which places read it.
        if own.pathways is not None:
            cast = self.inputs((len(own.all) - len(own.user or ())) * own.dim) if self.precision.autocast else 0
            total += places * (cast + self.inputs(self.width) + self.precision.matrix * self.width + 1)
        return total

    def feed_forward(self, inner: int | None = None) -> int:
        """Gate, its activation, up, and their product."""
        inner = self.config.intermediate_size if inner is None else inner
        return self.inputs(self.width, 2) + 4 * inner * self.precision.matrix

    def experts(self, expert_parallel: bool) -> int:
        config, precision = self.config, self.precision
        routed, inner = config.num_experts_per_tok, config.moe_intermediate_size or 0
        router_element = 2 if precision.autocast else 4
        router = router_element * (self.width + config.num_experts) + 8 * routed
        # Sorted rows, gate and up, activated gate, product, result; indices and the gate's weight.
        row = precision.expert * (2 * self.width + 4 * inner + 1) + 3 * 8
        if expert_parallel:
            # Rows are also sorted by rank, and a mask drops those without an expert on this GPU.
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
        masked: whether the batch contains padding; softmax attention needs no mask without it.
        expert_ranks: GPUs that share the experts. Experts are assumed balanced: as many token rows arrive as leave.
    """
    count = _Counter(config, precision, accelerator)
    if is_lazy(config):
        return _lazy_activations(config, batch, count, masked)
    width, matrix, residual = config.hidden_size, precision.matrix, precision.residual
    encoder_tokens, decoder_tokens = batch.tokens(config)
    sparse = config.num_experts > 1

    encoder_layer = encoder_tokens * (2 * count.norm() + count.feed_forward() + 2 * count.dropout(matrix))
    if is_pointwise(config):
        encoder_layer += encoder_tokens * count.inputs(width, 4)
        encoder_layer += count.pointwise_attention(encoder_tokens, batch.users)
    else:
        encoder_layer += encoder_tokens * count.inputs(width, 3)
        encoder_layer += count.attention(encoder_tokens, encoder_tokens, batch.users, masked)

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
    if precision.autocast:  # keys and values of each layer cast the encoder's output
        decoder_layer += encoder_tokens * count.inputs(width, 2)

    angles = 2 * (config.head_dim or 0) * residual
    tables = [encoder_tokens, batch.lengths(config)[1]]  # all users share the session's positions
    if config.cross_attention_rope:
        tables += [encoder_tokens, decoder_tokens]
    shared = (encoder_tokens + decoder_tokens) * (count.dropout(residual) + count.norm()) + angles * sum(tables)
    shared += 8 * (encoder_tokens * config.encoder_stride + decoder_tokens)  # token ids
    shared += count.item_head(batch.users, history_places(config, batch.history))
    shared += count.features(batch.users, batch.users * history_places(config, batch.history))
    # The head's input, the targets, and their number, kept by the cross-entropy and by the division.
    shared += decoder_tokens * (count.inputs(width) + 8) + 12
    if not precision.autocast:
        shared += encoder_tokens * matrix * width
    # Log-softmax in float32 and its gradient; from bfloat16 one copy more.
    scores = decoder_tokens * (config.vocab_size or 0) + batch.users * scored_items(config)
    logits = scores * (8 if matrix == 4 else 10)
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


def _lazy_activations(config: Any, batch: Batch, count: _Counter, masked: bool) -> Activations:
    """Those of OneRec-V2: of the history its embeddings, and the keys and values that all blocks share."""
    precision, width, levels = count.precision, config.hidden_size, config.num_codebooks
    matrix, residual = precision.matrix, precision.residual
    places, tokens = batch.tokens(config)
    length, steps = batch.lengths(config)
    queries = config.num_attention_heads // config.context_groups  # of a token that share a group

    block = tokens * (3 * count.norm() + count.inputs(width, 3) + count.inputs(width) + 2 * count.dropout(matrix))
    block += count.attention(tokens, tokens, batch.users, masked)
    # Queries, output, log-sum-exp and mask of cross-attention.
    block += tokens * (2 * matrix * count.heads + 4 * config.num_attention_heads)
    block += matrix * tokens * queries * length if masked else 0
    dense = block + tokens * (count.feed_forward() + count.dropout(matrix))
    sparse = block + tokens * (count.experts(False) + count.dropout(residual)) + 4 * config.num_experts
    if residual == 2:
        sparse += 4 * config.num_experts * width
    if shared_inner(config):
        sparse += tokens * count.feed_forward(shared_inner(config))
        if residual == 4 and not precision.autocast:  # they read what the router has read
            sparse -= tokens * count.inputs(width)

    slices, of_layer = config.context_layers * config.context_split, config.context_groups * count.head_dim
    rotated = config.cross_attention_rope
    history = 8 * config.encoder_stride + count.dropout(residual) + count.inputs(width)
    history += slices * count.norm(of_layer, matrix)
    # Keys are the values unless they are rotated or have channels of their own.
    history += matrix * of_layer * config.context_layers * (2 if rotated or config.context_split == 2 else 1)
    angles = 2 * count.head_dim * residual * (steps + (places + tokens * queries if rotated else 0))
    read = history_places(config, batch.history)
    shared = (
        places * history
        + angles
        + count.item_head(batch.users, read)
        + count.features(batch.users, batch.users * read)
    )
    shared += tokens * (8 + count.dropout(residual) + count.norm())
    scored = batch.session * levels
    shared += batch.users * scored * (count.inputs(width) + 8)  # inputs and targets of the heads
    # A norm's weights and index per step, the columns of a level and of BOS, and what the losses are divided by.
    shared += steps * (width * residual + 2 * 8) + 2 * 8 * scored + 8 * (batch.session - 1) + 4 * levels + 8
    logits = batch.users * batch.session * sum(config.codebook_sizes) * (8 if matrix == 4 else 10)
    return Activations(
        encoder_layer=sparse if config.sparse_layers else 0,
        decoder_layer=dense,
        boundary=residual * width * config.decoder_layers * tokens,
        shared=shared,
        logits=logits + matrix * tokens * (config.vocab_size or 0),  # those of levels, and of the vocabulary
        # Gradients of all keys and values, and those that a block adds to its own.
        exchange=2 * matrix * places * of_layer * (config.context_layers + 1),
        encoder_layers=config.sparse_layers,
        decoder_layers=config.decoder_layers - config.sparse_layers,
    )
