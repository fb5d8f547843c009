"""Arguments of [`OneRecGRPOTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl.trainer.grpo_config import GRPOConfig

from onerec_hf.trainers.guards import GuardOptions
from onerec_hf.trainers.rollouts import ROLLOUTS

#: TRL's losses that its trainer computes of log-probabilities alone, and ours.
OWN_LOSSES = ("ecpo", "gbpo")
LOSSES = (*OWN_LOSSES, "grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
# Settings of TRL that would change what is drawn but not the policy's log-probabilities, or that are of text.
_UNUSED = {
    "use_vllm": False,
    "use_transformers_continuous_batching": False,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "generation_kwargs": None,
    "cache_implementation": None,
    "pad_to_multiple_of": None,
    "mask_truncated_completions": False,
    "cast_lm_head_to_fp32": False,
    "sync_ref_model": False,
    "log_completions": False,
}


@dataclass
class OneRecGRPOConfig(GuardOptions, GRPOConfig):
    """
    `trl.GRPOConfig` for sessions. TRL's options and defaults apply (`num_iterations`, `steps_per_generation`, `epsilon`, `scale_rewards`,
    `reward_weights`, learning rate 1e-6, no reference: `beta=0`) but for those named below. A batch counts sessions: a step of
    `per_device_train_batch_size` 64 with `num_generations` 16 has four histories. Those of [`~onerec_hf.trainers.guards.GuardOptions`] apply too.

    Args:
        loss_type: "ecpo", "gbpo" ([`onerec_hf.trainers.policy_losses`]), or TRL's "grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo".
        num_generations: sessions per history (G).
        rollouts: "distinct" draws a history's sessions without replacement, "sample" independently, "beam" takes the most probable ones.
        constrained: draw items of the catalogue only. False draws from the full vocabulary (with OneRec-V2, whose softmax is so, from all codes of a
            level), where sessions may be illegal; it needs rollouts="sample".
        rollout_length: items per session (default: the model's session length).
        exclude_seen: leave out the items of the history.
        rollout_batch_size: histories per generation batch.
        ecpo_delta: delta of ECPO.
        importance_sampling_level: "token", a ratio per code as in TRL, or "sequence"; for "ecpo" and "gbpo" that is the ratio of whole
            sessions, as the papers write it.
        ntp_weight: weight of the next-token loss on real sessions; 0 leaves it out.
        ntp_batch_size: real sessions per step and device.
        format_samples: of the sessions of a history that are drawn freely, how many get the format reward (the report's K).
        format_weight: the format reward: added to the advantage of a legal session.
        stop_at_nonfinite: stop at a non-finite loss or gradient; see [`~onerec_hf.trainers.StepFaults`].

    Raises:
        ValueError: settings that do not go together, or that do not apply here.

    Example:
        >>> args = OneRecGRPOConfig("out", loss_type="gbpo", report_to="none", bf16=False, use_cpu=True)
        >>> args.num_generations, args.rollouts, args.beta
        (16, 'distinct', 0.0)
    """

    per_device_train_batch_size: int = field(default=64, metadata={"help": "Sessions per step and device."})
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "Sessions per step and device in evaluation."}
    )
    num_generations: int = field(default=16, metadata={"help": "Sessions per history (G)."})
    loss_type: str = field(default="ecpo", metadata={"help": f"One of {', '.join(LOSSES)}.", "choices": list(LOSSES)})
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout: what is scored is drawn."})
    rollouts: str = field(
        default="distinct",
        metadata={"help": "distinct (without replacement), sample (independent) or beam.", "choices": list(ROLLOUTS)},
    )
    constrained: bool = field(default=True, metadata={"help": "Draw items of the catalogue only."})
    rollout_length: int | None = field(
        default=None, metadata={"help": "Items per session (default: the model's session length)."}
    )
    exclude_seen: bool = field(default=True, metadata={"help": "Exclude items of the history."})
    rollout_batch_size: int = field(default=32, metadata={"help": "Histories per generation batch."})
    ecpo_delta: float = field(default=0.1, metadata={"help": "delta of ECPO's early clip."})
    ntp_weight: float = field(default=1.0, metadata={"help": "Weight of the next-token loss on real sessions."})
    ntp_batch_size: int = field(default=32, metadata={"help": "Real sessions per step and device."})
    format_samples: int = field(
        default=5, metadata={"help": "Freely drawn sessions of a history that get the format reward (K)."}
    )
    format_weight: float = field(default=1.0, metadata={"help": "Format reward of a legal session."})
    stop_at_nonfinite: bool = field(
        default=True, metadata={"help": "Stop at a non-finite loss or gradient, and save the batch's examples."}
    )

    def __post_init__(self):
        if self.activation_checkpointing is None:  # TRL sets its default under the deprecated name
            self.activation_checkpointing = self.gradient_checkpointing
        if self.bf16 is None and not (is_torch_bf16_gpu_available() and not self.use_cpu):
            self.bf16 = False  # TRL's default is true, which a CPU refuses
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations}: rewards are compared within a history's sessions; use at least 2"
            )
        super().__post_init__()
        self.check_guards()
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # without one, torch warns once per loader
        if self.loss_type not in LOSSES:
            raise ValueError(f"loss_type must be one of {', '.join(LOSSES)}; got {self.loss_type!r}")
        if self.rollouts not in ROLLOUTS:
            raise ValueError(f"rollouts must be one of {', '.join(ROLLOUTS)}; got {self.rollouts!r}")
        if not self.constrained and self.rollouts != "sample":
            raise ValueError(
                f'constrained=False draws sessions independently: pass rollouts="sample" (got {self.rollouts!r})'
            )
        for name, default in _UNUSED.items():
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} does not apply to sessions, which are drawn by recommend() at `temperature`; omit it"
                )
        if self.loss_type in OWN_LOSSES and (self.delta is not None or self.ecpo_delta < 0):
            raise ValueError(
                f"loss_type {self.loss_type!r} clips by ecpo_delta, at least 0 (got {self.ecpo_delta}); omit delta, which is of TRL's losses"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        counts = ("rollout_batch_size", "ntp_batch_size")
        if any(getattr(self, name) < 1 for name in counts) or (self.rollout_length or 1) < 1:
            raise ValueError(f"{', '.join(counts)} and rollout_length must be at least 1")
        if min(self.ntp_weight, self.format_weight, self.format_samples) < 0:
            raise ValueError("ntp_weight, format_weight and format_samples must not be negative")
