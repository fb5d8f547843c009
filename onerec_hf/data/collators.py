"""Collators: rows of item ids to padded model inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from onerec_hf.modeling.processing_onerec import OneRecProcessor


@dataclass
class OneRecDataCollator:
    """
    Batches examples with the columns `history` and, for training, `session` (lists of item ids, oldest first).

    Of a history the encoder gets the latest `max_history` items (the processor's own number when not given).

    Args:
        processor: knows the catalogue.
        max_history: items of a history to keep, the latest ones.
        with_seen: also return `exclude`, (users, e) int64 catalogue rows of the *whole* history padded with -1, for
            `recommend(exclude=...)`: evaluation leaves out everything that the user has seen, not only what the encoder reads.
        unknown: "error" or "skip", as for the processor.

    Example:
        >>> from onerec_hf import ItemCatalogue, OneRecProcessor
        >>> catalogue = ItemCatalogue([7, 8, 9], codes=[[0, 1], [1, 0], [1, 1]], codebook_sizes=[2, 2])
        >>> collator = OneRecDataCollator(OneRecProcessor.from_catalogue(catalogue), max_history=1, with_seen=True)
        >>> batch = collator([{"history": [7, 8], "session": [9]}])
        >>> batch["input_ids"].tolist(), batch["exclude"].tolist()
        ([[3, 5, 6]], [[0, 1]])
    """

    processor: OneRecProcessor
    max_history: int | None = None
    with_seen: bool = False
    unknown: str = "error"

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        histories = [example["history"] for example in examples]
        sessions = [example["session"] for example in examples] if "session" in examples[0] else None
        batch = dict(self.processor(histories, sessions, max_history=self.max_history, unknown=self.unknown))
        if self.with_seen:
            batch["exclude"] = self._seen(histories)
        return batch

    def _seen(self, histories) -> torch.Tensor:
        lengths = np.fromiter(map(len, histories), np.int64, len(histories))
        seen = np.full((len(histories), lengths.max()), -1, dtype=np.int64)
        assert self.processor.catalogue is not None  # the processor has read the histories with it
        seen[np.arange(seen.shape[1]) < lengths[:, None]] = self.processor.catalogue.rows(
            [item for history in histories for item in history], unknown="mask"
        )
        return torch.from_numpy(seen)
