"""
The layers of OneRec's encoder and decoder (arXiv 2502.18965, section 3.2): norm, rotary positions, packing masks, attention, feed-forward, experts.

cpu_experts.py has the fast products of linear layers and experts; everything else of a layer is in this file.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.integrations import use_experts_implementation, use_kernel_forward_from_hub
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import eager_attention_forward, rotate_half

from .cpu_experts import OneRecLinear, PreciseBuffers

# Attention implementations that take any mask. Flash attention takes sequence lengths only: a session cannot read a part of a history.
PACKING_ATTENTION = ("sdpa", "eager", "flex_attention")
# HSTU divides its attention weights by the length of a history. With this divisor the sums are about the root of the norm's epsilon: a short
# history stays small, where the norm of larger sums would blow it up.
_POINTWISE_LENGTH = 10

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@use_kernel_forward_from_hub("RMSNorm")
class OneRecRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        dtype, hidden_states = hidden_states.dtype, hidden_states.float()
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon)).to(dtype)


class OneRecRotaryEmbedding(PreciseBuffers):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, **kwargs):  # PreTrainedModel._init_weights looks for this name
        base, dim = config.rope_parameters["rope_theta"], config.head_dim
        return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x, position_ids):
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)
        return (emb.cos() * self.attention_scaling).to(x.dtype), (emb.sin() * self.attention_scaling).to(x.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates states (..., head_dim) by cosines and sines that broadcast to them."""
    return states * cos + rotate_half(states) * sin


def apply_rotary(states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates (batch, heads, length, head_dim) by the cosines and sines (batch or 1, length, head_dim) of its positions."""
    return rotate(states, *(part.unsqueeze(1) for part in position_embeddings))


def history_positions(
    states: torch.Tensor, attention_mask: torch.Tensor | None, segment_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """(users or 1, t) position of each token among the real tokens of its history, with padding on either side."""
    if segment_ids is not None:
        return segment_positions(segment_ids)
    if attention_mask is None:
        return torch.arange(states.shape[1], device=states.device).unsqueeze(0)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


# --- Packing: several histories in one encoder row, several sessions that read parts of it ------------------------------------------------------
# transformers' mask builders turn these functions into the form that eager, sdpa or flex attention needs.


def check_packing(
    implementation: str | None,
    attention_mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    history_ranges: torch.Tensor | None,
) -> None:
    """
    Raises:
        ValueError: the attention implementation cannot express packed rows, or the arguments contradict each other.
    """
    if segment_ids is None and history_ranges is None:
        return
    if implementation not in PACKING_ATTENTION:
        raise ValueError(
            f"segment_ids and history_ranges need an attention that takes any mask: {', '.join(PACKING_ATTENTION)}; this model has "
            f'{implementation!r}. Call model.set_attn_implementation("sdpa"), or train without packing and prefixes'
        )
    if history_ranges is None:
        raise ValueError(
            "segment_ids without history_ranges: pass the range of the packed row that each session reads"
        )
    if segment_ids is not None and attention_mask is not None:
        raise ValueError("pass segment_ids, which are 0 on padding, or attention_mask; not both")


def segment_positions(segment_ids: torch.Tensor) -> torch.Tensor:
    """
    (rows, t) int64: the index of each token inside its segment, a run of equal ids.

    Example:
        >>> segment_positions(torch.tensor([[1, 1, 1, 2, 2, 0]]))
        tensor([[0, 1, 2, 0, 1, 0]])
    """
    at = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    opens = torch.ones_like(segment_ids, dtype=torch.bool)
    opens[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return at - torch.where(opens, at, 0).cummax(-1).values


def same_segment(segment_ids: torch.Tensor) -> MaskFunction:
    """A token sees its segment; padding, segment 0, sees padding, so that no row of the softmax is empty."""

    def visible(batch, head, query, key):
        return segment_ids[batch, query] == segment_ids[batch, key]

    return visible


def within_ranges(history_ranges: torch.Tensor, steps: int) -> MaskFunction:
    """Query `p * steps + i` of row b, step i of its p-th session, sees the keys from `history_ranges[b, p, 0]` up to `[b, p, 1]`."""
    # Separate tensors, not two views of one: flex attention's CPU kernel does not compile with views.
    starts, stops = (history_ranges[..., i].repeat_interleave(steps, dim=1).contiguous() for i in (0, 1))

    def visible(batch, head, query, key):
        return (starts[batch, query] <= key) & (key < stops[batch, query])

    return visible


def positions_behind(history_ranges: torch.Tensor, key_positions: torch.Tensor, steps: int) -> torch.Tensor:
    """
    (rows, P * steps) int64: for every query of `within_ranges` the position right behind the last token that it reads.

    Example:
        >>> keys = segment_positions(torch.tensor([[1, 1, 1, 2, 2, 0]]))
        >>> positions_behind(torch.tensor([[[0, 2], [3, 5]]]), keys, steps=2)
        tensor([[2, 2, 2, 2]])
    """
    last = history_ranges[..., 1] - 1
    return (key_positions.expand(len(last), -1).gather(1, last) + 1).repeat_interleave(steps, dim=1)


# --- One position per item (`config.encoder_pools_items`): a history's tokens in groups of `stride` ---------------------------------------------


def pooled_embeddings(embeddings: torch.Tensor, stride: int) -> torch.Tensor:
    """
    Sums the embeddings of each item's tokens: (rows, t, width) to (rows, t / stride, width).

    Raises:
        ValueError: the tokens are not whole items.
    """
    if embeddings.shape[1] % stride:
        raise ValueError(
            f"encoder_pools_items needs histories of whole items, {stride} tokens each; got {embeddings.shape[1]} tokens"
        )
    return embeddings.unflatten(1, (-1, stride)).sum(2)


def at_places(values: torch.Tensor | None, stride: int) -> torch.Tensor | None:
    """
    A mask or segments of tokens (rows, t) as those of positions, (rows, t / stride). None stays None.

    Example:
        >>> at_places(torch.tensor([[1, 1, 1, 1, 0, 0]]), 2)
        tensor([[1, 1, 0]])
    """
    return values if values is None or stride == 1 else values[:, ::stride]


def ranges_of_places(history_ranges: torch.Tensor | None, stride: int) -> torch.Tensor | None:
    """
    (rows, P, 2) ranges of tokens as ranges of positions; a range that ends inside an item includes it. None stays None.

    Example:
        >>> ranges_of_places(torch.tensor([[[0, 8], [4, 12], [0, 1]]]), 4).tolist()
        [[[0, 2], [1, 3], [0, 1]]]
    """
    if history_ranges is None or stride == 1:
        return history_ranges
    return torch.stack((history_ranges[..., 0] // stride, -(-history_ranges[..., 1] // stride)), dim=-1)


class OneRecAttention(nn.Module):
    """Projections and the attention interface, for self- and cross-attention."""

    def __init__(self, config, layer_idx: int, is_causal: bool):
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.head_dim = config, layer_idx, is_causal, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = nn.Dropout(config.attention_dropout)  # a module, so that TRL can switch it off
        width, heads = config.hidden_size, config.num_attention_heads * self.head_dim
        groups = config.num_key_value_heads * self.head_dim
        self.q_proj = OneRecLinear(width, heads, bias=False)
        self.k_proj = OneRecLinear(width, groups, bias=False)
        self.v_proj = OneRecLinear(width, groups, bias=False)
        self.o_proj = OneRecLinear(heads, width, bias=False)

    def _heads(self, states):
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _attend(self, query, key, value, attention_mask, input_shape, **kwargs):
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(out.reshape(*input_shape, -1).contiguous()), weights


class OneRecSelfAttention(OneRecAttention):
    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values: Cache | None = None,
        **kwargs,
    ):
        query, key, value = (self._heads(proj(hidden_states)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        query, key = apply_rotary(query, position_embeddings), apply_rotary(key, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self._attend(query, key, value, attention_mask, hidden_states.shape[:-1], **kwargs)


class OneRecCrossAttention(OneRecAttention):
    """
    Attention to the history. Keys and values have one row per user. Where the decoder has more rows (the beams of a user, in order), the beams are
    folded into the query length and share them.
    """

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        query_positions=None,
        key_positions=None,
        attention_mask=None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs,
    ):
        if past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            layer = past_key_values.cross_attention_cache.layers[self.layer_idx]
            key, value = layer.keys, layer.values
        else:
            key, value = (
                self._heads(self.k_proj(encoder_hidden_states)),
                self._heads(self.v_proj(encoder_hidden_states)),
            )
            if key_positions is not None:
                key = apply_rotary(key, key_positions)
            if past_key_values is not None:
                key, value = past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
                past_key_values.is_updated[self.layer_idx] = True
        users, width = key.shape[0], hidden_states.shape[-1]
        query = self._heads(self.q_proj(hidden_states.reshape(users, -1, width)))
        if query_positions is not None:
            query = apply_rotary(query, query_positions)
        return self._attend(query, key, value, attention_mask, hidden_states.shape[:-1], **kwargs)


class OneRecPointwiseAttention(nn.Module):
    """
    Self-attention without a softmax (`config.encoder_attention="pointwise"`), as in HSTU (arXiv 2402.17152, equations 1 to 3): each token adds its
    weight, so that the number of tokens that support an item is not divided away. `o(norm(silu(q k^T / sqrt(d)) v / 10) * u)`, with q, k, v and
    u the SiLU of linear maps, and rotary positions in place of HSTU's bias. All weights of a row exist at once, whatever the model's attention
    implementation is.

    Args:
        config: a `OneRecConfig`.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> attention = OneRecPointwiseAttention(OneRecConfig(hidden_size=8, num_attention_heads=2))
        >>> angles = torch.zeros(1, 3, 4)
        >>> out, weights = attention(torch.randn(1, 3, 8), (angles.cos(), angles.sin()), torch.ones(1, 1, 3, 3, dtype=torch.bool).tril())
        >>> out.shape, weights.shape
        (torch.Size([1, 3, 8]), torch.Size([1, 2, 3, 3]))
    """

    def __init__(self, config):
        super().__init__()
        self.head_dim, self.groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = OneRecLinear(width, heads, bias=False)
        self.k_proj = OneRecLinear(width, heads // self.groups, bias=False)
        self.v_proj = OneRecLinear(width, heads // self.groups, bias=False)
        self.u_proj = OneRecLinear(width, heads, bias=False)
        self.o_proj = OneRecLinear(heads, width, bias=False)
        self.norm = nn.RMSNorm(heads, eps=config.rms_norm_eps)
        self.attention_dropout = nn.Dropout(config.attention_dropout)

    def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
        """`attention_mask`: bool, True where a query (dim -2) sees a key (dim -1), of [`visible_tokens`]."""
        projected = (F.silu(project(hidden_states)) for project in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (
            states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2) for states in projected
        )
        query, key = apply_rotary(query, position_embeddings), apply_rotary(key, position_embeddings)
        key, value = (states.repeat_interleave(self.groups, dim=1) for states in (key, value))
        weights = F.silu(query @ key.mT * self.head_dim**-0.5) / _POINTWISE_LENGTH
        weights = weights.masked_fill(~attention_mask, 0.0)
        out = (self.attention_dropout(weights) @ value).transpose(1, 2).flatten(2)
        out = self.norm(out.to(self.norm.weight.dtype))  # autocast leaves the norm's weight in float32
        return self.o_proj(out * F.silu(self.u_proj(hidden_states))), weights


def visible_tokens(
    states: torch.Tensor, attention_mask: torch.Tensor | None, segment_ids: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """
    The mask of [`OneRecPointwiseAttention`]: (rows or 1, 1, t, t) bool.

    Args:
        states: (rows, t, width).
        attention_mask: (rows, t), 0 for padding; all tokens are real when None.
        segment_ids: (rows, t) of packed rows, in place of the mask.

    Example:
        >>> visible_tokens(torch.zeros(1, 3, 2), torch.tensor([[1, 1, 0]]), None, causal=True)[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    """
    t = states.shape[1]
    visible = torch.ones(1, 1, t, t, dtype=torch.bool, device=states.device)
    if causal:
        visible = visible.tril()
    if segment_ids is not None:
        return visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return visible if attention_mask is None else visible & attention_mask[:, None, None, :].bool()


class OneRecMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = OneRecLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = OneRecLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = OneRecLinear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


@use_experts_implementation
class OneRecExperts(nn.Module):
    """All experts of a layer in packed weights; this loop is the "eager" implementation."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, inner))
        self.act_fn = ACT2FN[config.hidden_act]
        self.packed = None  # a second copy of the weights, within `OneRecGenerationMixin.packed_experts`

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        with torch.no_grad():  # one class more: expert parallelism marks slots of other ranks with id == num_experts
            mask = F.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for row in hit:
            expert = row[0]
            if expert == self.num_experts:
                continue
            slot, token = torch.where(mask[expert])
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            update = F.linear(self.act_fn(gate) * up, self.down_proj[expert]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, update.to(out.dtype))
        return out


class OneRecTopKRouter(PreciseBuffers):
    """
    Gates `g_i = s_i` for the top-k of `s = softmax(h E^T)` over all experts (paper, section 3.2), not rescaled unless `norm_topk_prob`. The
    balancing bias is added to `s` for the choice of experts only (loss-free balancing, technical report).
    """

    def __init__(self, config):
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, hidden_states):
        router_logits = F.linear(hidden_states.float(), self.weight.float())
        scores = router_logits.softmax(-1)
        index = torch.topk(scores + self.e_score_correction_bias, self.top_k, dim=-1)[1]
        weights = scores.gather(1, index)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return router_logits, weights.to(hidden_states.dtype), index


class OneRecSparseMoeBlock(nn.Module):
    """Router and experts (paper, section 3.2)."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts  # under expert parallelism `experts` has only those of the rank
        self.experts = OneRecExperts(config)
        self.gate = OneRecTopKRouter(config)

    def forward(self, hidden_states, token_mask=None):
        """(batch, length, width) states, and in training the number of tokens (those of `token_mask`) that chose each expert."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(flat)
        out = self.experts(flat, index, weights).reshape(hidden_states.shape)
        if not self.training:
            return out, None
        counted = (
            torch.ones_like(index) if token_mask is None else token_mask.reshape(-1, 1).to(index).expand_as(index)
        )
        counts = index.new_zeros(self.num_experts).scatter_add(0, index.flatten(), counted.flatten())
        return out, counts


class OneRecEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx, pointwise: bool = False):
        super().__init__()
        if pointwise:
            self.self_attn = OneRecPointwiseAttention(config)
        else:
            self.self_attn = OneRecSelfAttention(config, layer_idx, is_causal=config.encoder_is_causal)
        self.mlp = OneRecMLP(config)
        self.input_layernorm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        update, _ = self.self_attn(self.input_layernorm(hidden_states), position_embeddings, attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(update)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


def fed_forward(layer, hidden_states, token_mask):
    """A decoder layer's states after its feed-forward layer or experts, and how many tokens chose each of these."""
    update = layer.post_attention_layernorm(hidden_states)
    # The counts leave the layer as an output: a counter inside it would count twice under gradient checkpointing.
    update, counts = layer.mlp(update, token_mask) if layer.is_sparse else (layer.mlp(update), None)
    return hidden_states + layer.dropout(update), counts


class OneRecDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = OneRecSelfAttention(config, layer_idx, is_causal=True)
        self.cross_attn = OneRecCrossAttention(config, layer_idx, is_causal=False)
        self.is_sparse = config.num_experts > 1
        self.mlp = OneRecSparseMoeBlock(config) if self.is_sparse else OneRecMLP(config)
        self.input_layernorm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_layernorm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout_rate)

    # `past_key_values` is passed by keyword under this name: GradientCheckpointingLayer drops it when it recomputes.
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        query_positions=None,
        key_positions=None,
        token_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        update, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings,
            attention_mask,
            past_key_values.self_attention_cache if past_key_values is not None else None,
            **kwargs,
        )
        hidden_states = hidden_states + self.dropout(update)
        update, _ = self.cross_attn(
            self.cross_attn_layernorm(hidden_states),
            encoder_hidden_states,
            query_positions,
            key_positions,
            encoder_attention_mask,
            past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + self.dropout(update)
        return fed_forward(self, hidden_states, token_mask)
