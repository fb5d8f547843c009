"""Arguments of [`OneRecTrainer`]."""

from dataclasses import dataclass, field
from math import inf

import torch
from transformers import Seq2SeqTrainingArguments


@dataclass
class OneRecTrainingArguments(Seq2SeqTrainingArguments):
    """
    `Seq2SeqTrainingArguments` for the generator. With `predict_with_generate` (the default), evaluation ranks the full catalogue by
    constrained beam search; without it, evaluation computes the loss only.

    Args:
        eval_top_k: the k of Recall@k, NDCG@k, ...
        eval_num_beams: beam width of the ranking; at least the largest k.
        eval_exclude_seen: exclude the items of a user's history from the ranking.
        eval_head_alone: evaluations during training rank by the item head alone, which costs no beam search; others rank as the model does.
        packing: train on rows of `packing_length` history items, filled with several examples, instead of padded batches;
            `per_device_train_batch_size` then counts rows. Evaluation is not packed.
        packing_length: history items per packed row; at least `max_history`.
        pad_to_multiple_of: without packing, pad histories to a multiple of this number of items, so that `torch_compile` sees few shapes.
        session_loss_weights: loss weights of a session's items, first to last, relative to their mean; the last one holds for later items. Equal
            when not given, as in the paper's equation 4. The item head's loss and the loss of evaluations are not weighted.
        session_share: share of the sessions that the decoder trains on, drawn anew in each step, with prefixes or packing; the item head's loss
            reads them all. Long sessions cost less.
        average_weights: evaluations, checkpoints and the trained model have the average of the weights, in which later steps count more, see
            [`~onerec_hf.trainers.WeightAverage`].
        router_bias_update_rate: step of the loss-free balancing bias of the experts (technical report, arXiv 2506.13695); 0 switches it off.
        stop_at_nonfinite: stop at a non-finite loss or gradient; see [`~onerec_hf.trainers.StepFaults`].

    Example:
        >>> args = OneRecTrainingArguments("out", eval_top_k=[10], eval_num_beams=20, report_to="none")
        >>> args.predict_with_generate
        True
    """

    predict_with_generate: bool = field(
        default=True, metadata={"help": "Rank the catalogue by beam search in evaluation, in addition to the loss."}
    )
    eval_top_k: list[int] = field(
        default_factory=lambda: [5, 10], metadata={"help": "The k of Recall@k, NDCG@k, MRR@k and coverage@k."}
    )
    eval_num_beams: int = field(default=50, metadata={"help": "Beam width of the ranking; at least the largest k."})
    eval_exclude_seen: bool = field(
        default=True, metadata={"help": "Exclude the items of a user's history from the ranking."}
    )
    eval_head_alone: bool = field(
        default=False,
        metadata={
            "help": "Evaluations during training rank by the item head alone, without the decoder's beam search."
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Pack several examples into rows of packing_length history items instead of padding them."},
    )
    packing_length: int = field(
        default=64,
        metadata={"help": "History items per packed row; at least the longest history that the encoder reads."},
    )
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata={"help": "Pad histories to a multiple of this number of items (few shapes for torch_compile)."},
    )
    session_loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Loss weights of a session's items, first to last; equal by default."}
    )
    session_share: float = field(
        default=1.0,
        metadata={
            "help": "Share of the sessions that the decoder trains on in each step, with prefixes or packing; the item head reads all."
        },
    )
    average_weights: bool = field(
        default=False,
        metadata={"help": "Evaluate, save and keep the average of the weights, in which later steps count more."},
    )
    router_bias_update_rate: float = field(
        default=0.001, metadata={"help": "Step of the experts' loss-free balancing bias; 0 switches it off."}
    )
    stop_at_nonfinite: bool = field(
        default=True,
        metadata={"help": "Stop at a non-finite loss or gradient, and save the batch's examples."},
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "Initial learning rate (paper, section 4.1: 2e-4)."})

    def __post_init__(self):
        super().__post_init__()
        self.dataloader_pin_memory &= (
            torch.accelerator.is_available()
        )  # without an accelerator, torch warns once per loader
        if not self.eval_top_k or min(self.eval_top_k) < 1:
            raise ValueError(f"eval_top_k must contain positive numbers; got {self.eval_top_k}")
        if self.eval_num_beams < max(self.eval_top_k):
            raise ValueError(
                f"eval_num_beams={self.eval_num_beams} cannot rank the top {max(self.eval_top_k)}; raise it to "
                f"{max(self.eval_top_k)} or more"
            )
        weights = self.session_loss_weights
        if weights is not None and not (weights and min(weights) >= 0 and 0 < sum(weights) < inf):
            raise ValueError(
                f"session_loss_weights={weights!s:.200} must be a number for each item of a session: none negative, not all of them 0"
            )
        if not 0 < self.session_share <= 1:
            raise ValueError(f"session_share={self.session_share} must be above 0 and at most 1")
        if self.router_bias_update_rate < 0:
            raise ValueError(f"router_bias_update_rate={self.router_bias_update_rate} must not be negative")
        for name in ("packing_length", "pad_to_multiple_of"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if self.packing and self.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise ValueError(
                f"packing makes rows of equal length, so train_sampling_strategy={self.train_sampling_strategy!r} does not apply; "
                "use 'random'"
            )
