"""Evidence about pairs of items for a trained sequence model: the counts and cosines of an item head (`modeling/item_evidence.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from onerec_hf.baselines.next_items import pad_left
from onerec_hf.baselines.read_histories import ReadHistories
from onerec_hf.data.evidence_counts import count_evidence, event_log, fit_evidence_weights
from onerec_hf.data.sequences import UserSequences
from onerec_hf.modeling.item_evidence import DEFAULT_WEIGHTS, ItemEvidence

if TYPE_CHECKING:
    from datasets import Dataset

    from onerec_hf.baselines.item_index import ItemIndex
    from onerec_hf.baselines.modeling_sequential import SequentialRecommender

# Validation users that fit the weights; more change nothing. As for a generator's item head.
_USERS = 5_000
_BATCH = 256


@torch.no_grad()
def add_evidence(
    model: SequentialRecommender,
    train_sequences: Sequence | UserSequences,
    validation: Dataset | None = None,
    content: np.ndarray | None = None,
    *,
    exclude_seen: bool = True,
    neighbours: int | None = None,
) -> None:
    """
    Adds evidence about pairs of items to the scores of a trained model, in place: neighbour lists counted from training sequences, and weights fitted
    on validation users. `rank`, `top_items` and `recommend` use it, and it is saved with the model.

    Args:
        model: with its item ids.
        train_sequences: sequences of item ids in time order, one per user. Those of a table with times ([`~onerec_hf.data.UserSequences`]) tell what
            is asked for lately, which counts where it predicts `validation` better.
        validation: examples with the columns `history` and `session` (item ids); the default weights when not given.
        content: (num_items, d) content vectors of the items, a row of zeros for an item without; no content evidence when not given.
        exclude_seen: the items of a history are no candidates, as in rankings that leave them out.
        neighbours: length of the lists; `config.neighbours` when not given.

    Raises:
        ValueError: a model without item ids, content of another shape or not finite.
        KeyError: ids that are not among the model's items.

    Example:
        >>> from onerec_hf.baselines import SequentialRecommender, add_evidence
        >>> model = SequentialRecommender.from_items([7, 8, 9], hidden_size=8).eval()
        >>> add_evidence(model, [[7, 9], [7, 9]])
        >>> model.recommend([[7]], top_k=1)[0][0][0]
        9
    """
    items, config = model.items, model.config
    if items is None:
        raise ValueError("the model has no item ids: call set_items(item_ids) before add_evidence")
    lengths = [len(sequence) for sequence in train_sequences]
    flat = _flat(train_sequences, items)
    table = None if content is None else _content(np.asarray(content, dtype=np.float32), len(items))
    config.evidence, config.neighbours = True, neighbours or config.neighbours
    config.content_dim = 0 if table is None else table.shape[1]
    model.evidence = ItemEvidence(len(items), config.neighbours).to(model.device)
    model.content = None if table is None else table.to(model.device)
    count_evidence(model.evidence, (flat, np.cumsum([0, *lengths])))
    model.evidence.set_weights(torch.tensor(DEFAULT_WEIGHTS))
    if validation is not None and len(validation):
        log = None
        if isinstance(train_sequences, UserSequences) and train_sequences.timed:
            log = event_log(flat, train_sequences.times)
        features, rows, targets, times = _candidates(model, items, validation, exclude_seen)
        fit_evidence_weights(model.evidence, features, rows, targets, log, times)
    config.recent = model.evidence.recent


def _candidates(
    model: SequentialRecommender, items: ItemIndex, validation: Dataset, exclude_seen: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray | None]:
    """Of a sample of the users: features and rows of candidates, the rows of the items held out, and when the requests were made."""
    assert model.evidence is not None
    if len(validation) > _USERS:
        validation = validation.select(np.sort(np.random.default_rng(0).permutation(len(validation))[:_USERS]))
    read, sessions = ReadHistories.of_examples(validation, items, model.schema), validation["session"]
    training = model.training
    model.eval()
    try:
        vectors, parts = model.item_vectors(), []
        for start in range(0, len(validation), _BATCH):
            batch = read[start : start + _BATCH]
            inputs = {name: ids.to(model.device) for name, ids in batch.inputs(model.config.max_history).items()}
            input_ids = inputs["input_ids"]
            excluded = pad_left(batch.seen).to(model.device) if exclude_seen else None
            scores = (model.encode(input_ids, inputs.get("feature_ids"))[:, -1] @ vectors.T).float()
            positive = inputs.get("positive_ids", input_ids)
            parts.append(model.evidence.features(scores, positive, model.content, excluded))
    finally:
        model.train(training)
    features, rows = (torch.cat(part) for part in zip(*parts, strict=True))
    targets = items.indices([session[0] for session in sessions]) + 1
    return features, rows, torch.from_numpy(targets).to(rows.device), read.times


def _content(content: np.ndarray, num_items: int) -> torch.Tensor:
    """(num_items + 1, d) float16 vectors of length 1, row 0 and items without content zeros."""
    if content.ndim != 2 or len(content) != num_items:
        raise ValueError(f"content: expected shape ({num_items}, d), one row per item; got {content.shape}")
    if (bad := ~np.isfinite(content).all(1)).any():
        raise ValueError(
            f"content: {int(bad.sum())} rows hold NaN or infinity (first: row {int(np.flatnonzero(bad)[0])})"
        )
    return F.pad(F.normalize(torch.from_numpy(content), dim=1), (0, 0, 1, 0)).half()


def _flat(sequences: Sequence | UserSequences, items: ItemIndex) -> np.ndarray:
    """Indices of all sequences' items, one after the other."""
    arrays = [np.asarray(sequence) for sequence in sequences if len(sequence)]
    return items.indices(np.concatenate(arrays)) if arrays else np.zeros(0, dtype=np.int64)
