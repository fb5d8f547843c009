"""
The parameters of a OneRec generator, tensor by tensor, from its config alone: exactly those that the model makes, in the groups that FSDP2
gathers together (`_fsdp_plan` of the model's classes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onerec_hf.modeling.configuration_onerec import OneRecConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """
    Tensors that are gathered and freed together.

    Args:
        name: what they are.
        shapes: one per tensor; the first dimension is the one that FSDP2 cuts.
        copies: how many layers have such a group.
        regathered: whether they are freed after the forward pass and gathered again for the backward pass.
        experts: whether they are the packed experts, which expert parallelism distributes.
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
        """Elements of one copy on the rank that holds the most: tensors are cut along their first dimension, in equal runs of rows."""
        return sum(-(-shape[0] // ranks) * math.prod(shape[1:]) for shape in self.shapes)


def _attention(config: OneRecConfig) -> list[Shape]:
    width, head_dim = config.hidden_size, config.head_dim or 0  # the config fills in what it was not given
    queries, keys = config.num_attention_heads * head_dim, (config.num_key_value_heads or 0) * head_dim
    return [(queries, width), (keys, width), (keys, width), (width, queries)]


def _feed_forward(config: OneRecConfig) -> list[Shape]:
    width, inner = config.hidden_size, config.intermediate_size
    return [(inner, width), (inner, width), (width, inner)]


def expert_shapes(config: OneRecConfig) -> tuple[Shape, ...]:
    """The packed weights of one decoder layer's experts; none where the decoder is dense."""
    if config.num_experts == 1:
        return ()
    experts, width, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size or 0
    return ((experts, 2 * inner, width), (experts, width, inner))


def units(config: OneRecConfig, expert_parallel: bool = False) -> list[Unit]:
    """
    The groups, in the order of the forward pass. Three of the tensors are the same table where `tie_word_embeddings` is on: the encoder's, the
    decoder's and the head's, which are gathered one by one all the same.

    Args:
        expert_parallel: whether the experts are groups of their own, not part of their layer's.

    Raises:
        ValueError: an encoder without a softmax, or one that pools items.
    """
    if config.encoder_attention != "softmax":
        raise ValueError(f"encoder_attention={config.encoder_attention!r} is not planned for: only softmax is")
    if config.encoder_pools_items:
        raise ValueError("encoder_pools_items is not planned for: only an encoder that reads tokens is")
    width, norm = config.hidden_size, (config.hidden_size,)
    vocabulary = (config.vocab_size or 0, width)
    encoder = [*_attention(config), *_feed_forward(config), norm, norm]
    experts = expert_shapes(config)
    router = [(config.num_experts, width)] if experts else _feed_forward(config)
    decoder = [*_attention(config), *_attention(config), *router, norm, norm, norm]
    separate = expert_parallel and bool(experts)
    items = [(config.num_item_embeddings + 1, width)] if config.num_item_embeddings else []
    groups = [
        Unit("root", (vocabulary, vocabulary, norm), regathered=False),
        Unit("encoder", (vocabulary, *items, norm)),
        Unit("encoder layer", tuple(encoder), config.encoder_layers),
        Unit("decoder layer", (*decoder, *(() if separate else experts)), config.decoder_layers),
    ]
    if separate:
        groups.append(Unit("experts", experts, config.decoder_layers, experts=True))
    return groups


def tied_parameters(config: OneRecConfig) -> int:
    """Parameters that `units` names more than once."""
    return 2 * (config.vocab_size or 0) * config.hidden_size if config.tie_word_embeddings else 0


def count_parameters(config: OneRecConfig) -> int:
    """
    What `model.num_parameters()` says of the config's model.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> count_parameters(OneRecConfig(hidden_size=1024, intermediate_size=4096, encoder_layers=12, decoder_layers=12))
        3927078912
    """
    return sum(unit.parameters * unit.copies for unit in units(config)) - tied_parameters(config)


def expert_parameters(config: OneRecConfig) -> int:
    """Parameters of all experts of all decoder layers."""
    return config.decoder_layers * sum(map(math.prod, expert_shapes(config)))


def active_parameters(config: OneRecConfig) -> int:
    """
    Parameters that a token of each stack passes: all but the experts that the router leaves out.

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
    """Weights of the `nn.Linear` layers and the router: those that autocast copies to bfloat16 (not the packed experts)."""
    layers = [unit for unit in units(config, expert_parallel=True) if unit.name.endswith("layer")]
    inside = sum(unit.copies * sum(math.prod(shape) for shape in unit.shapes if len(shape) == 2) for unit in layers)
    return inside + (config.vocab_size or 0) * config.hidden_size


def buffer_bytes(config: OneRecConfig) -> int:
    """Bytes of buffers: the balancing biases of the experts and the rotary frequencies (each twice, in both stacks), all float32."""
    biases = config.decoder_layers * config.num_experts if config.num_experts > 1 else 0
    return 4 * (biases + 2 * 2 * (config.head_dim or 0) // 2)
