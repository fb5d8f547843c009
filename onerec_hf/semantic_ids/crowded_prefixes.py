"""Crowded prefixes: where a prefix has more items than free last codes, items move to the nearest prefix with room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod

import torch

from onerec_hf.semantic_ids.unique_codes import CrowdedPrefixError

# Free codes that are looked up at once.
_AT_ONCE = 1 << 25


def spill(
    codes: torch.Tensor,
    sizes: Sequence[int],
    room_of: Callable[[torch.Tensor], torch.Tensor],
    distances: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Moves items out of prefixes (all codes but the last) with fewer free last codes than items. The nearest items of such a prefix stay; each other
    one takes the nearest prefix with a free code, of those that share most codes with its own.

    Args:
        codes: (n, L) integers, of which the prefix is the beginning.
        sizes: codes per level of the catalogue, the last one included.
        room_of: takes (m, levels) prefixes and returns (m,) numbers of free last codes.
        distances: takes rows of `codes` and (m, levels) prefixes and returns (rows, m) distances.

    Returns:
        codes with other prefixes, and (n,) bool: the items that moved.

    Raises:
        CrowdedPrefixError: no prefix near an item has a free code.

    Example:
        >>> centres, points = torch.tensor([0.0, 4.0, 1.0]), torch.tensor([0.1, 0.2, 0.3])
        >>> two_each = lambda prefixes: torch.full((len(prefixes),), 2)
        >>> apart = lambda rows, prefixes: (points[rows, None] - centres[prefixes[:, 0]]).abs()
        >>> codes, moved = spill(torch.tensor([[0, 0], [0, 1], [0, 1]]), [3, 2], two_each, apart)
        >>> codes[:, 0].tolist(), moved.tolist()
        ([0, 0, 2], [False, False, True])
    """
    levels = len(sizes) - 1
    codes, moved = codes.clone(), torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
    if not levels or not len(codes):
        return codes, moved
    prefixes, of = torch.unique(codes[:, :levels], dim=0, return_inverse=True)
    room = room_of(prefixes).to(of.device)
    taken = dict(zip(map(tuple, prefixes.tolist()), of.bincount(minlength=len(prefixes)).tolist(), strict=True))
    crowded = (of.bincount(minlength=len(prefixes)) > room).nonzero().flatten().tolist()
    surplus = []
    for prefix in crowded:
        rows = (of == prefix).nonzero().flatten()
        order = distances(rows, prefixes[prefix : prefix + 1]).flatten().argsort(stable=True)
        surplus += rows[order[int(room[prefix]) :]].tolist()
        taken[tuple(prefixes[prefix].tolist())] = int(room[prefix])
    for row in surplus:
        codes[row, :levels] = _nearest_with_room(row, codes[row, :levels], sizes, taken, room_of, distances)
        moved[row] = True
    return codes, moved


def _nearest_with_room(row, own, sizes, taken, room_of, distances) -> torch.Tensor:
    """The nearest prefix with a free code that shares as many codes with `own` as one does; it is counted as taken."""
    for shared in range(len(sizes) - 2, -1, -1):
        changing = sizes[shared:-1]
        if prod(changing) * sizes[-1] > _AT_ONCE:
            break
        begin = own[:shared].tolist()
        candidates = torch.tensor([[*begin, *rest] for rest in product(*map(range, changing))], device=own.device)
        room = room_of(candidates)
        for place in distances(torch.tensor([row], device=own.device), candidates)[0].argsort(stable=True).tolist():
            key = tuple(candidates[place].tolist())
            if room[place] > taken.get(key, 0):
                taken[key] = taken.get(key, 0) + 1
                return candidates[place]
    raise CrowdedPrefixError(
        f"no free code is left near the prefix {tuple(own.tolist())} for another item; train anew with larger codebooks (--codebook_sizes)"
    )
