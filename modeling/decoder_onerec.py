"""The decoder of a session of items, with sparse mixture-of-experts layers (OneRec, arXiv 2502.18965, section 3.2)."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_onerec import OneRecConfig
from .layers_onerec import OneRecCrossAttention, OneRecDecoderLayer, OneRecRMSNorm, OneRecSelfAttention
from .moe_onerec import OneRecTopKRouter
from .packing_onerec import positions_behind, within_ranges
from .pretrained_onerec import ATTENTION_TP_PLAN, OneRecPreTrainedModel
from .rotary_onerec import OneRecRotaryEmbedding, history_positions


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


class OneRecDecoder(OneRecPreTrainedModel):
    """The session's decoder; `encoder_hidden_states` may have one row per user where `input_ids` has several (its beams, in order)."""

    _can_record_outputs = {
        "hidden_states": OneRecDecoderLayer,
        "attentions": OneRecSelfAttention,
        "cross_attentions": OneRecCrossAttention,
        "router_logits": OutputRecorder(OneRecTopKRouter, index=0),
    }
    _tp_plan = ATTENTION_TP_PLAN | {
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
