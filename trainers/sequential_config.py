"""Arguments of [`SequentialTrainer`]."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class SequentialTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` and how next items are ranked. The defaults select the checkpoint with the best NDCG@10 on held-out users: an evaluation and
    a checkpoint after each epoch, and training stops after 20 epochs without a gain. Without `eval_dataset`, `eval_strategy` or
    `save_strategy`, the last weights are kept.

    Args:
        eval_top_k: the k of Recall@k, NDCG@k, MRR@k and coverage@k.
        eval_exclude_seen: leave out the items of a user's history from the ranking.
        early_stopping_patience: evaluations without an improvement of `metric_for_best_model` before training stops; None trains to the end.
        target_share: share of a batch's targets that a step trains on, drawn anew in each. The scores of all items for all targets are most of the
            work: 0.25 takes a third of the time with large catalogues.
        average_weights: evaluations, checkpoints and the trained model have the average of the weights, in which later steps count more, see
            [`~onerec_hf.trainers.WeightAverage`].
        stop_at_nonfinite: stop on a loss or gradient that is not finite; see [`~onerec_hf.trainers.StepFaults`].
        label_smoothing_factor: share of a target's probability that is spread over all items; for `loss="ce"`.

    Example:
        >>> args = SequentialTrainingArguments("out", lr_scheduler_type="cosine", warmup_steps=0.02, report_to="none")
        >>> args.metric_for_best_model, args.per_device_train_batch_size
        ('ndcg@10', 128)
    """

    eval_top_k: list[int] = field(
        default_factory=lambda: [5, 10], metadata={"help": "The k of Recall@k, NDCG@k, MRR@k and coverage@k."}
    )
    eval_exclude_seen: bool = field(
        default=True, metadata={"help": "Leave out the items of a user's history from the ranking."}
    )
    early_stopping_patience: int | None = field(
        default=20,
        metadata={"help": "Evaluations without an improvement before training stops; None trains to the end."},
    )
    target_share: float = field(
        default=1.0, metadata={"help": "Share of a batch's targets that a step trains on, drawn anew in each."}
    )
    average_weights: bool = field(
        default=False,
        metadata={"help": "Evaluate, save and keep the average of the weights, in which later steps count more."},
    )
    stop_at_nonfinite: bool = field(
        default=True,
        metadata={"help": "Stop on a loss or gradient that is not finite, and save the batch's examples."},
    )
    num_train_epochs: float = field(default=300, metadata={"help": "Epochs at most."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Largest norm of a gradient; 0 does not clip."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Sequences of a training batch."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Users of an evaluation batch."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint."})
    save_total_limit: int | None = field(
        default=1, metadata={"help": "Checkpoints to keep in addition to the best one; None keeps all."}
    )
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best checkpoint's weights."})
    metric_for_best_model: str | None = field(default="ndcg@10", metadata={"help": "What selects the checkpoint."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether the metric grows."})

    def __post_init__(self):
        if "no" in (self.save_strategy, self.eval_strategy):  # nothing to select a checkpoint by, or from
            self.load_best_model_at_end = False
        super().__post_init__()
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # without one, torch warns once per loader
        if not self.eval_top_k or min(self.eval_top_k) < 1:
            raise ValueError(f"eval_top_k must hold positive numbers; got {self.eval_top_k}")
        if not 0 < self.target_share <= 1:
            raise ValueError(f"target_share must be above 0 and at most 1; got {self.target_share}")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(f"early_stopping_patience must be at least 1; got {self.early_stopping_patience}")
