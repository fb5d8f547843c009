"""A small SASRec as a baseline of a training: the same sequences, a share of the run's time, early stopping on validation users."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onerec_hf.workflows.dataset import RecommendationDataset, sample
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.features import of_catalogue

if TYPE_CHECKING:
    from onerec_hf.baselines import SequentialRecommender
    from onerec_hf.modeling.catalogue import ItemCatalogue
    from onerec_hf.trainers import OneRecTrainingArguments

#: Time of the SASRec relative to the run before it, and the least of it in seconds.
SHARE, LEAST_SECONDS = 0.25, 5.0
HIDDEN_SIZE = 64
# Epochs at most, those without a better NDCG@10 on validation users before it stops, and these users.
_EPOCHS, _PATIENCE, _VALIDATION_USERS = 200, 5, 1000
# Scores of all items for the targets of a step that are in memory at a time: 256 MiB of float32.
_MOST_SCORES = 2**26


@dataclass(frozen=True, eq=False)
class SmallSASRec:
    """
    A trained SASRec, whose item indices are those of the catalogue.

    Args:
        model: the SASRec.
        note: how it was trained, one sentence.
    """

    model: SequentialRecommender
    note: str


def fit_small_sasrec(
    data: RecommendationDataset,
    catalogue: ItemCatalogue,
    args: OneRecTrainingArguments,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> SmallSASRec:
    """
    Trains a SASRec of width 64 with the cross-entropy over all items, and keeps the weights of the best NDCG@10 on validation users.

    Args:
        args: of the generator's training: seed, device, precision and whether seen items are left out.
        seconds: the training ends after this time or by early stopping.
        clock: of wall time, or of CPU time.

    Raises:
        FloatingPointError, MemoryError: the training failed.

    Example:
        >>> sasrec = fit_small_sasrec(dataset, processor.catalogue, args, seconds=120)  # doctest: +SKIP
        >>> sasrec.model.rank([np.array([3, 4])], k=10).shape  # doctest: +SKIP
        (1, 10)
    """
    from onerec_hf.trainers import fit_sequential
    from onerec_hf.trainers.callbacks import TimeLimitCallback

    limit = TimeLimitCallback(seconds, clock)
    say(f"training a small SASRec as a baseline: at most {limit.seconds:.0f} seconds")
    sequences = data.train_sequences
    batch_size = int(np.clip(len(sequences) // 50, 16, 128))
    targets = batch_size * min(sequences.lengths.mean(), data.max_history)
    model = fit_sequential(
        cast("Any", sequences),
        sample(data.validation, _VALIDATION_USERS),
        item_ids=catalogue.item_ids,
        coded=of_catalogue(data, catalogue),
        architecture="sasrec",
        hidden_size=HIDDEN_SIZE,
        dropout_rate=0.3,
        max_history=data.max_history,
        callbacks=[limit],
        average_weights=args.average_weights,
        num_train_epochs=_EPOCHS,
        early_stopping_patience=_PATIENCE,
        per_device_train_batch_size=batch_size,
        target_share=min(1.0, _MOST_SCORES / (targets * len(catalogue))),
        label_smoothing_factor=0.1,
        eval_top_k=[10],
        eval_exclude_seen=args.eval_exclude_seen,
        seed=args.seed,
        use_cpu=args.use_cpu,
        bf16=args.bf16,
        fp16=args.fp16,
    )
    if limit.ended:
        end = "its share of the run's time was over: a longer training may be better"
    else:
        end = "validation NDCG@10 no longer rose" if limit.epochs < _EPOCHS else "its last epoch"
    note = f"The SASRec has width {HIDDEN_SIZE} and was trained for {limit.epochs:.3g} epochs in {limit.seconds_used:.0f} seconds, until {end}."
    return SmallSASRec(model, note)
