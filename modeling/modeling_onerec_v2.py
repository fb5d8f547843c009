"""
OneRec-V2 (arXiv 2508.20900, section 2): a context processor without layers, and a lazy decoder whose cross-attention has no key and value projections.

The context processor maps every position of the history once to `S_kv * L_kv * G_kv * head_dim` channels, normed slices of which are the keys and
values that decoder blocks share. Training reads as many tokens with the blocks as a session has, however long the history is.

Conventions of OneRec that the paper leaves open: rotary positions in both attentions (keys only, values stay as they are), SwiGLU feed-forward layers,
embeddings tied to the heads (`tie_word_embeddings`). Heads are slices of one matrix: the softmax of a level is over the rows of its codes.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .beam_search import BeamDecoder, has_rows
from .configuration_onerec_v2 import OneRecV2Config
from .feature_embedding import FeatureEmbedding, with_features
from .item_head import ItemHead
from .layers_onerec import (
    OneRecAttention,
    OneRecMLP,
    OneRecRMSNorm,
    OneRecRotaryEmbedding,
    OneRecSelfAttention,
    OneRecSparseMoeBlock,
    OneRecTopKRouter,
    apply_rotary,
    fed_forward,
    history_positions,
    pooled_embeddings,
    positions_behind,
    rotate,
    within_ranges,
)
from .lifelong import LifelongPathway, with_lifelong
from .modeling_onerec import (
    OneRecDecoderOutput,
    OneRecForConditionalGeneration,
    OneRecModel,
    OneRecOutput,
    OneRecPreTrainedModel,
    session_loss,
)

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]


class OneRecV2LevelRMSNorm(nn.Module):
    """RMS norm with a weight per level of a semantic ID: that of the code that a position predicts."""

    def __init__(self, levels: int, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(levels, hidden_size))
        self.eps = eps

    def forward(self, hidden_states, levels):
        """`levels`: int64, broadcast to the positions of `hidden_states`; behind the last code nothing is predicted, and any weight will do."""
        dtype, hidden_states = hidden_states.dtype, hidden_states.float()
        hidden_states = hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight[levels.clamp(max=len(self.weight) - 1)] * hidden_states.to(dtype)


class OneRecV2CrossAttention(OneRecAttention):
    """
    Attention to keys and values of the context, one row per user. `config.context_groups` query heads of one token count as one query of as many heads
    as the context has, so that grouped keys and values are never repeated: query head h reads group `h % context_groups`.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx, is_causal=False)
        del self.k_proj, self.v_proj  # the context's keys and values come ready
        self.num_key_value_groups, self.context_groups = 1, config.context_groups

    def forward(self, hidden_states, keys_values, query_positions=None, attention_mask=None, **kwargs):
        users = keys_values[0].shape[0]
        query = self.q_proj(hidden_states).view(users, -1, self.context_groups, self.head_dim).transpose(1, 2)
        if query_positions is not None:
            query = apply_rotary(query, query_positions)
        out, weights = self._attend(query, *keys_values, attention_mask, hidden_states.shape[:-1], **kwargs)
        if weights is not None:  # eager: (users, groups, queries, places) as (users, heads, tokens, places)
            heads_of_group = self.config.num_attention_heads // self.context_groups
            weights = weights.unflatten(2, (-1, heads_of_group)).permute(0, 3, 1, 2, 4).flatten(1, 2)
        return out, weights


class OneRecV2MoeBlock(OneRecSparseMoeBlock):
    """Routed experts, and shared ones that every token uses."""

    def __init__(self, config):
        super().__init__(config)
        shared = copy.copy(config)
        shared.intermediate_size = config.num_shared_experts * config.moe_intermediate_size
        self.shared_expert = OneRecMLP(shared) if config.num_shared_experts else None

    def forward(self, hidden_states, token_mask=None):
        out, counts = super().forward(hidden_states, token_mask)
        return out if self.shared_expert is None else out + self.shared_expert(hidden_states), counts


class OneRecV2DecoderLayer(GradientCheckpointingLayer):
    """A lazy block: cross-attention to the context, self-attention over the session, feed-forward layer or experts."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.cross_attn = OneRecV2CrossAttention(config, layer_idx)
        self.self_attn = OneRecSelfAttention(config, layer_idx, is_causal=True)
        self.is_sparse = config.num_experts > 1 and layer_idx >= config.first_dense_layers
        self.mlp = OneRecV2MoeBlock(config) if self.is_sparse else OneRecMLP(config)
        self.cross_attn_layernorm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.context_layer = layer_idx * config.context_layers // config.decoder_layers

    # `past_key_values` is passed by keyword under this name: GradientCheckpointingLayer drops it when it recomputes.
    def forward(
        self,
        hidden_states,
        keys_values,
        attention_mask=None,
        position_embeddings=None,
        context_mask=None,
        query_positions=None,
        token_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        update, _ = self.cross_attn(
            self.cross_attn_layernorm(hidden_states), keys_values, query_positions, context_mask, **kwargs
        )
        hidden_states = hidden_states + self.dropout(update)
        update, _ = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, past_key_values, **kwargs
        )
        hidden_states = hidden_states + self.dropout(update)
        return fed_forward(self, hidden_states, token_mask)


@auto_docstring
class OneRecV2PreTrainedModel(OneRecPreTrainedModel):
    config: OneRecV2Config
    _auto_map = {
        "AutoConfig": "configuration_onerec_v2.OneRecV2Config",
        "AutoModel": "modeling_onerec_v2.OneRecV2Model",
        "AutoModelForSeq2SeqLM": "modeling_onerec_v2.OneRecV2ForConditionalGeneration",
        "AutoProcessor": "processing_onerec.OneRecProcessor",
    }
    _former_weights = {}
    _no_split_modules = ["OneRecV2DecoderLayer"]


class OneRecV2ContextProcessor(OneRecV2PreTrainedModel):
    """
    The context of a history: its embeddings (summed per item with `config.encoder_pools_items`) under one linear map, (users, places,
    `config.context_width`). No position reads another: a prefix of a history is a range of its context.
    """

    def __init__(self, config: OneRecV2Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.item_head = ItemHead(config) if config.item_head is not None else None
        self.dropout = nn.Dropout(config.dropout_rate)
        self.features = FeatureEmbedding(config) if config.features is not None else None
        self.lifelong = LifelongPathway(config) if config.lifelong is not None else None
        self.context_proj = nn.Linear(config.hidden_size, config.context_width, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        segment_ids=None,
        feature_ids=None,
        lifelong_ids=None,
        **kwargs,
    ) -> BaseModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
            if self.item_head is not None:
                inputs_embeds = inputs_embeds + self.item_head(input_ids)
            packed = segment_ids is not None
            inputs_embeds = with_features(
                self.features, inputs_embeds, feature_ids, self.config.tokens_per_item, packed
            )
        if self.config.encoder_pools_items:
            inputs_embeds = pooled_embeddings(inputs_embeds, self.config.encoder_stride)
        if input_ids is not None:
            inputs_embeds = with_lifelong(self, inputs_embeds, lifelong_ids, segment_ids)
        return BaseModelOutput(last_hidden_state=self.context_proj(self.dropout(inputs_embeds)))


class OneRecV2Decoder(OneRecV2PreTrainedModel):
    """
    The lazy decoder. `encoder_hidden_states` is the context, with one row per user; `input_ids` has one or more rows per user (the beams of a user,
    in order).
    """

    _can_record_outputs = {
        "hidden_states": OneRecV2DecoderLayer,
        "attentions": OneRecSelfAttention,
        "cross_attentions": OneRecV2CrossAttention,
        "router_logits": OutputRecorder(OneRecTopKRouter, index=0),
    }
    _fsdp_plan = {"layers.*": "free_full_weight"}

    def __init__(self, config: OneRecV2Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([OneRecV2DecoderLayer(config, i) for i in range(config.decoder_layers)])
        slices = config.context_layers * config.context_split
        self.context_layernorm = nn.ModuleList(
            [OneRecRMSNorm(config.context_width // slices, config.rms_norm_eps) for _ in range(slices)]
        )
        self.norm = OneRecV2LevelRMSNorm(config.num_codebooks, config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.rotary_emb = OneRecRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def keys_values(self, context: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None) -> KeysValues:
        """
        Keys and values of each of the `context_layers`, (users, groups, places, head_dim): computed once, read by all blocks and beams. They have
        the context's type: under autocast the attention of each block would keep a copy of its own.

        Args:
            context: (users, places, `config.context_width`).
            rope: cosines and sines (users or 1, places, 1, head_dim) that rotate the keys.
        """
        split, found = self.config.context_split, []
        slices = context.chunk(len(self.context_layernorm), dim=-1)
        normed = [
            norm(part).to(context.dtype).unflatten(-1, (-1, self.config.head_dim))
            for norm, part in zip(self.context_layernorm, slices, strict=True)
        ]
        for layer in range(self.config.context_layers):
            key, value = normed[layer * split], normed[(layer + 1) * split - 1]
            key = key if rope is None else rotate(key, *rope).to(context.dtype)
            found.append((key.transpose(1, 2), value.transpose(1, 2)))
        return found

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
        packed, context = history_ranges is not None, encoder_hidden_states
        inputs_embeds, position_ids, past_key_values, mask = self.session_inputs(
            input_ids, inputs_embeds, position_ids, past_key_values, use_cache, attention_mask, packed
        )
        # The context's keys and values are not cached: they cost two norms.
        session_cache = past_key_values.self_attention_cache if past_key_values is not None else None
        users, (rows, steps, width) = context.shape[0], inputs_embeds.shape
        # A token's query heads are so many queries with a head per group: see OneRecV2CrossAttention.
        queries = self.config.num_attention_heads // self.config.context_groups
        context_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds.reshape(users, -1, width).repeat_interleave(queries, dim=1),
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=context,
            and_mask_function=within_ranges(history_ranges, steps * queries) if packed else None,
        )
        query_positions = rope = None
        if self.config.cross_attention_rope:  # the session's positions are right behind the history's
            keys = history_positions(context, encoder_attention_mask, segment_ids)
            behind = positions_behind(history_ranges, keys, steps) if packed else keys[:, -1:] + 1
            places = position_ids.expand(rows, -1).reshape(users, -1) + behind
            query_positions = self.rotary_emb(inputs_embeds, places.repeat_interleave(queries, dim=1))
            rope = tuple(part.unsqueeze(-2) for part in self.rotary_emb(inputs_embeds, keys))
        keys_values = self.keys_values(context, rope)
        hidden_states, positions = self.dropout(inputs_embeds), self.rotary_emb(inputs_embeds, position_ids)
        counts = []
        for layer in self.layers:
            hidden_states, layer_counts = layer(
                hidden_states,
                keys_values=keys_values[layer.context_layer],
                attention_mask=mask,
                position_embeddings=positions,
                context_mask=context_mask,
                query_positions=query_positions,
                token_mask=attention_mask,
                past_key_values=session_cache,
                **kwargs,
            )
            if layer_counts is not None:
                counts.append(layer_counts)
        return OneRecDecoderOutput(
            last_hidden_state=self.norm(hidden_states, position_ids % self.config.tokens_per_item),
            past_key_values=past_key_values,
            tokens_per_expert=torch.stack(counts) if counts else None,
        )


class LazyBeamDecoder(BeamDecoder):
    """[`BeamDecoder`] for OneRec-V2: the softmax of a code is over its level, and the context's keys and values come from `keys_values`."""

    def _history_keys_values(self, history, key_rope):
        return [(key.contiguous(), value.contiguous()) for key, value in self.decoder.keys_values(history, key_rope)]

    def normalized_over(self, level_tokens):
        return level_tokens

    def forward(self, tokens, places):
        buffer = self.buffer[: len(tokens)]
        rope, cross_rope, visible = self._at(places)
        if isinstance(places, slice):
            buffer = buffer[:, : places.stop]
            visible = visible[:, :, :, : places.stop]
        hidden = self.decoder.embedded(tokens)
        last = len(self.decoder.layers) - 1
        for index, layer in enumerate(self.decoder.layers):
            hidden = hidden + self._attend_history(
                layer.cross_attn, layer.cross_attn_layernorm(hidden), self._cross[layer.context_layer], cross_rope
            )
            states = layer.input_layernorm(hidden)
            buffer[:, places, index, 0] = rotate(self._heads(layer.self_attn.k_proj(states)), *rope).flatten(-2)
            buffer[:, places, index, 1] = layer.self_attn.v_proj(states)
            if index == last:  # of the tokens before the last one only the keys and values are needed any more
                hidden, states, visible = hidden[:, -1:], states[:, -1:], visible[:, :, -1:]
                rope = tuple(part[-1:] for part in rope)
            hidden = hidden + self._attend_session(layer.self_attn, states, buffer[:, :, index], rope, visible)
            states = layer.post_attention_layernorm(hidden)
            hidden = hidden + (layer.mlp(states)[0] if layer.is_sparse else layer.mlp(states))
        return self.decoder.norm(hidden[:, -1], self._places[places][-1] % self.config.tokens_per_item)

    def _attend_history(self, attention, states, keys_values, rope):
        query = self._heads(attention.q_proj(states)).unflatten(0, (self.users, -1))
        if rope is not None:
            query = rotate(query, *rope)
        query = query.reshape(self.users, -1, self.config.context_groups, self.head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            query, *keys_values, attn_mask=self._history_visible, scale=attention.scaling
        )
        return attention.o_proj(out.transpose(1, 2).reshape(states.shape[0], states.shape[1], -1))


@auto_docstring
class OneRecV2Model(OneRecV2PreTrainedModel, OneRecModel):
    def __init__(self, config: OneRecV2Config):
        OneRecV2PreTrainedModel.__init__(self, config)
        self.encoder = OneRecV2ContextProcessor(config)
        self.decoder = OneRecV2Decoder(config)
        self.post_init()


@auto_docstring(
    custom_intro="""
    The OneRec-V2 generator: maps a history to a context, and writes the newest item's semantic ID. Its loss is the mean over the codes of the
    target.
    """
)
class OneRecV2ForConditionalGeneration(OneRecV2PreTrainedModel, OneRecForConditionalGeneration):
    _tp_plan = {}
    _beam_decoder = LazyBeamDecoder

    def __init__(self, config: OneRecV2Config):
        OneRecV2PreTrainedModel.__init__(self, config)
        self.model = OneRecV2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.generation_config._from_model_config = False

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> OneRecOutput:
        r"""
        labels (`torch.LongTensor` of shape `(rows, t)`, *optional*):
            Code tokens, -100 where nothing is predicted (BOS and padding), not shifted. Each is scored among the codes of its level.
        segment_ids (`torch.LongTensor` of shape `(rows, t)`, *optional*):
            Which of several histories packed into a row of `input_ids` a token belongs to (see [`OneRecModel`]).
        history_ranges (`torch.LongTensor` of shape `(rows, P, 2)`, *optional*):
            Which tokens of a history's row each of its P decoder rows reads (see [`OneRecModel`]).
        smoothing (`float`, defaults to 0):
            Label smoothing over the codes of a level.
        session_weights (`Sequence[float]`, *optional*):
            Loss weights of a session's items, first to last, relative to their mean, where it has several.

        Returns:
            Its `logits` (rows, t, vocabulary) are -inf outside the level that a position predicts, so that a softmax over the vocabulary is one over the
            level; behind a complete item the next token is BOS with probability one.

        Example:

        ```python
        >>> import torch
        >>> from onerec_hf import OneRecV2Config, OneRecV2ForConditionalGeneration
        >>> config = OneRecV2Config(codebook_sizes=[4, 4], hidden_size=16, decoder_layers=2)
        >>> model = OneRecV2ForConditionalGeneration(config)
        >>> history = torch.tensor([[3, 4, 8, 3, 5, 9]])  # SEP a b SEP a b
        >>> out = model(input_ids=history, labels=torch.tensor([[6, 10]]))
        >>> out.logits.exp().gt(0).sum(-1), out.loss.ndim
        (tensor([[4, 4]]), 0)

        ```"""
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        for name in ("item_targets", "item_code_tokens", "item_ranges"):
            kwargs.pop(name, None)  # the trainer's, for an item loss
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
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
        states = out.last_hidden_state
        places = range(past, past + states.shape[1])
        if isinstance(logits_to_keep, int):
            kept = range(len(places))[-logits_to_keep:] if logits_to_keep else range(len(places))
        else:
            kept = logits_to_keep.tolist()
        columns = self._columns_of_levels([places[place] for place in kept])
        parts = self._level_logits(states[:, list(kept)], columns)
        loss = aux_loss = None
        if labels is not None:
            code_tokens = kwargs.get("num_items_in_batch")
            if code_tokens is None:
                code_tokens = (labels != -100).sum()
            loss = torch.zeros((), device=states.device)
            for of_level, part, offset in zip(columns, parts, self.config.level_offsets, strict=False):
                codes = labels[:, of_level]
                codes = torch.where(codes == -100, codes, codes - offset)
                loss = loss + session_loss(part, codes, 1, code_tokens, session_weights, smoothing)
        if output_router_logits and self.config.sparse_layers:
            # With TRL's batches the mask of the sessions is `attention_mask`.
            mask = attention_mask if "encoder_input_ids" in kwargs else decoder_attention_mask
            aux_loss = load_balancing_loss_func(
                out.router_logits, self.config.num_experts, self.config.num_experts_per_tok, mask
            )
            if labels is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return OneRecOutput(
            loss=loss,
            logits=self._vocabulary_logits(parts, columns),
            aux_loss=aux_loss,
            past_key_values=out.past_key_values,
            decoder_hidden_states=out.decoder_hidden_states,
            decoder_attentions=out.decoder_attentions,
            cross_attentions=out.cross_attentions,
            encoder_last_hidden_state=out.encoder_last_hidden_state,
            router_logits=out.router_logits,
            tokens_per_expert=out.tokens_per_expert,
        )

    def _columns_of_levels(self, places: Sequence[int]) -> list[list[int]]:
        """Per level the columns that predict it, and at last those behind a complete item."""
        levels = [place % self.config.tokens_per_item for place in places]
        return [
            [column for column, level in enumerate(levels) if level == each]
            for each in range(self.config.tokens_per_item)
        ]

    def _level_logits(self, states: torch.Tensor, columns: list[list[int]]) -> list[torch.Tensor]:
        """Logits (rows, columns, codes) of each level's columns: products with the rows of the level's codes alone."""
        rows, parts = has_rows(self.lm_head), []
        for of_level, size, offset in zip(
            columns, self.config.codebook_sizes, self.config.level_offsets, strict=False
        ):
            some, tokens = states[:, of_level], slice(offset, offset + size)
            parts.append(F.linear(some, self.lm_head.weight[tokens]) if rows else self.lm_head(some)[..., tokens])
        return parts

    def _vocabulary_logits(self, parts: list[torch.Tensor], columns: list[list[int]]) -> torch.Tensor:
        """(rows, t, vocabulary): -inf outside the level of a position; behind a complete item 0 for BOS."""
        rows, width = len(parts[0]), sum(map(len, columns))
        logits = parts[0].new_full((rows, width, self.config.vocab_size), float("-inf"))
        for of_level, part, offset in zip(columns, parts, self.config.level_offsets, strict=False):
            logits[:, of_level, offset : offset + part.shape[-1]] = part
        logits[:, columns[-1], self.config.bos_token_id] = 0.0
        return logits


__all__ = ["LazyBeamDecoder", "OneRecV2ForConditionalGeneration", "OneRecV2Model", "OneRecV2PreTrainedModel"]
