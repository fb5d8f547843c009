"""The encoder of a user's history (OneRec, arXiv 2502.18965, section 3.2)."""

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_onerec import OneRecConfig
from .item_head import OneRecItemEmbedding, table
from .layers_onerec import OneRecEncoderLayer, OneRecRMSNorm, OneRecSelfAttention
from .packing_onerec import same_segment
from .pointwise_onerec import visible_tokens
from .pooling_onerec import at_places, pooled_embeddings
from .pretrained_onerec import ATTENTION_TP_PLAN, OneRecPreTrainedModel
from .rotary_onerec import OneRecRotaryEmbedding, history_positions


class OneRecEncoder(OneRecPreTrainedModel):
    """
    The history's encoder: fully visible, or causal with `config.encoder_is_causal`. Its states are one per token, or one per item with
    `config.encoder_pools_items`; `position_ids` are of these.
    """

    _can_record_outputs = {"hidden_states": OneRecEncoderLayer, "attentions": OneRecSelfAttention}
    _tp_plan = {key: plan for key, plan in ATTENTION_TP_PLAN.items() if "cross" not in key} | {
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
        code_table = table(self.embed_tokens) if self.config.item_scores_with_codes else None
        return self.item_embedding.output_vectors(code_table, code_tokens)
