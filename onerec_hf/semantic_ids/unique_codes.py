"""Unique semantic IDs: where items share all codes, the last code is assigned anew at the least cost, or a digit is added."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from onerec_hf.semantic_ids.process_group import Ranks

# Over ranks, prefixes are settled in so many portions: only a portion's residuals exist twice.
_PORTIONS = 8


class UniqueResult(NamedTuple):
    """`codes` (N, L) int64 without repetition and `moved` (N,) bool: the items whose last code changed."""

    codes: torch.Tensor
    moved: torch.Tensor


class CrowdedPrefixError(ValueError):
    """More items share a prefix than it has last codes to tell them apart."""


def make_unique(
    codes: torch.Tensor,
    last_residuals: torch.Tensor,
    last_codebook: torch.Tensor,
    allowed: np.ndarray | torch.Tensor | None = None,
) -> UniqueResult:
    """
    Resolves collisions inside each prefix (all codes but the last) by minimum-cost assignment of last-level codes: the sum of squared
    distances between residuals and centroids is the least that gives no two items one code. Prefixes without a collision stay as
    they are.

    Args:
        codes: (N, L) integers.
        last_residuals: (N, e) what the levels before the last left over.
        last_codebook: (K, e) centroids of the last level.
        allowed: (N, K) bool, the last codes that an item may get, the same for items of one prefix (`catalogue.free_last_codes`); all
            when not given.

    Raises:
        CrowdedPrefixError: more items share a prefix than it has (allowed) codes.

    Example:
        >>> codes = torch.tensor([[0, 1], [0, 1], [1, 1]])
        >>> result = make_unique(codes, torch.tensor([[0.9], [0.2], [1.0]]), torch.tensor([[0.0], [1.0]]))
        >>> result.codes.tolist(), result.moved.tolist()
        ([[0, 1], [0, 0], [1, 1]], [False, True, False])
    """
    from scipy.optimize import linear_sum_assignment

    codes = codes.clone()
    root = torch.zeros_like(codes[:, :1])  # above the first level, so that one level has a prefix too
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
            f"{int(room[fullest])} codes to tell them apart; use a larger last codebook, one level more, or the extra digit (on_collision='extra-digit')"
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
    [`make_unique`] for items that lie on several ranks. Each prefix has a rank that settles it: the items' codes and residuals go there and
    their last codes come back, an eighth of the prefixes at a time.

    Args:
        codes, last_residuals: as there, this rank's items; the result is this rank's too.

    Raises:
        CrowdedPrefixError: as there, on every rank.
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


def add_digit_over(ranks: Ranks, codes: torch.Tensor) -> torch.Tensor:
    """[`add_digit`] for items that lie on several ranks: codes and result are this rank's."""
    (theirs,), answer = ranks.exchange(_numbers(codes) % ranks.size, codes)
    return torch.cat([codes, answer(add_digit(theirs)[:, -1:])], dim=1)


def _numbers(codes: torch.Tensor) -> torch.Tensor:
    """(n,) int64, at least 0, equal for equal rows of (n, l) codes; the last code moves it by one."""
    numbers = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
    for column in codes.unbind(1):
        numbers = (numbers * 65_537 + column) & (2**62 - 1)
    return numbers


def add_digit(codes: torch.Tensor) -> torch.Tensor:
    """
    TIGER's policy (arXiv 2305.05065): one level more, whose code counts the items that share all others, in row order. Items alone get 0.

    Args:
        codes: (N, L) integers.

    Returns:
        (N, L + 1) int64 without repetition; the new level needs as many codes as the largest group has items.

    Example:
        >>> add_digit(torch.tensor([[0, 1], [2, 2], [0, 1]])).tolist()
        [[0, 1, 0], [2, 2, 0], [0, 1, 1]]
    """
    group = torch.unique(codes, dim=0, return_inverse=True)[1]
    order = group.argsort(stable=True)
    first = torch.searchsorted(group[order], group)
    digit = torch.empty_like(group)
    digit[order] = torch.arange(len(group), device=group.device) - first[order]
    return torch.cat([codes, digit[:, None]], dim=1)
