"""The seam to TRL: encoder-decoder models that take batches whose `input_ids` are the decoder's."""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

_BACKBONE = "decoder_first_backbone"


class _ReachedHead(Exception):
    """Carries what the head was about to be given."""


def _standard_inputs(encoder: nn.Module, inputs: dict) -> dict:
    """The model's own keywords for a decoder-first batch; the encoder runs once per user, whichever rows read it."""
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
    The backbone of a model that has none (T5 and its family): its own forward, up to what its head is given. The families scale the
    decoder's output in different ways there; this takes it as each of them does, and computes no logits.
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
        f"{type(self).__name__} computes its logits without its output embeddings: TRL's head cannot score it"
    )


def takes_decoder_first(model: PreTrainedModel) -> bool:
    """Whether the model's backbone knows the layout itself, as OneRec's does."""
    if model.base_model_prefix == _BACKBONE:
        return False
    return "encoder_input_ids" in inspect.signature(model.base_model.forward).parameters


def enable_decoder_first(model: PreTrainedModel) -> None:
    """
    Lets TRL's fused head score an encoder-decoder model.

    TRL's trainers call `backbone(input_ids=<what is scored>, attention_mask=..., **rest of the batch)` and read `last_hidden_state`. Here
    what is scored is the decoder's sequence, (r * B, T), and the batch brings `encoder_input_ids` and `encoder_attention_mask` (B, S): all
    users once, then all users again. The backbone is taught to read that; the model's own forward, `generate()` and what it saves stay
    as they are. A second call changes nothing.

    Raises:
        ValueError: the model is no encoder-decoder.

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
        setattr(model, _BACKBONE, types.MethodType(_run_to_head, model))
        model.base_model_prefix = _BACKBONE
    elif not takes_decoder_first(model) and _rename_inputs not in backbone._forward_pre_hooks.values():
        backbone.register_forward_pre_hook(_rename_inputs, with_kwargs=True)


@torch.no_grad()
def check_scores(model: PreTrainedModel) -> None:
    """
    Compares log-probabilities of TRL's fused head with the model's own logits on one short sequence. The fused head is a matrix product
    with the output embeddings: a model that does more between backbone and logits (Marian's `final_logits_bias`) would train on other
    probabilities than it generates with, without any error.

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
            f"TRL's fused head gives other log-probabilities than {type(model).__name__} itself ({got.flatten().tolist()} and "
            f"{wanted.flatten().tolist()}): this class does more than a matrix product between its decoder and its logits, such as a "
            "bias, and cannot be trained here"
        )
