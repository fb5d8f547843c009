"""Unique semantic IDs: where items share all codes, the last code is assigned anew, at the least cost."""

from __future__ import annotations

from typing import NamedTuple

import torch


class UniqueResult(NamedTuple):
    """`codes` (N, L) int64 without repetition and `moved` (N,) bool: the items whose last code changed."""

    codes: torch.Tensor
    moved: torch.Tensor


def make_unique(codes: torch.Tensor, last_residuals: torch.Tensor, last_codebook: torch.Tensor) -> UniqueResult:
    """
    Resolves collisions inside each prefix (all codes but the last) by minimum-cost assignment of last-level codes: the sum of squared
    distances between residuals and centroids is the least that gives no two items one code. Prefixes without a collision stay as
    they are.

    Args:
        codes: (N, L) integers.
        last_residuals: (N, d) what the levels before the last left over.
        last_codebook: (K, d) centroids of the last level.

    Raises:
        ValueError: more items share a prefix than the last level has codes.

    Example:
        >>> codes = torch.tensor([[0, 1], [0, 1], [1, 1]])
        >>> result = make_unique(codes, torch.tensor([[0.9], [0.2], [1.0]]), torch.tensor([[0.0], [1.0]]))
        >>> result.codes.tolist(), result.moved.tolist()
        ([[0, 1], [0, 0], [1, 1]], [False, True, False])
    """
    from scipy.optimize import linear_sum_assignment

    codes = codes.clone()
    prefixes = torch.cat(
        [torch.zeros_like(codes[:, :1]), codes[:, :-1]], dim=1
    )  # the root, so that one level has a prefix too
    buckets, bucket_of = torch.unique(prefixes, dim=0, return_inverse=True)
    sizes = bucket_of.bincount(minlength=len(buckets))
    if (sizes > len(last_codebook)).any():
        fullest = int(sizes.argmax())
        raise ValueError(
            f"{int(sizes[fullest])} items share the prefix {tuple(buckets[fullest, 1:].tolist())}, but the last level has only "
            f"{len(last_codebook)} codes to tell them apart; use a larger last codebook or one level more"
        )
    full = bucket_of * len(last_codebook) + codes[:, -1]
    _, position, count = torch.unique(full, return_inverse=True, return_counts=True)
    colliding = torch.zeros(len(buckets), dtype=torch.bool, device=codes.device)
    colliding[bucket_of[count[position] > 1]] = True
    affected = colliding[bucket_of].nonzero().squeeze(1)
    affected = affected[bucket_of[affected].argsort(stable=True)]
    moved = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
    for rows in affected.split(sizes[colliding].tolist()):
        cost = torch.cdist(last_residuals[rows].double(), last_codebook.double()).square()
        assigned = torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(codes.device)
        moved[rows] = codes[rows, -1] != assigned
        codes[rows, -1] = assigned
    return UniqueResult(codes, moved)
