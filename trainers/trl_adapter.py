"""Adapter to TRL: encoder-decoder models for batches whose `input_ids` belong to the decoder."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from trl.trainer.utils import FusedCausalLMOutput

from onerec_hf.modeling.modeling_onerec_v2 import OneRecV2ForConditionalGeneration

_BACKBONE = "decoder_first_backbone"


class _ReachedHead(Exception):
    """Carries the input of the head."""


def _standard_inputs(encoder: nn.Module, inputs: dict) -> dict:
    """Converts a decoder-first batch to the model's keywords. The encoder runs once per user for all decoder rows."""
    inputs = dict(inputs)
    source, source_mask = inputs.pop("encoder_input_ids"), inputs.pop("encoder_attention_mask")
    states = encoder(input_ids=source, attention_mask=source_mask)[0]
    repeats = inputs["input_ids"].shape[0] // states.shape[0]
    inputs["decoder_input_ids"], inputs["decoder_attention_mask"] = inputs.pop("input_ids"), inputs["attention_mask"]
    inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=states.repeat(repeats, 1, 1))
    inputs["attention_mask"] = source_mask.repeat(repeats, 1)
    return inputs


def _rename_inputs(backbone: nn.Module, args: tuple, inputs: dict):
    """Forward pre-hook of a backbone such as `BartModel`."""
    if "encoder_input_ids" not in inputs:
        return None
    return args, _standard_inputs(backbone.get_encoder(), inputs)  # type: ignore[operator]


def _run_to_head(self: PreTrainedModel, **inputs) -> BaseModelOutput:
    """
    Backbone of models without one (T5 and its family): runs the model's forward up to the input of its head, without computing logits. Model
    families scale the decoder's output differently before the head; this keeps their scaling.
    """

    def stop(head, args):
        raise _ReachedHead(args[0])

    inputs = _standard_inputs(self.get_encoder(), inputs)
    head: Any = self.get_output_embeddings()
    hook = head.register_forward_pre_hook(stop)
    try:
        type(self).forward(self, **inputs)  # type: ignore[operator]
    except _ReachedHead as reached:
        return BaseModelOutput(last_hidden_state=reached.args[0])
    finally:
        hook.remove()
    raise ValueError(
        f"{type(self).__name__} does not compute its logits with its output embeddings, so TRL's fused head cannot score it; use another model"
    )


def takes_decoder_first(model: PreTrainedModel) -> bool:
    """Whether the model's backbone supports decoder-first batches itself, like OneRec's."""
    if model.base_model_prefix == _BACKBONE:
        return False
    return "encoder_input_ids" in inspect.signature(model.base_model.forward).parameters


def enable_decoder_first(model: PreTrainedModel) -> None:
    """
    Adapts an encoder-decoder model to TRL's fused head.

    TRL's trainers call `backbone(input_ids=<scored sequence>, attention_mask=..., **rest of the batch)` and read `last_hidden_state`. For
    encoder-decoder models the scored sequence is the decoder's, (r * B, T), and the batch adds `encoder_input_ids` and
    `encoder_attention_mask` (B, S); decoder rows repeat the users r times. The backbone is extended to accept such batches. The model's
    forward, `generate()` and saved files do not change. The function is idempotent.

    Raises:
        ValueError: not an encoder-decoder model.

    Example:
        >>> import torch
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, num_heads=2, num_layers=1, d_ff=8))
        >>> enable_decoder_first(model)
        >>> source, target = torch.tensor([[5, 6, 1]]), torch.tensor([[0, 7, 1], [0, 8, 9]])  # a user, two sequences
        >>> batch = {"encoder_input_ids": source, "encoder_attention_mask": torch.ones_like(source)}
        >>> model.base_model(input_ids=target, attention_mask=torch.ones_like(target), **batch).last_hidden_state.shape
        torch.Size([2, 3, 8])
    """
    if not model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is a decoder-only model; Seq2SeqDPOTrainer trains encoder-decoder models (T5, Bart, OneRec, ...). "
            "Use trl.DPOTrainer for this one"
        )
    if model.base_model_prefix == _BACKBONE:
        return
    backbone = model.base_model
    if backbone is model:
        # Not a method: it would be pickled as the name of an attribute that the class does not have.
        setattr(model, _BACKBONE, functools.partial(_run_to_head, model))
        model.base_model_prefix = _BACKBONE
    elif not takes_decoder_first(model) and _rename_inputs not in backbone._forward_pre_hooks.values():
        backbone.register_forward_pre_hook(_rename_inputs, with_kwargs=True)


def scores_levels(model: PreTrainedModel) -> bool:
    """Whether a code's softmax is over its level, which TRL's fused head, a softmax over the vocabulary, does not compute."""
    return isinstance(model, OneRecV2ForConditionalGeneration)


def _score_levels(self: PreTrainedModel, *args, labels: torch.Tensor, fused_lm_head: bool, **inputs):
    """What TRL's fused head returns, from the model's logits: -inf outside a level, and none of them counts in a mean."""
    outputs = type(self).forward(self, *args, **inputs)  # type: ignore[operator]
    logits, labels = outputs.logits[:, :-1].float(), labels[:, 1:]
    scored, possible = labels != -100, logits.isfinite()
    every = logits.log_softmax(-1)
    picked = every.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(~scored, 0.0)
    with torch.no_grad():
        of_codes = {
            "entropy": torch.special.entr(every.exp()).sum(-1),
            "log_sum_sq_probs": (2 * every).logsumexp(-1),
            "mean_logits": logits.masked_fill(~possible, 0.0).sum(-1) / possible.sum(-1),
        }
    return FusedCausalLMOutput(
        loss=-picked.sum() / scored.sum().clamp(min=1),
        log_probs=picked,
        is_top1=(logits.argmax(-1) == labels) & scored,
        label_mask=scored,
        aux_loss=outputs.aux_loss,
        **{name: value.masked_fill(~scored, 0.0) for name, value in of_codes.items()},
    )


def bind_to_itself(model: PreTrainedModel) -> None:
    """
    Makes the forward that a TRL trainer has put on a model the model's own. TRL's calls the forward of the model that it was made for, so that
    a deepcopy would compute with the original's weights. A pickled model has the forward of its class.

    Example:
        >>> bind_to_itself(trainer.model)  # doctest: +SKIP
    """
    fused: Any = _score_levels if scores_levels(model) else vars(model)["forward"].__func__

    @functools.wraps(type(model).forward)  # generate() reads its signature
    def forward(self, *args, fused_lm_head: bool = False, **kwargs):
        if fused_lm_head:
            return fused(self, *args, fused_lm_head=True, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


@torch.no_grad()
def check_scores(model: PreTrainedModel) -> None:
    """
    Compares log-probabilities of TRL's fused head with the model's logits on one short sequence. The fused head is a matrix product with
    the output embeddings. A model with further operations between backbone and logits (Marian's `final_logits_bias`) would silently train
    on wrong probabilities.

    Raises:
        ValueError: they differ.
    """
    was_training = model.training
    model.eval()
    tokens = torch.arange(3, device=model.device).unsqueeze(0)
    mask = torch.ones_like(tokens)
    own = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": tokens, "decoder_attention_mask": mask}
    logits = model(**own, use_cache=False).logits[:, :-1]
    wanted = logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    batch = {"encoder_input_ids": tokens, "encoder_attention_mask": mask, "input_ids": tokens, "attention_mask": mask}
    got = model(**batch, labels=tokens, fused_lm_head=True, use_cache=False).log_probs.float()
    model.train(was_training)
    tolerance = float(logits.abs().max()) * (1e-3 if model.dtype == torch.float32 else 2e-2)
    if not torch.allclose(got, wanted, rtol=0, atol=tolerance):
        raise ValueError(
            f"the log-probabilities of TRL's fused head differ from those of {type(model).__name__} ({got.flatten().tolist()} and "
            f"{wanted.flatten().tolist()}): this class applies more than a matrix product between decoder and logits, such as a "
            "bias. Use another model"
        )
