"""
Item embeddings smoothed over the user-item graph before they are quantised, as MMGRec (arXiv 2404.16555) does by its graph network: the propagation of
LightGCN (He et al., SIGIR 2020, equations 3, 4 and 8), without weights to learn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onerec_hf.semantic_ids.embeddings import unit_rows


def graph_embeddings(embeddings: np.ndarray, sequences: Sequence[np.ndarray], layers: int = 1) -> np.ndarray:
    r"""
    The mean of item embeddings and what reaches them over the user-item graph.

    With R (users, items), 1 where a user has an item, and the degrees D_U and D_I of users and items, a layer goes from items to users and back:

        E^(k) = D_I^(-1/2) R^T D_U^(-1) R D_I^(-1/2) E^(k-1),    E = 1 / (K + 1) sum_{k=0..K} E^(k)

    These are 2 K layers of LightGCN with users that begin at zero; the odd ones reach users only. The embeddings of an item without users are unchanged.

    Args:
        embeddings: (items, d).
        sequences: item indices of each user, in any order; an item counts once. Pass training data only, to avoid leakage.
        layers: K, at least 1.

    Returns:
        (items, d) float32, unit rows; zero rows for items that nothing reaches.

    Raises:
        ValueError: fewer than one layer, or an item index without a row.

    Example:
        >>> vectors = np.eye(3, dtype=np.float32)
        >>> graph_embeddings(vectors, [np.array([0, 1])]).astype(float).round(2).tolist()
        [[0.95, 0.32, 0.0], [0.32, 0.95, 0.0], [0.0, 0.0, 1.0]]
    """
    import scipy.sparse

    if layers < 1:
        raise ValueError(f"layers must be at least 1; got {layers}")
    embeddings = np.asarray(embeddings, dtype=np.float32)
    flat = np.concatenate([np.zeros(0, dtype=np.int64), *sequences])
    if len(flat) and not 0 <= flat.min() <= flat.max() < len(embeddings):
        raise ValueError(
            f"sequences hold item indices {flat.min()} to {flat.max()}, but the embeddings have rows 0 to {len(embeddings) - 1}"
        )
    owner = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    ones = np.ones(len(flat), dtype=np.float32)
    has = scipy.sparse.csr_matrix((ones, (owner, flat)), shape=(len(sequences), len(embeddings)))
    has.sum_duplicates()
    has.data[:] = 1
    per_user, per_item = (np.maximum(np.asarray(has.sum(axis)).ravel(), 1) for axis in (1, 0))
    to_users = scipy.sparse.diags_array(per_user**-0.5) @ has @ scipy.sparse.diags_array(per_item**-0.5)
    total = reached = embeddings
    for _ in range(layers):
        reached = to_users.T @ (to_users @ reached)
        total = total + reached
    return unit_rows(total / (layers + 1))
