"""
OneRec (arXiv 2502.18965, section 3.2): an encoder over the history, a decoder with sparse mixture-of-experts layers over the session.

Differences from the paper's T5-style description, each a config switch or a convention of transformers: rotary positions instead of T5's
relative bias, also in cross-attention (`cross_attention_rope`); SwiGLU feed-forward layers (technical report, arXiv 2506.13695).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.integrations import use_experts_implementation, use_kernel_forward_from_hub
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .catalogue_onerec import CATALOGUE_NAME, ItemCatalogue
from .configuration_onerec import OneRecConfig
from .experts_onerec import EXPERTS_IMPLEMENTATION
from .generation_onerec import OneRecGenerationMixin
from .hub_onerec import HubModel
from .item_embedding_onerec import OneRecItemEmbedding, history_states
from .packing_onerec import (
    check_packing,
    positions_behind,
    same_segment,
    within_ranges,
)
from .pointwise_onerec import OneRecPointwiseAttention, visible_tokens
from .pooling_onerec import at_places, pooled_embeddings, ranges_of_places
from .rotary_onerec import OneRecRotaryEmbedding, apply_rotary, history_positions
from .sharding_onerec import ShardedModel


@dataclass
class OneRecDecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """
    Args:
        router_logits (`tuple(torch.FloatTensor)`, *optional*):
            One `(batch * length, num_experts)` tensor per decoder layer, with `output_router_logits=True`.
        tokens_per_expert (`torch.LongTensor` of shape `(decoder_layers, num_experts)`, *optional*):
            How many tokens chose each expert; in training only.
    """

    router_logits: tuple[torch.FloatTensor] | None = None
    tokens_per_expert: torch.LongTensor | None = None


@dataclass
class OneRecModelOutput(Seq2SeqModelOutput):
    """
    Args:
        router_logits (`tuple(torch.FloatTensor)`, *optional*):
            One `(batch * length, num_experts)` tensor per decoder layer, with `output_router_logits=True`.
        tokens_per_expert (`torch.LongTensor` of shape `(decoder_layers, num_experts)`, *optional*):
            How many tokens chose each expert; in training only.
    """

    router_logits: tuple[torch.FloatTensor] | None = None
    tokens_per_expert: torch.LongTensor | None = None


@dataclass
class OneRecOutput(Seq2SeqLMOutput):
    """
    Args:
        aux_loss (`torch.FloatTensor`, *optional*):
            Load-balancing loss, with `output_router_logits=True`.
        router_logits (`tuple(torch.FloatTensor)`, *optional*):
            One `(batch * length, num_experts)` tensor per decoder layer, with `output_router_logits=True`.
        tokens_per_expert (`torch.LongTensor` of shape `(decoder_layers, num_experts)`, *optional*):
            How many tokens chose each expert; in training only.
    """

    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor] | None = None
    tokens_per_expert: torch.LongTensor | None = None


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


# transformers finds out whether a model has experts by reading the source of the file that defines the PreTrainedModel: the
# decorator below has to stand here.
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


class OneRecTopKRouter(nn.Module):
    """
    Gates `g_i = s_i` for the top-k of `s = softmax(h E^T)` over all experts (paper, section 3.2), not rescaled unless
    `norm_topk_prob`. The balancing bias is added to `s` for the choice only (loss-free balancing, technical report).
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
    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts  # under expert parallelism `experts` knows only its own
        self.experts = OneRecExperts(config)
        self.gate = OneRecTopKRouter(config)

    def forward(self, hidden_states, token_mask=None):
        """(batch, length, width) states, and in training how many tokens (those of `token_mask`) chose each expert."""
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


@auto_docstring
class OneRecPreTrainedModel(HubModel, ShardedModel, PreTrainedModel):
    config: OneRecConfig
    _auto_map = {
        "AutoConfig": "configuration_onerec.OneRecConfig",
        "AutoModel": "modeling_onerec.OneRecModel",
        "AutoModelForSeq2SeqLM": "modeling_onerec.OneRecForConditionalGeneration",
        "AutoProcessor": "processing_onerec.OneRecProcessor",  # for a repository that only the model was pushed to
    }
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OneRecEncoderLayer", "OneRecDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(requested_experts or EXPERTS_IMPLEMENTATION)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, OneRecExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, OneRecTopKRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.e_score_correction_bias)


_ATTENTION_TP = {
    f"layers.*.{attention}.{letter}_proj": "rowwise" if letter == "o" else "colwise"
    for attention in ("self_attn", "cross_attn")
    for letter in "qkvo"
}


class OneRecEncoder(OneRecPreTrainedModel):
    """
    The history's encoder: fully visible, or causal with `config.encoder_is_causal`. Its states are one per token, or one per item with
    `config.encoder_pools_items`; `position_ids` are of these.
    """

    _can_record_outputs = {"hidden_states": OneRecEncoderLayer, "attentions": OneRecSelfAttention}
    _tp_plan = {key: plan for key, plan in _ATTENTION_TP.items() if "cross" not in key} | {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    _fsdp_plan = {"layers.*": "free_full_weight"}

    def __init__(self, config: OneRecConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.item_embedding = OneRecItemEmbedding(config) if config.num_item_embeddings else None
        self.pointwise = config.encoder_attention == "pointwise"
        self.layers = nn.ModuleList(
            [OneRecEncoderLayer(config, i, self.pointwise) for i in range(config.encoder_layers)]
        )
        self.norm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.rotary_emb = OneRecRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        position_ids=None,
        segment_ids=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        kwargs.pop("past_key_values", None), kwargs.pop("use_cache", None)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
            if self.item_embedding is not None:
                inputs_embeds = inputs_embeds + self.item_embedding(input_ids)
            if self.config.encoder_scales_embeddings:
                inputs_embeds = inputs_embeds * self.config.hidden_size**0.5
        if self.config.encoder_pools_items:
            stride = self.config.encoder_stride
            inputs_embeds = pooled_embeddings(inputs_embeds, stride)
            attention_mask, segment_ids = at_places(attention_mask, stride), at_places(segment_ids, stride)
        if position_ids is None:
            position_ids = history_positions(inputs_embeds, attention_mask, segment_ids)
        if self.pointwise:
            mask = visible_tokens(inputs_embeds, attention_mask, segment_ids, self.config.encoder_is_causal)
        else:
            create_mask = create_causal_mask if self.config.encoder_is_causal else create_bidirectional_mask
            mask = create_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=None,
                and_mask_function=None if segment_ids is None else same_segment(segment_ids),
            )
        hidden_states, positions = self.dropout(inputs_embeds), self.rotary_emb(inputs_embeds, position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, position_embeddings=positions, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))

    def item_output_vectors(self, code_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """(items, width) what item scores are inner products with ([`OneRecItemEmbedding.output_vectors`])."""
        code_table = self.embed_tokens.weight if self.config.item_scores_with_codes else None
        return self.item_embedding.output_vectors(code_table, code_tokens)


class OneRecDecoder(OneRecPreTrainedModel):
    """The session's decoder; `encoder_hidden_states` may have one row per user where `input_ids` has several (its beams, in order)."""

    _can_record_outputs = {
        "hidden_states": OneRecDecoderLayer,
        "attentions": OneRecSelfAttention,
        "cross_attentions": OneRecCrossAttention,
        "router_logits": OutputRecorder(OneRecTopKRouter, index=0),
    }
    _tp_plan = _ATTENTION_TP | {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    _ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    _fsdp_plan = {"layers.*": "free_full_weight"}

    def __init__(self, config: OneRecConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([OneRecDecoderLayer(config, i) for i in range(config.decoder_layers)])
        self.norm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.rotary_emb = OneRecRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _cross_positions(
        self, position_ids, encoder_hidden_states, encoder_attention_mask, rows, segment_ids, history_ranges
    ):
        """Rotary embeddings that put the session right behind the history: of the queries (users, beams * t) and the keys."""
        keys = history_positions(encoder_hidden_states, encoder_attention_mask, segment_ids)
        users = encoder_hidden_states.shape[0]
        if history_ranges is None:
            behind = keys[:, -1:] + 1
        else:
            behind = positions_behind(history_ranges, keys, position_ids.shape[-1])
        queries = position_ids.expand(rows, -1).reshape(users, -1) + behind
        return self.rotary_emb(encoder_hidden_states, queries), self.rotary_emb(encoder_hidden_states, keys)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        inputs_embeds=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        segment_ids=None,
        history_ranges=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OneRecDecoderOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of decoder_input_ids and decoder_inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None and not self.training:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        packed = history_ranges is not None
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            # Packed sessions are padded on the right, where causality hides the padding; an unused slot would have nothing to see.
            attention_mask=None if packed else attention_mask,
            position_ids=None if packed else position_ids,
            past_key_values=past_key_values.self_attention_cache if past_key_values is not None else None,
        )
        users = encoder_hidden_states.shape[0]
        cross_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds.reshape(users, -1, inputs_embeds.shape[-1]),
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            and_mask_function=within_ranges(history_ranges, inputs_embeds.shape[1]) if packed else None,
        )
        query_positions = key_positions = None
        if self.config.cross_attention_rope:
            query_positions, key_positions = self._cross_positions(
                position_ids,
                encoder_hidden_states,
                encoder_attention_mask,
                inputs_embeds.shape[0],
                segment_ids,
                history_ranges,
            )
        hidden_states, positions = self.dropout(inputs_embeds), self.rotary_emb(inputs_embeds, position_ids)
        counts = []
        for layer in self.layers:
            hidden_states, layer_counts = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=positions,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=cross_mask,
                query_positions=query_positions,
                key_positions=key_positions,
                token_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            counts.append(layer_counts)
        return OneRecDecoderOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            tokens_per_expert=torch.stack(counts) if counts and counts[0] is not None else None,
        )


@auto_docstring
class OneRecModel(OneRecPreTrainedModel):
    _tied_weights_keys = {"encoder.embed_tokens.weight": "decoder.embed_tokens.weight"}
    _fsdp_plan = {"encoder": "free_full_weight"}  # a group of its own: generate() calls it outside the root forward

    def __init__(self, config: OneRecConfig):
        super().__init__(config)
        self.encoder = OneRecEncoder(config)
        self.decoder = OneRecDecoder(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = self.decoder.embed_tokens = value

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        encoder_input_ids: torch.LongTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        history_ranges: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OneRecModelOutput:
        r"""
        encoder_input_ids (`torch.LongTensor` of shape `(users, t)`, *optional*):
            With it, `input_ids` and `attention_mask` are the decoder's, as TRL's trainers send what they score; they may have r rows per
            user, all users once, then all users again (chosen rows, then rejected ones).
        encoder_attention_mask (`torch.Tensor` of shape `(users, t)`, *optional*):
            Mask of `encoder_input_ids`.
        segment_ids (`torch.LongTensor` of shape `(rows, t)`, *optional*):
            Which of several histories packed into a row of `input_ids` a token belongs to: 1, 2, ... for runs of tokens, 0 for padding.
            It takes the place of `attention_mask`.
        history_ranges (`torch.LongTensor` of shape `(rows, P, 2)`, *optional*):
            The decoder has `rows * P` rows, and row `b * P + p` reads the encoder's tokens from `history_ranges[b, p, 0]` up to
            `history_ranges[b, p, 1]` of row b. A range lies inside one segment, and with a fully visible encoder it ends where its
            segment ends: what stands behind it would leak. Sessions are padded on the right; a slot without a session has labels -100,
            a `decoder_attention_mask` of 0 and any range of one token.
        """
        check_packing(self.config._attn_implementation, attention_mask, segment_ids, history_ranges)
        if encoder_input_ids is not None:
            decoder_input_ids, decoder_attention_mask = input_ids, attention_mask
            input_ids, attention_mask = encoder_input_ids, encoder_attention_mask
        decoder_position_ids = kwargs.pop("decoder_position_ids", None)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, segment_ids=segment_ids, **kwargs)
        stride = self.config.encoder_stride
        attention_mask, segment_ids = at_places(attention_mask, stride), at_places(segment_ids, stride)
        history_ranges = ranges_of_places(history_ranges, stride)
        encoder_hidden_states, cross_attention_mask = encoder_outputs[0], attention_mask
        if encoder_input_ids is not None:  # one encoder pass per user, whichever rows read it
            repeats = decoder_input_ids.shape[0] // encoder_hidden_states.shape[0]
            encoder_hidden_states = encoder_hidden_states.repeat(repeats, 1, 1)
            if attention_mask is not None:
                cross_attention_mask = attention_mask.repeat(repeats, 1)
        out = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            encoder_hidden_states,
            cross_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            segment_ids=segment_ids,
            history_ranges=history_ranges,
            **kwargs,
        )
        return OneRecModelOutput(
            last_hidden_state=out.last_hidden_state,
            past_key_values=out.past_key_values,
            decoder_hidden_states=out.hidden_states,
            decoder_attentions=out.attentions,
            cross_attentions=out.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
            router_logits=out.router_logits,
            tokens_per_expert=out.tokens_per_expert,
        )


@auto_docstring(
    custom_intro="""
    The OneRec generator: reads a history, writes a session of semantic IDs. Its loss is the session-wise next-token loss (paper,
    equation 4) as a mean over code tokens.
    """
)
class OneRecForConditionalGeneration(OneRecGenerationMixin, OneRecPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _files_beside = (CATALOGUE_NAME,)
    _custom_pipelines = {
        "generative-recommendation": {
            "impl": "pipeline_onerec.GenerativeRecommendationPipeline",
            "pt": ["AutoModelForSeq2SeqLM"],
        }
    }

    def __init__(self, config: OneRecConfig):
        super().__init__(config)
        self.model = OneRecModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # the loss named for this class shifts the labels; ours stand in place already
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """`BOS a b c BOS ...` for labels `a b c -100 a ...`: the -100 between two items is the next item's BOS, at the end it is padding."""
        shifted = labels.new_full(labels.shape, self.config.decoder_start_token_id)
        shifted[:, 1:] = labels[:, :-1]
        opens_item = torch.arange(labels.shape[1], device=labels.device) % self.config.tokens_per_item == 0
        opens_item = opens_item & (labels != -100)
        shifted = shifted.masked_fill(shifted == -100, self.config.pad_token_id)
        return shifted.masked_fill(opens_item, self.config.bos_token_id)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        segment_ids: torch.LongTensor | None = None,
        history_ranges: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OneRecOutput:
        r"""
        labels (`torch.LongTensor` of shape `(rows, t)`, *optional*):
            Code tokens, -100 where nothing is predicted (BOS and padding); not shifted: position i is what the decoder says after its
            i-th input.
        segment_ids (`torch.LongTensor` of shape `(rows, t)`, *optional*):
            Which of several histories packed into a row of `input_ids` a token belongs to (see [`OneRecModel`]).
        history_ranges (`torch.LongTensor` of shape `(rows, P, 2)`, *optional*):
            Which tokens of an encoder row each of its P decoder rows reads (see [`OneRecModel`]).

        Example:

        ```python
        >>> import torch
        >>> from onerec_hf import OneRecConfig, OneRecForConditionalGeneration
        >>> config = OneRecConfig(codebook_sizes=[4, 4], hidden_size=16, encoder_layers=1, decoder_layers=1, num_experts=2)
        >>> model = OneRecForConditionalGeneration(config)
        >>> history = torch.tensor([[3, 4, 8, 3, 5, 9]])  # SEP a b SEP a b
        >>> out = model(input_ids=history, labels=torch.tensor([[6, 10]]))
        >>> out.logits.shape, out.loss.ndim
        (torch.Size([1, 2, 64]), 0)

        ```"""
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        output_router_logits = (
            self.config.output_router_logits if output_router_logits is None else output_router_logits
        )
        out = self.model(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            use_cache,
            output_router_logits=output_router_logits,
            segment_ids=segment_ids,
            history_ranges=history_ranges,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            if self.config.item_loss_weight:
                stride = self.config.encoder_stride
                states = history_states(
                    out.encoder_last_hidden_state,
                    at_places(attention_mask, stride),
                    ranges_of_places(history_ranges, stride),
                )
                encoder = self.model.encoder
                item_loss = encoder.item_embedding.loss(
                    states, labels, encoder.item_output_vectors(), kwargs.get("num_items_in_batch")
                )
                loss = loss + self.config.item_loss_weight * item_loss
        if output_router_logits and self.config.num_experts > 1:
            aux_loss = load_balancing_loss_func(
                out.router_logits, self.config.num_experts, self.config.num_experts_per_tok, decoder_attention_mask
            )
            if labels is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return OneRecOutput(
            loss=loss,
            logits=logits,
            aux_loss=aux_loss,
            past_key_values=out.past_key_values,
            decoder_hidden_states=out.decoder_hidden_states,
            decoder_attentions=out.decoder_attentions,
            cross_attentions=out.cross_attentions,
            encoder_last_hidden_state=out.encoder_last_hidden_state,
            encoder_hidden_states=out.encoder_hidden_states,
            encoder_attentions=out.encoder_attentions,
            router_logits=out.router_logits,
            tokens_per_expert=out.tokens_per_expert,
        )

    @torch.no_grad()
    def update_router_bias(self, tokens_per_expert: torch.Tensor) -> None:
        """
        Loss-free balancing (technical report, section 2.2): raises the bias of experts that got fewer tokens than the mean, lowers the
        others', by `config.router_bias_update_rate`. `tokens_per_expert` is (decoder_layers, num_experts), summed over the step and
        over all ranks; [`RouterBalanceCallback`] calls this once per optimizer step.
        """
        load = tokens_per_expert.float()
        for layer, counts in zip(self.model.decoder.layers, load, strict=True):
            bias = layer.mlp.gate.e_score_correction_bias
            bias += self.config.router_bias_update_rate * torch.sign(counts.mean() - counts).to(bias.device)

    def _save_beside(self, folder):
        if self.catalogue is not None:
            self.catalogue.save(f"{folder}/{CATALOGUE_NAME}")

    def _load_beside(self, repo, **kwargs):
        catalogue = ItemCatalogue.find(repo, **kwargs)
        if catalogue is not None:
            self.set_catalogue(catalogue)


__all__ = ["OneRecForConditionalGeneration", "OneRecModel", "OneRecPreTrainedModel"]
