"""Data collator of the reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from onerec_hf.modeling.processing_onerec_reward import RewardItems


@dataclass
class RewardDataCollator:
    """
    Batches examples with the columns `history`, `session` and, for training, `labels` (a number in [0, 1] or None per objective) and
    optionally `user_id`.

    Args:
        items: the reward model's items.
        max_history: history items to keep, the latest ones (default: all).

    Returns:
        The tensors of `RewardItems.encode`, `labels` (sessions, objectives) float32 with -100 for missing labels, and with `user_id` also
        `users` (sessions,) int64, equal for sessions of one user.

    Example:
        >>> from onerec_hf import RewardItems
        >>> batch = RewardDataCollator(RewardItems([7, 8]))([{"history": [7], "session": [8, 7], "labels": [0.5, None]}])
        >>> batch["session_input_ids"].tolist(), batch["labels"].tolist()
        ([[2, 1]], [[0.5, -100.0]])
    """

    items: RewardItems
    max_history: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        histories, sessions = ([example[name] for example in examples] for name in ("history", "session"))
        batch = self.items.encode(histories, sessions, self.max_history)
        if "labels" in examples[0]:
            labels = [[-100.0 if label is None else label for label in example["labels"]] for example in examples]
            batch["labels"] = torch.tensor(labels, dtype=torch.float32)
            if "user_id" in examples[0]:
                numbers: dict[Any, int] = {}
                owners = [numbers.setdefault(example["user_id"], len(numbers)) for example in examples]
                batch["users"] = torch.tensor(owners)
        return batch
