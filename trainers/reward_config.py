"""Arguments of [`RewardTrainer`]."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class RewardTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` for the reward model. The paper gives no settings for it; the defaults suit small datasets.

    Args:
        pair_weight: weight of the pairwise loss between sessions of one user ([`~onerec_hf.modeling.modeling_onerec_reward.within_user_loss`]);
            0 for none. Examples need the column `user_id`, and the sessions of a user are read in one batch.
        calibration_bins: groups of equal size in the expected calibration error.
        stop_at_nonfinite: stop at a non-finite loss or gradient; see [`~onerec_hf.trainers.StepFaults`].

    Example:
        >>> RewardTrainingArguments("out").learning_rate
        0.001
    """

    pair_weight: float = field(
        default=0.0, metadata={"help": "Weight of the pairwise loss between sessions of one user; 0 for none."}
    )
    calibration_bins: int = field(default=10, metadata={"help": "Groups of the expected calibration error."})
    stop_at_nonfinite: bool = field(
        default=True,
        metadata={"help": "Stop at a non-finite loss or gradient, and save the batch's examples."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of AdamW."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Sessions per training batch."})
    per_device_eval_batch_size: int = field(default=512, metadata={"help": "Sessions per evaluation batch."})

    def __post_init__(self):
        super().__post_init__()
        self.dataloader_pin_memory &= (
            torch.accelerator.is_available()
        )  # without an accelerator, torch warns once per loader
        if not 0 <= self.pair_weight < float("inf"):
            raise ValueError(f"pair_weight must be a finite number of at least 0; got {self.pair_weight}")
        if self.calibration_bins < 1:
            raise ValueError(f"calibration_bins must be at least 1; got {self.calibration_bins}")
