"""Unique semantic IDs: resolves collisions by minimum-cost reassignment of the last code, or by an extra digit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from onerec_hf.semantic_ids.process_group import Ranks

# Distributed runs process prefixes in this many portions, so only one portion of residuals is duplicated.
_PORTIONS = 8


class UniqueResult(NamedTuple):
    """`codes` (N, L) int64, unique, and `moved` (N,) bool: the items whose last code changed."""

    codes: torch.Tensor
    moved: torch.Tensor


class CrowdedPrefixError(ValueError):
    """More items share a prefix than the last level has codes."""


def make_unique(
    codes: torch.Tensor,
    last_residuals: torch.Tensor,
    last_codebook: torch.Tensor,
    allowed: np.ndarray | torch.Tensor | None = None,
) -> UniqueResult:
    """
    Resolves collisions inside each prefix (all codes but the last) by minimum-cost assignment of last-level codes: it minimises the sum of
    squared distances between residuals and centroids, with distinct codes. Prefixes without a collision are unchanged.

    Args:
        codes: (N, L) integers.
        last_residuals: (N, e) residuals before the last level.
        last_codebook: (K, e) centroids of the last level.
        allowed: (N, K) bool, the last codes available to an item, equal for items of one prefix (`catalogue.free_last_codes`). Default:
            all.

    Raises:
        CrowdedPrefixError: more items share a prefix than it has (allowed) last codes.

    Example:
        >>> codes = torch.tensor([[0, 1], [0, 1], [1, 1]])
        >>> result = make_unique(codes, torch.tensor([[0.9], [0.2], [1.0]]), torch.tensor([[0.0], [1.0]]))
        >>> result.codes.tolist(), result.moved.tolist()
        ([[0, 1], [0, 0], [1, 1]], [False, True, False])
    """
    from scipy.optimize import linear_sum_assignment

    codes = codes.clone()
    root = torch.zeros_like(codes[:, :1])  # a common root, so that single-level codes have a prefix too
    buckets, bucket_of = torch.unique(torch.cat([root, codes[:, :-1]], dim=1), dim=0, return_inverse=True)
    sizes = bucket_of.bincount(minlength=len(buckets))
    room = torch.full_like(sizes, len(last_codebook))
    if allowed is not None:
        allowed = torch.as_tensor(allowed, device=codes.device)
        room[bucket_of] = allowed.sum(1)
    if (sizes > room).any():
        fullest = int((sizes - room).argmax())
        raise CrowdedPrefixError(
            f"{int(sizes[fullest])} items share the prefix {tuple(buckets[fullest, 1:].tolist())}, but the last level has only "
            f"{int(room[fullest])} codes to distinguish them; use a larger last codebook, one more level, or the extra digit (on_collision='extra-digit')"
        )
    full = bucket_of * len(last_codebook) + codes[:, -1]
    _, position, count = torch.unique(full, return_inverse=True, return_counts=True)
    disputed = count[position] > 1
    if allowed is not None:
        disputed |= ~allowed.gather(1, codes[:, -1:]).squeeze(1)
    colliding = torch.zeros(len(buckets), dtype=torch.bool, device=codes.device)
    colliding[bucket_of[disputed]] = True
    affected = colliding[bucket_of].nonzero().squeeze(1)
    affected = affected[bucket_of[affected].argsort(stable=True)]
    moved = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
    for rows in affected.split(sizes[colliding].tolist()):
        cost = torch.cdist(last_residuals[rows].double(), last_codebook.double()).square()
        if allowed is not None:
            cost = cost.masked_fill(~allowed[rows], float("inf"))
        assigned = torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(codes.device)
        moved[rows] = codes[rows, -1] != assigned
        codes[rows, -1] = assigned
    return UniqueResult(codes, moved)


def make_unique_over(
    ranks: Ranks, codes: torch.Tensor, last_residuals: torch.Tensor, last_codebook: torch.Tensor
) -> UniqueResult:
    """
    [`make_unique`] for items distributed over ranks. Each prefix is assigned to a rank, which receives the items' codes and residuals and
    returns their last codes, for an eighth of the prefixes at a time.

    Args:
        codes, last_residuals: as in [`make_unique`], of this rank's items, like the result.

    Raises:
        CrowdedPrefixError: as in [`make_unique`], on every rank.
    """
    codes, moved = codes.clone(), torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
    prefix = _numbers(codes[:, :-1])
    for portion in range(_PORTIONS):
        rows = ((prefix // ranks.size) % _PORTIONS == portion).nonzero().squeeze(1)
        (theirs, residuals), answer = ranks.exchange(prefix[rows] % ranks.size, codes[rows], last_residuals[rows])
        with ranks.together():
            settled = make_unique(theirs, residuals, last_codebook).codes[:, -1] if len(theirs) else theirs[:, -1]
        last = answer(settled)
        moved[rows] = codes[rows, -1] != last
        codes[rows, -1] = last
    return UniqueResult(codes, moved)


def add_digit_over(ranks: Ranks, codes: torch.Tensor, popularity: torch.Tensor | None = None) -> torch.Tensor:
    """[`add_digit`] for items distributed over ranks; codes, popularity and result are this rank's."""
    columns = (codes,) if popularity is None else (codes, popularity)
    theirs, answer = ranks.exchange(_numbers(codes) % ranks.size, *columns)
    return torch.cat([codes, answer(add_digit(*theirs)[:, -1:])], dim=1)


def _numbers(codes: torch.Tensor) -> torch.Tensor:
    """(n,) non-negative int64 hashes, equal for equal rows of (n, l) codes; consecutive last codes have consecutive hashes."""
    numbers = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
    for column in codes.unbind(1):
        numbers = (numbers * 65_537 + column) & (2**62 - 1)
    return numbers


def add_digit(codes: torch.Tensor, popularity: torch.Tensor | None = None) -> torch.Tensor:
    """
    TIGER's policy (arXiv 2305.05065): an additional level numbers the items that share all other codes, in row order. Items without a
    collision get 0. With `popularity` it is MMGRec's (arXiv 2404.16555): the number is the item's popularity rank among them.

    Args:
        codes: (N, L) integers.
        popularity: (N,) interaction counts; the most popular item of equal codes gets 0, and of equal counts the first row.

    Returns:
        (N, L + 1) int64, unique; the new level has as many codes as the largest group has items.

    Example:
        >>> codes = torch.tensor([[0, 1], [2, 2], [0, 1]])
        >>> add_digit(codes).tolist(), add_digit(codes, popularity=torch.tensor([3, 1, 8])).tolist()
        ([[0, 1, 0], [2, 2, 0], [0, 1, 1]], [[0, 1, 1], [2, 2, 0], [0, 1, 0]])
    """
    group = torch.unique(codes, dim=0, return_inverse=True)[1]
    if popularity is None:
        order = group.argsort(stable=True)
    else:
        by_popularity = popularity.argsort(descending=True, stable=True)
        order = by_popularity[group[by_popularity].argsort(stable=True)]
    first = torch.searchsorted(group[order], group)
    digit = torch.empty_like(group)
    digit[order] = torch.arange(len(group), device=group.device) - first[order]
    return torch.cat([codes, digit[:, None]], dim=1)
