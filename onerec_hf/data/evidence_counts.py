"""
Training sequences counted into the neighbour lists of an item head's evidence, and new sequences added to them without training; and the fit of its
weights, which decides whether what is asked for lately counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from onerec_hf.data.item_pairs import Sequences, concatenated, follow_counts, near_counts, top_neighbours

if TYPE_CHECKING:
    import torch

    from onerec_hf.modeling.item_evidence import ItemEvidence

# Parts of the validation users, each ranked by weights that the others fitted.
_FOLDS = 5
# Two standard errors of fewer users' gains say little.
_FEWEST = 30


def count_evidence(evidence: ItemEvidence, sequences: Sequences) -> None:
    """
    Counts sequences into the neighbour lists, in place of what they held. The weights stay.

    Args:
        evidence: of n items.
        sequences: per user item indices in time order, or all concatenated and offsets; index i is the evidence's row i + 1, -1 an item
            without a row.

    Raises:
        ValueError: as [`~onerec_hf.data.item_pairs.near_counts`].

    Example:
        >>> from onerec_hf.modeling.item_evidence import ItemEvidence
        >>> evidence = ItemEvidence(num_items=3, neighbours=2)
        >>> count_evidence(evidence, [np.array([0, 1]), np.array([0, 1, 2])])
        >>> evidence.next_items[1].tolist(), evidence.next_counts[1].tolist(), evidence.interactions.tolist()
        ([2, 0], [2.0, 0.0], [0.0, 2.0, 2.0, 1.0])
    """
    items, num_items = concatenated(sequences)[0], _num_items(evidence)
    counts = _counts(sequences, num_items)
    degree = _interactions(items, num_items)
    _set_interactions(evidence, degree)
    for name, matrix in counts.items():
        found, values = top_neighbours(matrix, _length(evidence), scale_cols=_scale(name, degree))
        evidence.set_list(name, *_tensors(found + 1, values))


def fit_evidence_weights(
    evidence: ItemEvidence,
    features: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    recent: np.ndarray | None = None,
) -> None:
    """
    Sets the weights that rank the targets of validation users best. The evidence `recent` enters where it improves the likelihood of targets that its
    weight was not fitted on, in five folds of at least 30 users, by more than two standard errors.

    Args:
        features, rows: of [`~onerec_hf.modeling.item_evidence.ItemEvidence.features`], without `recent`.
        targets: (users,) rows of the held-out items.
        recent: (num_items,) of [`recent_counts`]; None without times.

    Example:
        >>> import torch
        >>> from onerec_hf.modeling.item_evidence import ItemEvidence
        >>> evidence, draw = ItemEvidence(num_items=10), torch.Generator().manual_seed(0)
        >>> features, rows = torch.randn(400, 10, 7, generator=draw), torch.arange(1, 11).expand(400, 10)
        >>> targets = torch.randint(9, 11, (400,), generator=draw)  # the two items of lately
        >>> fit_evidence_weights(evidence, features, rows, targets, recent=np.repeat([0.0, 9.0], [8, 2]))
        >>> evidence.names[-1], bool(evidence.weights[-1] > 1)
        ('recent', True)
    """
    import torch

    from onerec_hf.modeling.item_evidence import fit_weights

    evidence.set_recent(None)
    if recent is not None and len(features):
        (counts,) = (part.to(features.device) for part in _tensors(recent))
        column = torch.log1p(torch.cat([counts.new_zeros(1), counts]))[rows].to(features)
        more = torch.cat([features, column.unsqueeze(-1)], dim=-1)
        gains = _unseen_losses(features, rows, targets) - _unseen_losses(more, rows, targets)
        if len(gains) >= _FEWEST and gains.mean() > 2 * gains.std() / len(gains) ** 0.5:
            evidence.set_recent(counts)
            features = more
    evidence.set_weights(fit_weights(features, rows, targets))


def _unseen_losses(features: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(found,) losses in nats of the users whose target is a candidate, each by weights that other users fitted."""
    import torch
    import torch.nn.functional as F

    from onerec_hf.modeling.item_evidence import among_candidates, fit_weights

    fold, losses = torch.arange(len(features), device=features.device) % _FOLDS, []
    for each in range(_FOLDS):
        weights = fit_weights(*(part[fold != each] for part in (features, rows, targets)))
        x, of_fold, wanted = (part[fold == each] for part in (features, rows, targets))
        there, places = among_candidates(of_fold, wanted)
        logits = (x[there] @ weights).masked_fill(of_fold[there] == 0, float("-inf"))
        losses.append(F.cross_entropy(logits, places, reduction="none"))
    return torch.cat(losses)


def recent_counts(items: np.ndarray, timestamps: np.ndarray, num_items: int) -> np.ndarray:
    """
    Interactions of items that fade with age: each counts e^(-a / (N / 10)), where a of the N interactions are later. So the last tenth of a log counts
    most, however long it is; interactions of one time have one age.

    Args:
        items: (N,) item indices, -1 for an item without a row.
        timestamps: (N,), in any unit.

    Returns:
        (num_items,) float64.

    Example:
        >>> recent_counts(np.array([0, 1, 1]), np.array([10, 20, 30]), num_items=3).round(4).tolist()
        [0.0013, 1.0357, 0.0]
    """
    later = len(items) - np.searchsorted(np.sort(timestamps), timestamps, side="right")
    known = items >= 0
    return np.bincount(items[known], np.exp(-later[known] / _horizon(len(items))), minlength=num_items)


def _horizon(interactions: float) -> float:
    return max(interactions, 1.0) / 10


def add_to_evidence(evidence: ItemEvidence, sequences: Sequences, new: np.ndarray | None = None) -> dict[str, int]:
    """
    Adds the counts of new items of sequences to the neighbour lists. Lists that would grow beyond their length lose their smallest counts; a
    neighbour that was cut before begins at its new counts. In the evidence `recent` the new interactions are the latest, and all count alike.

    Args:
        evidence: of n items.
        sequences: as for [`count_evidence`]; items that were counted before stand in them so that pairs of an old and a new item count.
        new: bool for each item of the concatenated sequences; all are new when not given.

    Returns:
        `interactions` and `pairs` (directly following ones) that were added, and `cut`, the neighbours that fell out of the three lists.

    Raises:
        ValueError: as [`~onerec_hf.data.item_pairs.near_counts`].

    Example:
        >>> from onerec_hf.modeling.item_evidence import ItemEvidence
        >>> evidence = ItemEvidence(num_items=3, neighbours=2)
        >>> count_evidence(evidence, [np.array([0, 1])])
        >>> add_to_evidence(evidence, [np.array([0, 1, 0])], new=np.array([False, False, True]))
        {'interactions': 1, 'pairs': 1, 'cut': 0}
        >>> evidence.next_items[:, 0].tolist(), evidence.before_items[:, 0].tolist()
        ([0, 2, 1, 0], [0, 2, 1, 0])
    """
    items, num_items = concatenated(sequences)[0], _num_items(evidence)
    counts = _counts(sequences, num_items, new)
    added = _interactions(items if new is None else items[new], num_items)
    degree = added + evidence.interactions[1:].double().cpu().numpy()
    if evidence.recent_counts is not None:
        horizon = _horizon(degree.sum())
        span = added.sum() / horizon
        before = evidence.recent_counts.double().cpu().numpy()
        mean = -np.expm1(-span) / span if span else 1.0  # of the new interactions' e^(-a / horizon)
        (values,) = _tensors(before * np.exp(-span) + np.concatenate([[0.0], added * mean]))
        evidence.recent_counts.copy_(values)
    _set_interactions(evidence, degree)
    cut = 0
    for name, matrix in counts.items():
        touched = np.flatnonzero(np.diff(matrix.indptr))
        if not len(touched):
            continue
        total = _list_matrix(evidence, name, touched) + matrix[touched]
        found, values = top_neighbours(total, _length(evidence), scale_cols=_scale(name, degree))
        cut += int(total.nnz - (found >= 0).sum())
        rows, lists = _tensors(touched + 1, found + 1, values), evidence.list_of(name)
        for part, changed in zip(lists, rows[1:], strict=True):
            part[rows[0].to(part.device)] = changed.to(part)
    return {"interactions": int(added.sum()), "pairs": int(counts["next"].sum()), "cut": cut}


def _num_items(evidence: ItemEvidence) -> int:
    return len(evidence.interactions) - 1


def _length(evidence: ItemEvidence) -> int:
    return evidence.list_of("near")[0].shape[1]


def _counts(sequences: Sequences, num_items: int, new: np.ndarray | None = None) -> dict[str, sp.csr_matrix]:
    """Per list the counts of pairs."""
    follow = follow_counts(sequences, num_items, new=new)
    return {"near": near_counts(sequences, num_items, new=new), "next": follow, "before": follow.T.tocsr()}


def _interactions(items: np.ndarray, num_items: int) -> np.ndarray:
    return np.bincount(items[items >= 0], minlength=num_items)


def _scale(name: str, degree: np.ndarray) -> np.ndarray | None:
    """`near` keeps the largest normalised counts, as they are scored; the other lists the largest counts."""
    return (degree + 1.0) ** -0.5 if name == "near" else None


def _set_interactions(evidence: ItemEvidence, degree: np.ndarray) -> None:
    (values,) = _tensors(np.concatenate([[0.0], degree]))
    evidence.interactions.copy_(values)


def _list_matrix(evidence: ItemEvidence, name: str, touched: np.ndarray) -> sp.csr_matrix:
    """(touched, n) the counts that the lists of some items hold."""
    items, counts = (part[1:][touched].cpu().numpy() for part in evidence.list_of(name))
    held = items > 0
    offsets = np.concatenate([[0], np.cumsum(held.sum(1))])
    matrix = sp.csr_matrix(
        (counts[held].astype(np.float32), items[held] - 1, offsets), shape=(len(touched), _num_items(evidence))
    )
    matrix.sort_indices()
    return matrix


def _tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    import torch

    return [torch.from_numpy(array) for array in arrays]
