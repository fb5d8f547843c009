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

    #: Rows of items and times of a log ([`event_log`]).
    Log = tuple[torch.Tensor, torch.Tensor]

# Parts of the validation users, each ranked by weights that the others fitted.
_FOLDS = 5
# Two standard errors of fewer users' gains say little.
_FEWEST = 30
# Interactions of a log that is saved with a model: 24 MB, and 8 ms to count them for a user.
_LONGEST_LOG = 2_000_000
# Counts of users times items that exist at once.
_COUNTS_AT_ONCE = 1 << 24


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
    log: Log | None = None,
    times: np.ndarray | None = None,
) -> None:
    """
    Sets the weights that rank the targets of validation users best. The evidence `recent` and `trending` enters where it improves the likelihood of
    targets that its weights were not fitted on, in five folds of at least 30 users, by more than two standard errors.

    Args:
        features, rows: of [`~onerec_hf.modeling.item_evidence.ItemEvidence.features`], without `recent` and `trending`.
        targets: (users,) rows of the held-out items.
        log: of [`event_log`]; None without times.
        times: (users,) int64, when the users' requests were made; without them as without a log.

    Example:
        >>> import torch
        >>> from onerec_hf.modeling.item_evidence import ItemEvidence
        >>> evidence, draw = ItemEvidence(num_items=10), torch.Generator().manual_seed(0)
        >>> features, rows = torch.randn(400, 10, 7, generator=draw), torch.arange(1, 11).expand(400, 10)
        >>> log = event_log(np.arange(1000) // 100, np.arange(1000))  # each item has its time
        >>> times = np.random.default_rng(0).integers(100, 1000, 400)
        >>> targets = torch.from_numpy(times // 100 + 1)
        >>> fit_evidence_weights(evidence, features, rows, targets, log, times)
        >>> evidence.names[-2:], bool(evidence.weights[-2:].sum() > 1)
        (('recent', 'trending'), True)
    """
    import torch

    from onerec_hf.modeling.item_evidence import fit_weights

    evidence.set_log()
    if log is not None and times is not None and len(features):
        evidence.set_log(*log)
        (when,) = _tensors(times)
        at_once = max(1, _COUNTS_AT_ONCE // _num_items(evidence))
        parts = zip(rows.split(at_once), when.to(rows.device).split(at_once), strict=True)
        found = [evidence.recent_features(some, then) for some, then in parts]
        more = torch.cat([features, torch.cat(found).to(features)], dim=-1)
        gains = _unseen_losses(features, rows, targets) - _unseen_losses(more, rows, targets)
        if len(gains) >= _FEWEST and gains.mean() > 2 * gains.std() / len(gains) ** 0.5:
            features = more
        else:
            evidence.set_log()
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


def event_log(items: np.ndarray, timestamps: np.ndarray) -> Log:
    """
    The log that the evidence `recent` and `trending` counts: the latest two million interactions of known items, in the order of time.

    Args:
        items: (N,) item indices, -1 for an item without a row.
        timestamps: (N,), in any unit.

    Returns:
        (n,) rows int32 and (n,) whole times int64.

    Example:
        >>> rows, times = event_log(np.array([0, -1, 1]), np.array([30, 20, 10.5]))
        >>> rows.tolist(), times.tolist()
        ([2, 1], [10, 30])
    """
    known = items >= 0
    order = np.argsort(timestamps[known], kind="stable")[-_LONGEST_LOG:]
    rows, times = _tensors((items[known][order] + 1).astype(np.int32), timestamps[known][order].astype(np.int64))
    return rows, times


def add_to_evidence(
    evidence: ItemEvidence, sequences: Sequences, new: np.ndarray | None = None, times: np.ndarray | None = None
) -> dict[str, int]:
    """
    Adds the counts of new items of sequences to the neighbour lists. Lists that would grow beyond their length lose their smallest counts; a
    neighbour that was cut before begins at its new counts. New interactions join the log of `recent` and `trending`.

    Args:
        evidence: of n items.
        sequences: as for [`count_evidence`]; items that were counted before stand in them so that pairs of an old and a new item count.
        new: bool for each item of the concatenated sequences; all are new when not given.
        times: of each item of the concatenated sequences; the new ones are as late as the latest of the log when not given.

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
    if evidence.log_items is not None and evidence.log_times is not None:
        rows, held = evidence.log_items.cpu().numpy() - 1, evidence.log_times.cpu().numpy()
        which = slice(None) if new is None else new
        later = np.full(len(items), held[-1]) if times is None else times
        evidence.set_log(*event_log(np.append(rows, items[which]), np.append(held, later[which])))
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
