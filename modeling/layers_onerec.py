"""What the encoder and the decoder of OneRec are made of: norm, attention, feed-forward, and the layers of both."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import eager_attention_forward

from .moe_onerec import OneRecSparseMoeBlock
from .pointwise_onerec import OneRecPointwiseAttention
from .rotary_onerec import apply_rotary


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


class OneRecAttention(nn.Module):
    """What self- and cross-attention share: projections and the attention interface."""

    def __init__(self, config, layer_idx: int, is_causal: bool):
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.head_dim = config, layer_idx, is_causal, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = nn.Dropout(config.attention_dropout)  # a module, so that TRL can switch it off
        width, heads = config.hidden_size, config.num_attention_heads * self.head_dim
        groups = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, heads, bias=False)
        self.k_proj = nn.Linear(width, groups, bias=False)
        self.v_proj = nn.Linear(width, groups, bias=False)
        self.o_proj = nn.Linear(heads, width, bias=False)

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
    Attention to the history. Keys and values have one row per user; where the decoder has more rows (beams of a user, in order), the
    beams are folded into the query length, so that they share them.
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


class OneRecMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


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

    # `past_key_values` keeps that name and is passed by keyword: GradientCheckpointingLayer drops it when it recomputes.
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
        update, counts = self.post_attention_layernorm(hidden_states), None
        if self.is_sparse:
            # The counts leave the layer as an output: a counter inside it would count twice under gradient checkpointing.
            update, counts = self.mlp(update, token_mask)
        else:
            update = self.mlp(update)
        return hidden_states + self.dropout(update), counts
