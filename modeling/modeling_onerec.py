"""
OneRec (arXiv 2502.18965, section 3.2): an encoder over the history, a decoder with sparse mixture-of-experts layers over the session.

Differences from the paper's T5-style description, each a config switch or a convention of transformers: rotary positions instead of T5's
relative bias, also in cross-attention (`cross_attention_rope`); SwiGLU feed-forward layers (technical report, arXiv 2506.13695).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple

from .catalogue import CATALOGUE_NAME, ItemCatalogue
from .configuration_onerec import OneRecConfig
from .decoder_onerec import OneRecDecoder
from .encoder_onerec import OneRecEncoder
from .generation_onerec import OneRecGenerationMixin
from .item_head import history_states
from .loss_onerec import session_loss
from .packing_onerec import check_packing
from .pooling_onerec import at_places, ranges_of_places
from .pretrained_onerec import OneRecPreTrainedModel


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
    equation 4) as a mean over code tokens ([`~onerec_hf.modeling.loss_onerec.session_loss`]).
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
        self.loss_type = "ForMaskedLM"  # `loss_function` by this class's name would shift labels; ours stand in place
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
        smoothing: float = 0.0,
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
        smoothing (`float`, defaults to 0):
            Label smoothing: the share of a label's probability that the loss gives to all tokens alike, and that the item loss gives to
            all items alike. (Trainer would take an argument that has "label" in its name for a column of labels.)

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
            code_tokens = kwargs.get("num_items_in_batch")
            if code_tokens is None:
                code_tokens = (labels != -100).sum()
            weights = self.config.session_loss_weights if self.training else None
            loss = session_loss(logits, labels, self.config.tokens_per_item, code_tokens, weights, smoothing)
            if self.config.item_loss_weight:
                stride = self.config.encoder_stride
                states = history_states(
                    out.encoder_last_hidden_state,
                    at_places(attention_mask, stride),
                    ranges_of_places(history_ranges, stride),
                )
                encoder = self.model.encoder
                item_loss = encoder.item_embedding.loss(
                    states, labels, encoder.item_output_vectors(), code_tokens, smoothing
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
