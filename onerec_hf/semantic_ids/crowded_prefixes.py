"""Crowded prefixes: items beyond the last level's codes move to the nearest prefix with room."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import prod

import torch

# Prefixes that no item has yet are candidates where there are at most so many in all.
_MOST_PREFIXES = 1 << 18


def spill_crowded(
    codes: torch.Tensor,
    points: torch.Tensor,
    codebook_sizes: list[int],
    decode: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Moves items out of prefixes (all codes but the last) that more items share than the last level has codes. The nearest items of such a prefix
    stay; each other one takes the nearest prefix with room.

    Args:
        codes: (N, L) integers.
        points: (N, d) embeddings.
        codebook_sizes: codes per level.
        decode: (m, L - 1) prefixes to (m, d) reconstructions.

    Returns:
        codes with other prefixes, and (N,) bool: the items that moved. Where the prefixes have no room for all, the codes as they are.

    Example:
        >>> centres = torch.tensor([[0.0], [4.0], [1.0]])
        >>> codes, points = torch.tensor([[0, 0], [0, 1], [0, 1]]), torch.tensor([[0.1], [0.2], [0.3]])
        >>> codes, moved = spill_crowded(codes, points, [3, 2], lambda prefixes: centres[prefixes[:, 0]])
        >>> codes[:, 0].tolist(), moved.tolist()
        ([0, 0, 2], [False, False, True])
    """
    last, moved = codebook_sizes[-1], torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
    if codes.shape[1] == 1 or len(codes) > prod(codebook_sizes):
        return codes, moved
    prefixes, of = torch.unique(codes[:, :-1], dim=0, return_inverse=True)
    sizes = of.bincount(minlength=len(prefixes))
    if (sizes <= last).all():
        return codes, moved
    codes, centres = codes.clone(), decode(prefixes).to(points)
    surplus = []
    for prefix in (sizes > last).nonzero().flatten().tolist():
        rows = (of == prefix).nonzero().flatten()
        distances = (points[rows] - centres[prefix]).square().sum(1)
        surplus.append(rows[distances.argsort(stable=True)[last:]])
    room = (last - sizes).clamp(min=0)
    surplus = torch.cat(surplus)
    if room.sum() < len(surplus):
        if prod(codebook_sizes[:-1]) > _MOST_PREFIXES:
            return codes, moved
        every = torch.tensor(list(product(*map(range, codebook_sizes[:-1]))), device=codes.device)
        found, count = torch.unique(torch.cat([prefixes, every]), dim=0, return_inverse=True)
        new_room = torch.full((len(found),), last, device=codes.device)
        new_room[count[: len(prefixes)]] = room
        prefixes, room, centres = found, new_room, decode(found).to(points)
    open_rows = (room > 0).nonzero().flatten()
    prefixes, room, centres = prefixes[open_rows], room[open_rows], centres[open_rows]
    for row in surplus.tolist():
        distances = (centres - points[row]).square().sum(1).masked_fill(room == 0, float("inf"))
        nearest = int(distances.argmin())
        codes[row, :-1], room[nearest], moved[row] = prefixes[nearest], room[nearest] - 1, True
    return codes, moved
