"""Arguments of [`Seq2SeqDPOTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl.trainer.dpo_config import DPOConfig

from onerec_hf.trainers.preference_losses import REFERENCE_FREE, cdpo_settings, cpo_settings


@dataclass
class Seq2SeqDPOConfig(DPOConfig):
    """
    `trl.DPOConfig` for encoder-decoder models. All options and defaults of TRL apply (`bf16` where the device has it,
    `activation_checkpointing`, learning rate 1e-6); `max_length` limits the decoder's sequence only.

    Args:
        max_prompt_length: text prompts are truncated to this number of tokens. OneRec histories are limited by the processor's `max_history`.
        loss_type: TRL's names, and "cdpo", "cpo", "simpo", "s_dpo" ([`onerec_hf.trainers.preference_losses`]). "cdpo", "cpo" and
            "simpo" are converted to TRL's names and weights. The last three cannot be combined with other losses.
        cpo_alpha: weight of the chosen answers' likelihood in CPO.
        simpo_gamma: SimPO's target margin.
        reference_free: use constants instead of a reference model; set by "cpo" and "simpo".
        stop_at_nonfinite: stop at a non-finite loss or gradient; see [`~onerec_hf.trainers.StepFaults`].

    Raises:
        ValueError: losses that cannot be combined, or options that do not apply to encoder-decoder models.

    Example:
        >>> args = Seq2SeqDPOConfig("out", loss_type="cdpo", label_smoothing=0.25, report_to="none", bf16=False, use_cpu=True)
        >>> args.loss_type, args.loss_weights
        (['sigmoid', 'robust'], [1.5, -0.5])
    """

    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Truncate text prompts to this number of tokens."}
    )
    cpo_alpha: float = field(default=1.0, metadata={"help": "Weight of the chosen answers' likelihood in CPO."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "Target margin of SimPO."})
    reference_free: bool = field(
        default=False, metadata={"help": "Use constants instead of a reference model; set by loss_type cpo and simpo."}
    )
    stop_at_nonfinite: bool = field(
        default=True,
        metadata={"help": "Stop at a non-finite loss or gradient, and save the batch's examples."},
    )

    def __post_init__(self):
        if self.activation_checkpointing is None:  # TRL sets its default under the deprecated name
            self.activation_checkpointing = self.gradient_checkpointing
        if self.bf16 is None and not (is_torch_bf16_gpu_available() and not self.use_cpu):
            self.bf16 = False  # TRL's default is true, which a CPU refuses
        super().__post_init__()
        self.dataloader_pin_memory &= (
            torch.accelerator.is_available()
        )  # without an accelerator, torch warns once per loader
        if self.truncation_mode != "keep_start":
            raise ValueError("truncation_mode must be 'keep_start', since answers are generated from the start")
        names = list(self.loss_type)
        alone = [name for name in names if name in (*REFERENCE_FREE, "s_dpo")]
        if alone and len(names) > 1:
            raise ValueError(f"loss_type {alone[0]!r} cannot be combined with other losses; got {names}")
        if alone and self.f_divergence_type != "reverse_kl":
            raise ValueError(f"loss_type {alone[0]!r} is defined for f_divergence_type='reverse_kl' only")
        if alone and self.ld_alpha is not None:
            raise ValueError(f"loss_type {alone[0]!r} does not support ld_alpha; omit it")
        if names[0] in REFERENCE_FREE:
            self.reference_free = True
        if self.reference_free and (self.sync_ref_model or self.precompute_ref_log_probs):
            raise ValueError(
                "a reference-free loss has no reference; omit sync_ref_model and precompute_ref_log_probs"
            )
        if names[0] == "s_dpo" and self.precompute_ref_log_probs:
            raise ValueError(
                "loss_type 's_dpo' does not support precompute_ref_log_probs, which stores one rejected answer; omit it"
            )
        weights: dict[str, float] = {}
        for name, weight in zip(names, self.loss_weights or [1.0] * len(names), strict=True):
            for part, share in self._in_trl(name).items():
                weights[part] = weights.get(part, 0.0) + weight * share
        if list(weights) != names:
            self.loss_type, self.loss_weights = list(weights), list(weights.values())

    def _in_trl(self, name: str) -> dict[str, float]:
        """The loss as a weighted sum of TRL's losses."""
        if name == "cdpo":
            return cdpo_settings(self.label_smoothing)
        if name == "cpo":
            return cpo_settings(self.cpo_alpha)
        return {"sigmoid_norm" if name == "simpo" else name: 1.0}
