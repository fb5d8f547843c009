"""
The parameters of a OneRec generator, tensor by tensor, from its config alone. They equal those of the model, in the groups that FSDP2 gathers together
(`_fsdp_plan` of the model's classes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from onerec_hf.modeling.configuration_features import FeaturesConfig
    from onerec_hf.modeling.configuration_item_head import ItemHeadConfig
    from onerec_hf.modeling.configuration_onerec import OneRecConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """
    Tensors that are gathered and freed together.

    Args:
        name: the part of the model.
        shapes: one per tensor; FSDP2 shards the first dimension.
        copies: number of layers with such a group.
        regathered: whether the tensors are freed after the forward pass and gathered again for the backward pass.
        experts: whether these are the packed experts, which expert parallelism distributes.
    """

    name: str
    shapes: tuple[Shape, ...]
    copies: int = 1
    regathered: bool = True
    experts: bool = False

    @property
    def parameters(self) -> int:
        """Parameters of one copy."""
        return sum(map(math.prod, self.shapes))

    def shard(self, ranks: int) -> int:
        """Elements of one copy on the rank with the most: tensors are sharded along their first dimension, in equal runs of rows."""
        return sum(-(-shape[0] // ranks) * math.prod(shape[1:]) for shape in self.shapes)


def attention_widths(config: OneRecConfig) -> tuple[int, int]:
    """Width of all queries of a token together, and of all its keys."""
    head_dim = config.head_dim or 0  # the config fills in what it was not given
    return config.num_attention_heads * head_dim, (config.num_key_value_heads or 0) * head_dim


def _attention(config: OneRecConfig) -> list[Shape]:
    width, (queries, keys) = config.hidden_size, attention_widths(config)
    return [(queries, width), (keys, width), (keys, width), (width, queries)]


def _encoder_attention(config: OneRecConfig) -> list[Shape]:
    """Pointwise attention has a gate in addition to queries, keys and values, and a norm before the output."""
    queries, _ = attention_widths(config)
    gate = [(queries, config.hidden_size), (queries,)] if is_pointwise(config) else []
    return [*_attention(config), *gate]


def is_pointwise(config: OneRecConfig) -> bool:
    return config.encoder_attention == "pointwise"


def item_head(config: OneRecConfig) -> ItemHeadConfig | None:
    return cast("ItemHeadConfig | None", config.item_head)  # the config turns a dict into one


def item_vectors(config: OneRecConfig) -> int:
    """Items with a vector; 0 without an item head."""
    head = item_head(config)
    return 0 if head is None else head.num_items or 0


def vector_blocks(config: OneRecConfig) -> list[tuple[int, int]]:
    """Items and rank of the blocks of an item head with `rank`; empty for full vectors."""
    from onerec_hf.modeling.configuration_item_head import item_blocks

    head = item_head(config)
    return [] if head is None or head.rank is None else item_blocks(head, config.hidden_size)


def projected_vectors(config: OneRecConfig) -> int:
    """Weights that make the vectors of all items: a block's items times its rank times the width, without the first block, which is full."""
    return sum(items * rank * config.hidden_size for items, rank in vector_blocks(config)[1:])


def scored_items(config: OneRecConfig) -> int:
    """Classes of the item head's loss: the items of the catalogue, 0 without that loss."""
    head = item_head(config)
    return item_vectors(config) if head is not None and head.loss_weight else 0


def content_dim(config: OneRecConfig) -> int:
    """Width of the item head's content vectors; 0 without any."""
    head = item_head(config)
    return 0 if head is None else head.content_dim


def features(config: OneRecConfig) -> FeaturesConfig | None:
    return cast("FeaturesConfig | None", config.features)


def static_places(config: OneRecConfig) -> int:
    """Places of a history before its first item: one for user features."""
    own = features(config)
    return int(own is not None and bool(own.user))


def history_places(config: OneRecConfig, history: int) -> int:
    """Places of a history of so many interactions: with that of user features, and those of both pathways where there are pathways."""
    own = features(config)
    return static_places(config) + (history if own is None else own.places(history))


def feature_networks(config: OneRecConfig) -> list[Shape]:
    """Weights of the two dense layers of user features, and of the two of interaction and item features, or of each of two pathways."""
    own, width = features(config), config.hidden_size
    if own is None:
        return []
    users = len(own.user or ())
    others = [len(own.all) - users] * (1 if own.pathways is None else 2)
    counts = [count for count in (users, *others) if count]
    return [shape for count in counts for shape in ((width, count * own.dim), (width, width))]


def feature_shapes(config: OneRecConfig) -> list[Shape]:
    """All weights of features: the table, whose row 0 all features share, and the networks with their biases."""
    own = features(config)
    if own is None:
        return []
    networks = feature_networks(config)
    table = (1 + sum(size - 1 for _, size, _ in own.all), own.dim)
    return [table, *networks, *[(config.hidden_size,)] * len(networks)]


def is_lazy(config: OneRecConfig) -> bool:
    """Whether the config is a `OneRecV2Config`."""
    return config.model_type == "onerec_v2"


def context_width(config: Any) -> int:
    """Channels of a lazy decoder's context; 0 with an encoder."""
    return config.context_width if is_lazy(config) else 0


def shared_inner(config: Any) -> int:
    """Width of the shared experts of a block together."""
    return config.num_shared_experts * config.moe_intermediate_size if is_lazy(config) else 0


def _feed_forward(config: OneRecConfig, inner: int | None = None) -> list[Shape]:
    width, inner = config.hidden_size, config.intermediate_size if inner is None else inner
    return [(inner, width), (inner, width), (width, inner)]


def expert_shapes(config: OneRecConfig) -> tuple[Shape, ...]:
    """The packed weights of one decoder layer's experts; empty for a dense decoder."""
    if config.num_experts == 1:
        return ()
    experts, width, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size or 0
    return ((experts, 2 * inner, width), (experts, width, inner))


def units(config: OneRecConfig, expert_parallel: bool = False) -> list[Unit]:
    """
    The groups, in the order of the forward pass. With `tie_word_embeddings` the tables of the encoder, the decoder and the head are one tensor, which
    FSDP gathers three times all the same.

    Args:
        expert_parallel: whether the experts are separate groups, not part of their layers.

    Raises:
        ValueError: a config with a lifelong pathway, which is not counted.
    """
    if config.lifelong is not None:
        raise ValueError("plan does not count the lifelong pathway: leave lifelong out of the config to plan the rest")
    width, norm = config.hidden_size, (config.hidden_size,)
    vocabulary = (config.vocab_size or 0, width)
    encoder = [*_encoder_attention(config), *_feed_forward(config), norm, norm]
    experts = expert_shapes(config)
    router = [(config.num_experts, width)] if experts else _feed_forward(config)
    decoder = [*_attention(config), *_attention(config), *router, norm, norm, norm]
    separate = expert_parallel and bool(experts)
    blocks = vector_blocks(config)
    items: list[Shape] = [*blocks, *((rank, width) for _, rank in blocks[1:])]
    # One vector more than items, for those that have none.
    items += [(item_vectors(config) + 1, width)] if item_vectors(config) and not blocks else []
    items += [(width, content_dim(config))] if content_dim(config) else []
    if is_lazy(config):
        return _lazy_units(config, vocabulary, items)
    groups = [
        Unit("root", (vocabulary, vocabulary, norm), regathered=False),
        Unit("encoder", (vocabulary, *items, *feature_shapes(config), norm)),
        Unit("encoder layer", tuple(encoder), config.encoder_layers),
        Unit("decoder layer", (*decoder, *(() if separate else experts)), config.decoder_layers),
    ]
    if separate:
        groups.append(Unit("experts", experts, config.decoder_layers, experts=True))
    return groups


def _lazy_units(config: Any, vocabulary: Shape, items: list[Shape]) -> list[Unit]:
    """Those of OneRec-V2. There is a norm per slice of the context and one per level; some first blocks may be dense."""
    width, norm = config.hidden_size, (config.hidden_size,)
    slices = config.context_layers * config.context_split
    of_context = [(config.context_width // slices,)] * slices
    queries, _ = attention_widths(config)
    block = [(queries, width), (width, queries), *_attention(config), norm, norm, norm]
    sparse = [*block, (config.num_experts, width), *expert_shapes(config)]
    if shared_inner(config):
        sparse += _feed_forward(config, shared_inner(config))
    dense = config.decoder_layers - config.sparse_layers
    groups = [
        Unit("root", (vocabulary, vocabulary, (config.num_codebooks, width), *of_context), regathered=False),
        Unit("encoder", (vocabulary, *items, *feature_shapes(config), (config.context_width, width))),
        Unit("encoder layer", (), 0),
        Unit("dense layer", (*block, *_feed_forward(config)), dense),
        Unit("decoder layer", tuple(sparse), config.sparse_layers),
    ]
    return groups if config.sparse_layers else [*groups[:3], replace(groups[3], name="decoder layer")]


def tied_parameters(config: OneRecConfig) -> int:
    """Parameters that `units` lists more than once."""
    return 2 * (config.vocab_size or 0) * config.hidden_size if config.tie_word_embeddings else 0


def count_parameters(config: OneRecConfig) -> int:
    """
    The number of parameters: `model.num_parameters()` without a model.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> count_parameters(OneRecConfig(hidden_size=1024, intermediate_size=4096, encoder_layers=12, decoder_layers=12))
        3927078912
    """
    return sum(unit.parameters * unit.copies for unit in units(config)) - tied_parameters(config)


def expert_parameters(config: OneRecConfig) -> int:
    """Parameters of all experts of all decoder layers."""
    return config.sparse_layers * sum(map(math.prod, expert_shapes(config)))


def active_parameters(config: OneRecConfig) -> int:
    """
    Parameters that one token uses: all except the experts that the router does not choose.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> active_parameters(OneRecConfig(hidden_size=1024, intermediate_size=4096, encoder_layers=12, decoder_layers=12))
        605190144
    """
    if config.num_experts == 1:
        return count_parameters(config)
    idle = config.num_experts - config.num_experts_per_tok
    return count_parameters(config) - expert_parameters(config) // config.num_experts * idle


def matrix_parameters(config: OneRecConfig) -> int:
    """Weights of the `nn.Linear` layers and the router (not the packed experts, the embeddings, the item head and features)."""
    outside = (config.vocab_size or 0) + context_width(config)
    layers = [unit for unit in units(config, expert_parallel=True) if unit.name.endswith("layer")]
    inside = sum(unit.copies * sum(math.prod(shape) for shape in unit.shapes if len(shape) == 2) for unit in layers)
    return inside + outside * config.hidden_size


def autocast_parameters(config: OneRecConfig) -> int:
    """Weights that autocast copies to bfloat16: all matrices, and the item head's vectors where they are multiplied."""
    head = item_head(config)
    blocks = vector_blocks(config)
    direct = scored_items(config) if head is not None and not (head.score_codes or head.content_dim or blocks) else 0
    if is_lazy(config):  # whose heads leave out the rows of no code
        direct -= (config.vocab_size or 0) - sum(config.codebook_sizes or ())
    of_features = sum(map(math.prod, feature_networks(config)))
    low_rank = sum((items + config.hidden_size) * rank for items, rank in blocks[1:])
    return matrix_parameters(config) + direct * config.hidden_size + low_rank + of_features


def buffer_bytes(config: OneRecConfig) -> int:
    """
    Bytes of buffers: the balancing biases of the experts and the rotary frequencies (each twice; in both stacks of an encoder-decoder), all float32; the item head's 64-bit
    keys, with `rank` the items' 64-bit places, its content vectors in float16 with their mean and scale, its neighbour lists (three of an int32 and a float32 per neighbour), interaction
    counts and seven weights, with `recent` two more and twelve bytes per interaction of the log; three 64-bit numbers per slot of features.
    """
    own = features(config)
    biases, stacks = config.sparse_layers * config.num_experts, 1 if is_lazy(config) else 2
    head, rows, content = item_head(config), item_vectors(config) + 1, content_dim(config)
    of_head = 8 * (item_vectors(config) + rows * bool(vector_blocks(config))) + (
        2 * rows * content + 4 * content + 4 if content else 0
    )
    if head is not None and head.evidence:
        of_head += rows * (3 * head.neighbours * 8 + 4) + 4 * 7 + (12 * head.recent + 4 * 2 if head.recent else 0)
    of_slots = 0 if own is None else 3 * 8 * own.slots
    return 4 * (biases + stacks * 2 * ((config.head_dim or 0) // 2)) + of_head + of_slots
