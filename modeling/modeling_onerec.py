"""
OneRec (arXiv 2502.18965, section 3.2): an encoder over the history, a decoder with sparse mixture-of-experts layers over the session.

Differences from the paper's T5-style description, each a config switch or a convention of transformers: rotary positions instead of T5's
relative bias, also in cross-attention (`cross_attention_rope`); SwiGLU feed-forward layers (technical report, arXiv 2506.13695).

The layers are in layers_onerec.py, generation is in generation_onerec.py; optional are the item head in item_head.py and features in feature_embedding.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .beside_weights import BesideWeights
from .configuration_onerec import OneRecConfig
from .cpu_experts import EXPERTS_IMPLEMENTATION
from .feature_embedding import FeatureEmbedding, with_features
from .generation_onerec import OneRecGenerationMixin
from .hub import HubModel
from .item_head import ItemHead, LowRankVectors
from .layers_onerec import (
    OneRecCrossAttention,
    OneRecDecoderLayer,
    OneRecEncoderLayer,
    OneRecExperts,
    OneRecRMSNorm,
    OneRecRotaryEmbedding,
    OneRecSelfAttention,
    OneRecTopKRouter,
    at_places,
    check_packing,
    history_positions,
    pooled_embeddings,
    positions_behind,
    ranges_of_places,
    same_segment,
    visible_tokens,
    within_ranges,
)
from .lifelong import LifelongPathway, with_lifelong
from .session_loss import session_loss

ATTENTION_TP_PLAN = {
    f"layers.*.{attention}.{letter}_proj": "rowwise" if letter == "o" else "colwise"
    for attention in ("self_attn", "cross_attn")
    for letter in "qkvo"
}


@auto_docstring
class OneRecPreTrainedModel(HubModel, PreTrainedModel):
    config: OneRecConfig
    _auto_map = {
        "AutoConfig": "configuration_onerec.OneRecConfig",
        "AutoModel": "modeling_onerec.OneRecModel",
        "AutoModelForSeq2SeqLM": "modeling_onerec.OneRecForConditionalGeneration",
        "AutoProcessor": "processing_onerec.OneRecProcessor",  # for a repository that holds the model only
    }
    _former_weights = {r"encoder\.item_embedding\.": "encoder.item_head."}
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OneRecEncoderLayer", "OneRecDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", *ItemHead.FLOATS]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the experts' decorator in this file's text; it is in layers_onerec.py.
        return True

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
        elif isinstance(module, FeatureEmbedding | LifelongPathway | LowRankVectors):
            module.initialize(self.config.initializer_range)

    def embedded(self, tokens):
        """Tokens as a decoder reads them."""
        states = self.embed_tokens(tokens)
        return states * self.config.hidden_size**0.5 if self.config.decoder_scales_embeddings else states

    def session_inputs(
        self, input_ids, inputs_embeds, position_ids, past_key_values, use_cache, attention_mask, packed: bool
    ):
        """What a decoder reads of sessions: embeddings, positions, the cache, and the mask of self-attention."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of decoder_input_ids and decoder_inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embedded(input_ids)
        if use_cache and past_key_values is None and not self.training:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            # Packed sessions are padded on the right, where causality hides the padding; an unused slot would have nothing to see.
            attention_mask=None if packed else attention_mask,
            position_ids=None if packed else position_ids,
            past_key_values=past_key_values.self_attention_cache if past_key_values is not None else None,
        )
        return inputs_embeds, position_ids, past_key_values, mask

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """Refuses a tied embedding that torch 2.13 would train incorrectly from the second step on, without a message, also in models of transformers."""
        if mesh_manager is not None and model.config.tie_word_embeddings:
            rows, shards = model.config.vocab_size, distributed_config.fsdp_size
            if rows % shards:
                enough = -(-rows // shards) * shards
                raise ValueError(
                    f"the tied embedding has vocab_size={rows} rows, which fsdp_size={shards} does not divide: torch trains such a table "
                    f"wrong without a message. Make the model with vocab_size={enough}, or load it in one process, call "
                    f"model.resize_token_embeddings({enough}) and save it"
                )
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict, distributed_config, **kwargs):
        """The weights of a sharded model for saving: a tied table once, as an unsharded model saves it."""
        gathered = super().gather_sharded_state_dict_for_save(model_to_save, state_dict, distributed_config, **kwargs)
        return {name: value for name, value in gathered.items() if name not in model_to_save.all_tied_weights_keys}


@dataclass
class OneRecEncoderOutput(BaseModelOutput):
    """
    Args:
        item_loss (`torch.FloatTensor`, *optional*):
            The item head's loss, summed over the code tokens of sessions, with labels ([`ItemHead.loss`]).
    """

    item_loss: torch.FloatTensor | None = None


class OneRecEncoder(OneRecPreTrainedModel):
    """
    The history's encoder: fully visible, or causal with `config.encoder_is_causal`. It has one state per token, or one per item with
    `config.encoder_pools_items`; `position_ids` count states.

    `labels`, `history_ranges` and `smoothing` are for the item loss alone: it is computed here, where sharded weights are gathered.
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
        self.item_head = ItemHead(config) if config.item_head is not None else None
        self.features = FeatureEmbedding(config) if config.features is not None else None
        self.lifelong = LifelongPathway(config) if config.lifelong is not None else None
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
        history_ranges=None,
        labels=None,
        smoothing=0.0,
        feature_ids=None,
        lifelong_ids=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OneRecEncoderOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        kwargs.pop("past_key_values", None), kwargs.pop("use_cache", None)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
            if self.item_head is not None:
                inputs_embeds = inputs_embeds + self.item_head(input_ids)
            packed = segment_ids is not None
            inputs_embeds = with_features(
                self.features, inputs_embeds, feature_ids, self.config.tokens_per_item, packed
            )
            if self.config.encoder_scales_embeddings:
                inputs_embeds = inputs_embeds * self.config.hidden_size**0.5
        stride = self.config.encoder_stride
        attention_mask, segment_ids = at_places(attention_mask, stride), at_places(segment_ids, stride)
        if self.config.encoder_pools_items:
            inputs_embeds = pooled_embeddings(inputs_embeds, stride)
        if input_ids is not None:
            inputs_embeds = with_lifelong(self, inputs_embeds, lifelong_ids, segment_ids)
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
        hidden_states, item_loss = self.norm(hidden_states), None
        if self.item_head is not None and labels is not None:
            ranges = ranges_of_places(history_ranges, stride)
            item_loss = self.item_head.loss(
                hidden_states, attention_mask, ranges, labels, self.embed_tokens, smoothing
            )
        return OneRecEncoderOutput(last_hidden_state=hidden_states, item_loss=item_loss)


@dataclass
class OneRecDecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """
    Args:
        router_logits (`tuple(torch.FloatTensor)`, *optional*):
            One `(batch * length, num_experts)` tensor per decoder layer, with `output_router_logits=True`.
        tokens_per_expert (`torch.LongTensor` of shape `(decoder_layers, num_experts)`, *optional*):
            Number of tokens that chose each expert; in training only.
    """

    router_logits: tuple[torch.FloatTensor] | None = None
    tokens_per_expert: torch.LongTensor | None = None


class OneRecDecoder(OneRecPreTrainedModel):
    """The session's decoder. `encoder_hidden_states` has one row per user, `input_ids` one or more (the beams of a user, in order)."""

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
        packed = history_ranges is not None
        inputs_embeds, position_ids, past_key_values, mask = self.session_inputs(
            input_ids, inputs_embeds, position_ids, past_key_values, use_cache, attention_mask, packed
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
        if self.config.cross_attention_rope:  # the session's positions are right behind the history's
            keys = history_positions(encoder_hidden_states, encoder_attention_mask, segment_ids)
            behind = positions_behind(history_ranges, keys, position_ids.shape[-1]) if packed else keys[:, -1:] + 1
            queries = position_ids.expand(inputs_embeds.shape[0], -1).reshape(users, -1) + behind
            query_positions, key_positions = (self.rotary_emb(encoder_hidden_states, each) for each in (queries, keys))
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


@dataclass
class OneRecModelOutput(Seq2SeqModelOutput):
    """
    Args:
        router_logits (`tuple(torch.FloatTensor)`, *optional*):
            One `(batch * length, num_experts)` tensor per decoder layer, with `output_router_logits=True`.
        tokens_per_expert (`torch.LongTensor` of shape `(decoder_layers, num_experts)`, *optional*):
            Number of tokens that chose each expert; in training only.
        item_loss (`torch.FloatTensor`, *optional*):
            The item head's loss, summed over the code tokens of sessions, with labels.
    """

    router_logits: tuple[torch.FloatTensor] | None = None
    tokens_per_expert: torch.LongTensor | None = None
    item_loss: torch.FloatTensor | None = None


@dataclass
class OneRecOutput(Seq2SeqLMOutput):
    """
    Args:
        aux_loss (`torch.FloatTensor`, *optional*):
            Load-balancing loss, with `output_router_logits=True`.
        router_logits (`tuple(torch.FloatTensor)`, *optional*):
            One `(batch * length, num_experts)` tensor per decoder layer, with `output_router_logits=True`.
        tokens_per_expert (`torch.LongTensor` of shape `(decoder_layers, num_experts)`, *optional*):
            Number of tokens that chose each expert; in training only.
    """

    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor] | None = None
    tokens_per_expert: torch.LongTensor | None = None


@auto_docstring
class OneRecModel(OneRecPreTrainedModel):
    _tied_weights_keys = {"encoder.embed_tokens.weight": "decoder.embed_tokens.weight"}
    _fsdp_plan = {"encoder": "free_full_weight"}  # its own group: generate() calls it outside the root forward

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
        labels: torch.LongTensor | None = None,
        smoothing: float = 0.0,
        feature_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OneRecModelOutput:
        r"""
        encoder_input_ids (`torch.LongTensor` of shape `(users, t)`, *optional*):
            With it, `input_ids` and `attention_mask` are the decoder's, the way TRL's trainers send the sequences to score. They may have r rows
            per user: all users once, then all users again (chosen rows, then rejected ones).
        encoder_attention_mask (`torch.Tensor` of shape `(users, t)`, *optional*):
            Mask of `encoder_input_ids`.
        segment_ids (`torch.LongTensor` of shape `(rows, t)`, *optional*):
            Which of several histories packed into a row of `input_ids` a token belongs to: 1, 2, ... for runs of tokens, 0 for padding.
            Replaces `attention_mask`.
        history_ranges (`torch.LongTensor` of shape `(rows, P, 2)`, *optional*):
            The decoder has `rows * P` rows, and row `b * P + p` reads the encoder's tokens from `history_ranges[b, p, 0]` up to
            `history_ranges[b, p, 1]` of row b. A range lies inside one segment, and with a fully visible encoder it ends where its
            segment ends: later tokens would leak. Sessions are padded on the right; a slot without a session has labels -100,
            a `decoder_attention_mask` of 0 and any range of one token.
        labels (`torch.LongTensor` of shape `(rows, t)`, *optional*):
            Code tokens of the sessions, for the item head's loss alone.
        smoothing (`float`, defaults to 0):
            Label smoothing of that loss.
        feature_ids (`torch.LongTensor` of shape `(rows, places, slots)`, *optional*):
            Codes of features per place of the encoder's tokens, for a model with `config.features` ([`FeatureEmbedding`]).
        lifelong_ids (`torch.LongTensor` of shape `(rows, n, 1 + levels)`, *optional*):
            What is older than the history, for a model with `config.lifelong` ([`LifelongPathway`]).
        """
        check_packing(self.config._attn_implementation, attention_mask, segment_ids, history_ranges)
        if encoder_input_ids is not None:
            decoder_input_ids, decoder_attention_mask = input_ids, attention_mask
            input_ids, attention_mask = encoder_input_ids, encoder_attention_mask
        if attention_mask is None and segment_ids is None and input_ids is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        decoder_position_ids = kwargs.pop("decoder_position_ids", None)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids,
                attention_mask,
                inputs_embeds,
                segment_ids=segment_ids,
                history_ranges=kwargs.pop("item_ranges", history_ranges),
                labels=labels,
                smoothing=smoothing,
                feature_ids=feature_ids,
                **kwargs,
            )
        stride = self.config.encoder_stride
        attention_mask, segment_ids = at_places(attention_mask, stride), at_places(segment_ids, stride)
        history_ranges = ranges_of_places(history_ranges, stride)
        encoder_hidden_states, cross_attention_mask = encoder_outputs[0], attention_mask
        if encoder_input_ids is not None:  # one encoder pass per user, for all decoder rows
            repeats = decoder_input_ids.shape[0] // encoder_hidden_states.shape[0]
            encoder_hidden_states = encoder_hidden_states.repeat(repeats, 1, 1)
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
            item_loss=getattr(encoder_outputs, "item_loss", None),
        )


@auto_docstring(
    custom_intro="""
    The OneRec generator: reads a history, writes a session of semantic IDs. Its loss is the session-wise next-token loss (paper,
    equation 4) as a mean over code tokens.
    """
)
class OneRecForConditionalGeneration(BesideWeights, OneRecGenerationMixin, OneRecPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
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
        self.loss_type = "ForMaskedLM"  # `loss_function` by this class's name would shift labels; ours are not shifted
        self.post_init()
        self.generation_config._from_model_config = False  # such a file is read without its `item_score_weight`

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
        smoothing: float = 0.0,
        session_weights: Sequence[float] | None = None,
        item_targets: torch.LongTensor | None = None,
        item_code_tokens: torch.Tensor | None = None,
        feature_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OneRecOutput:
        r"""
        labels (`torch.LongTensor` of shape `(rows, t)`, *optional*):
            Code tokens, -100 where nothing is predicted (BOS and padding). They are not shifted: position i is the target of the decoder's i-th
            input.
        segment_ids (`torch.LongTensor` of shape `(rows, t)`, *optional*):
            Which of several histories packed into a row of `input_ids` a token belongs to (see [`OneRecModel`]).
        history_ranges (`torch.LongTensor` of shape `(rows, P, 2)`, *optional*):
            Which tokens of an encoder row each of its P decoder rows reads (see [`OneRecModel`]).
        smoothing (`float`, defaults to 0):
            Label smoothing, over the vocabulary and, in the item head's loss, over the items. (Trainer takes an argument with "label" in its
            name for a column of labels.)
        session_weights (`Sequence[float]`, *optional*):
            Loss weights of a session's items, first to last, relative to their mean; equal when not given, as in the paper. The item head's loss is
            not weighted.
        item_targets (`torch.LongTensor` of shape `(rows * P, t)`, *optional*):
            Sessions for the item head's loss in place of `labels`, with `item_ranges` as `history_ranges`: those of [`draw_sessions`].
        item_code_tokens (`torch.Tensor`, *optional*):
            Code tokens of all `item_targets` of the step: what the item head's loss is divided by, as the codes' is by `num_items_in_batch`.
        feature_ids (`torch.LongTensor` of shape `(rows, places, slots)`, *optional*):
            Codes of features per place of `input_ids`, `tokens_per_item` tokens each, for a model with `config.features`.

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
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        item_loss_weight = 0.0 if self.config.item_head is None else self.config.item_head.loss_weight
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
            labels=(labels if item_targets is None else item_targets) if item_loss_weight else None,
            smoothing=smoothing,
            feature_ids=feature_ids,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = aux_loss = None
        if labels is not None:
            code_tokens = kwargs.get("num_items_in_batch")
            if code_tokens is None:
                code_tokens = (labels != -100).sum()
            loss = session_loss(logits, labels, self.config.tokens_per_item, code_tokens, session_weights, smoothing)
            if item_loss_weight:
                if out.item_loss is None:
                    raise ValueError("the encoder computes the item loss: pass input_ids without encoder_outputs")
                loss += item_loss_weight * out.item_loss / (code_tokens if item_targets is None else item_code_tokens)
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
    def update_router_bias(self, tokens_per_expert: torch.Tensor, rate: float) -> None:
        """
        Loss-free balancing (technical report, section 2.2): raises the bias of experts that got fewer tokens than the mean by `rate`, and lowers
        that of the others. `tokens_per_expert` is (decoder_layers, num_experts), summed over the step and over all ranks;
        [`RouterBalanceCallback`] calls this once per optimizer step.
        """
        load = tokens_per_expert.float()
        for layer, counts in zip((each for each in self.model.decoder.layers if each.is_sparse), load, strict=True):
            bias = layer.mlp.gate.e_score_correction_bias
            bias += rate * torch.sign(counts.mean() - counts).to(bias.device)


__all__ = ["OneRecForConditionalGeneration", "OneRecModel", "OneRecPreTrainedModel"]
