"""Arguments of [`OneRecDPOTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field

from onerec_hf.trainers.guards import GuardOptions
from onerec_hf.trainers.pair_selection import SELECTIONS
from onerec_hf.trainers.seq2seq_dpo_config import Seq2SeqDPOConfig


@dataclass
class OneRecDPOConfig(GuardOptions, Seq2SeqDPOConfig):
    """
    [`Seq2SeqDPOConfig`], [`~onerec_hf.trainers.guards.GuardOptions`] and the settings for drawing pairs (OneRec paper, sections 3.3.2 and 3.3.3).

    Args:
        epochs_per_iteration: epochs per iteration. At its start the policy becomes the reference and new pairs are drawn;
            `num_train_epochs / epochs_per_iteration` is the number of iterations.
        dpo_ratio: share of the training examples that get a pair in an iteration (the paper's r_DPO; 1 % suffices there).
        dpo_weight: lambda in L = L_NTP + lambda * L_DPO.
        ntp_weight: weight of L_NTP; 0 gives plain DPO.
        num_candidates: sessions generated per user (the paper's N).
        candidates: "beam" for beam search, "sample" for sampling without replacement.
        temperature: temperature of "sample".
        candidate_length: items per candidate (default: the model's session length).
        exclude_seen: exclude items of the history from candidates.
        selection: "best_worst" or "random"; the trainer also accepts a function.
        min_margin: minimum reward difference of a pair (exclusive).
        reward_weights: weights of the reward functions (default: 1 each).
        draw_batch_size: users per generation batch.

    Example:
        >>> args = OneRecDPOConfig("out", dpo_ratio=0.05, report_to="none", bf16=False, use_cpu=True)
        >>> args.dpo_weight, args.num_candidates, args.selection
        (1.0, 128, 'best_worst')
    """

    epochs_per_iteration: int = field(default=1, metadata={"help": "Epochs per iteration of drawing pairs."})
    dpo_ratio: float = field(default=0.01, metadata={"help": "Share of the training examples that get a pair."})
    dpo_weight: float = field(default=1.0, metadata={"help": "lambda in L = L_NTP + lambda * L_DPO."})
    ntp_weight: float = field(default=1.0, metadata={"help": "Weight of the next-token loss."})
    num_candidates: int = field(default=128, metadata={"help": "Candidate sessions per user."})
    candidates: str = field(default="beam", metadata={"help": "beam or sample.", "choices": ["beam", "sample"]})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampled candidates."})
    candidate_length: int | None = field(
        default=None, metadata={"help": "Items per candidate (default: the model's session length)."}
    )
    exclude_seen: bool = field(default=True, metadata={"help": "Exclude items of the history from candidates."})
    selection: str = field(default="best_worst", metadata={"help": f"One of {', '.join(SELECTIONS)}."})
    min_margin: float = field(default=0.0, metadata={"help": "Minimum reward difference of a pair (exclusive)."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One weight per reward function."})
    draw_batch_size: int = field(default=32, metadata={"help": "Users per generation batch."})

    def __post_init__(self):
        super().__post_init__()
        self.check_guards()
        # Examples without a pair carry the next-token loss.
        self.remove_unused_columns = False
        if self.candidates not in ("beam", "sample"):
            raise ValueError(f'candidates must be "beam" or "sample"; got {self.candidates!r}')
        if self.selection not in SELECTIONS:
            raise ValueError(
                f"selection must be one of {sorted(SELECTIONS)}, or pass a function to the trainer; got {self.selection!r}"
            )
        if not 0 < self.dpo_ratio <= 1:
            raise ValueError(
                f"dpo_ratio={self.dpo_ratio} must be in (0, 1]: it is the share of examples that get a pair"
            )
        if min(self.epochs_per_iteration, self.draw_batch_size) < 1 or self.num_candidates < 2:
            raise ValueError(
                "epochs_per_iteration and draw_batch_size must be at least 1 and num_candidates at least 2; got "
                f"{self.epochs_per_iteration}, {self.draw_batch_size} and {self.num_candidates}"
            )
        for name in ("precompute_ref_log_probs", "sync_ref_model"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is not supported: the reference is the policy of the previous iteration. Omit it"
                )
        if self.dataloader_num_workers:
            raise ValueError(
                "dataloader_num_workers must be 0, since workers would keep the pairs of the first iteration"
            )
