"""Arguments of [`RewardTrainer`]."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class RewardTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` and how predicted rates are judged. The paper gives no settings for its reward model; the defaults here are for small data.

    Args:
        calibration_bins: groups of equal size in the expected calibration error.
        stop_at_nonfinite: stop on a loss or gradient that is not finite; see [`~onerec_hf.trainers.StepFaults`].

    Example:
        >>> RewardTrainingArguments("out").learning_rate
        0.001
    """

    calibration_bins: int = field(default=10, metadata={"help": "Groups of the expected calibration error."})
    stop_at_nonfinite: bool = field(
        default=True,
        metadata={"help": "Stop on a loss or gradient that is not finite, and save the batch's examples."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of AdamW."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Sessions of a training batch."})
    per_device_eval_batch_size: int = field(default=512, metadata={"help": "Sessions of an evaluation batch."})

    def __post_init__(self):
        super().__post_init__()
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # without one, torch warns once per loader
        if self.calibration_bins < 1:
            raise ValueError(f"calibration_bins must be at least 1; got {self.calibration_bins}")
