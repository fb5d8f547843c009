"""Evaluation over all held-out examples: each counts once, whatever the batch size, the number of ranks and the settings of training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import has_length


class WholeEvaluation(Trainer):
    """
    Mixin of the trainers. Evaluation reads the last batch also with `dataloader_drop_last`, and its means are over examples, pairs or tokens:
    `Trainer` and TRL average over batches, of which the last one is shorter and, with several ranks, filled up with examples from the beginning.

    Example:
        >>> class MyTrainer(WholeEvaluation, Trainer): ...
    """

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        with _drop_last(self.args, self.args.dataloader_drop_last and is_training):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        check_countable(dataloader, self.args.world_size)
        # Seq2SeqTrainer would keep the examples that pad the ranks' last batches, and count them twice.
        self.gather_function = self.accelerator.gather_for_metrics
        self._counted: dict[str, np.ndarray] = {}
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        for name, value in self._evaluation_means(self._reduced()).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _evaluation_means(self, means: dict[str, float]) -> dict[str, float]:
        """The metrics that an evaluation reports of the means over its examples."""
        return means

    def real_rows(self, rows: int) -> int:
        """How many of this rank's `rows` examples of the current batch are not repeated to fill up the last batch; they are the first ones."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(state.remainder - self.args.process_index * rows, 0), rows)

    def count(self, name: str, mean: torch.Tensor | float, weight: torch.Tensor | float) -> None:
        """Adds a mean over this rank's share of a batch to an evaluation, with what it is a mean over: examples, pairs, tokens."""
        totals = self._counted.setdefault(name, np.zeros(2))
        if weight := float(weight):
            totals += [float(mean) * weight, weight]

    def _reduced(self) -> dict[str, float]:
        """The means over all ranks; NaN where nothing was counted."""
        sums: dict[str, np.ndarray] = {}
        for counted in gather_object([self._counted]):
            for name, totals in counted.items():
                sums[name] = sums.get(name, np.zeros(2)) + totals
        return {name: float(total / weight) if weight else math.nan for name, (total, weight) in sums.items()}


def first_rows(batch: Mapping[str, Any], rows: int, examples: int) -> dict[str, Any]:
    """
    The part of a batch that belongs to its first `rows` examples.

    Args:
        batch: tensors with one row per example, or several blocks of them one after the other (chosen, rejected).
        examples: of the whole batch.

    Example:
        >>> first_rows({"input_ids": torch.tensor([[1], [2], [3], [4]])}, rows=1, examples=2)["input_ids"].tolist()
        [[1], [3]]
    """
    if rows == examples:
        return dict(batch)
    return {name: value.view(-1, examples, *value.shape[1:])[:, :rows].flatten(0, 1) for name, value in batch.items()}


def check_countable(dataloader: DataLoader, ranks: int) -> None:
    """
    Checks that the length of a distributed evaluation is known. The last batches are padded with users from the beginning, who can be
    removed only if their number is known.

    Raises:
        ValueError: a stream with more than one rank.
    """
    if ranks > 1 and not has_length(dataloader.dataset):
        raise ValueError(
            f"{ranks} ranks evaluate on a stream of unknown length, so some users would count twice. Pass a datasets.Dataset "
            "(Dataset.from_generator or from_parquet keep it on disk), or evaluate on one process"
        )


@contextmanager
def _drop_last(args, value: bool):
    before, args.dataloader_drop_last = args.dataloader_drop_last, value
    try:
        yield
    finally:
        args.dataloader_drop_last = before
