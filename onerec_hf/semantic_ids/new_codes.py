"""Room for new items in a catalogue: where a prefix has no free code left, its items move to the nearest prefix that has one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from onerec_hf.modeling.catalogue import ItemCatalogue
from onerec_hf.semantic_ids.unique_codes import CrowdedPrefixError

# Free codes that are looked up at once.
_AT_ONCE = 1 << 25


def spill(
    codes: torch.Tensor,
    catalogue: ItemCatalogue,
    distances: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Moves new items out of prefixes (all codes of the catalogue but the last) with fewer free last codes than new items. The nearest items of such a
    prefix stay; each other one takes the nearest prefix with a free code, of those that share most codes with its own.

    Args:
        codes: (n, L) integers, of which the prefix is the beginning.
        catalogue: which codes are taken.
        distances: takes rows of `codes` and (m, levels) prefixes and returns (rows, m) distances.

    Returns:
        codes with other prefixes, and (n,) bool: the items that moved.

    Raises:
        CrowdedPrefixError: no prefix near an item has a free code.

    Example:
        >>> catalogue = ItemCatalogue(["a", "b"], codes=[[0, 0], [0, 1]], codebook_sizes=[3, 2])
        >>> centres = torch.tensor([0.0, 4.0, 1.0])
        >>> codes, moved = spill(torch.tensor([[0, 1]]), catalogue, lambda rows, prefixes: (0.2 - centres[prefixes]).abs().T)
        >>> codes.tolist(), moved.tolist()
        ([[2, 1]], [True])
    """
    levels, width = len(catalogue.codebook_sizes) - 1, catalogue.codebook_sizes[-1]
    codes, moved = codes.clone(), torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
    if not levels or not len(codes):
        return codes, moved
    prefixes, of = torch.unique(codes[:, :levels], dim=0, return_inverse=True)
    room = torch.from_numpy(catalogue.free_last_codes(prefixes.cpu().numpy()).sum(1)).to(of.device)
    taken = dict(zip(map(tuple, prefixes.tolist()), of.bincount(minlength=len(prefixes)).tolist(), strict=True))
    crowded = (of.bincount(minlength=len(prefixes)) > room).nonzero().flatten().tolist()
    surplus = []
    for prefix in crowded:
        rows = (of == prefix).nonzero().flatten()
        order = distances(rows, prefixes[prefix : prefix + 1]).flatten().argsort(stable=True)
        surplus += rows[order[int(room[prefix]) :]].tolist()
        taken[tuple(prefixes[prefix].tolist())] = int(room[prefix])
    for row in surplus:
        codes[row, :levels] = _nearest_with_room(row, codes[row, :levels], catalogue, taken, width, distances)
        moved[row] = True
    return codes, moved


def _nearest_with_room(row, own, catalogue, taken, width, distances) -> torch.Tensor:
    """The nearest prefix with a free code that shares as many codes with `own` as one does; it is counted as taken."""
    sizes = catalogue.codebook_sizes[:-1]
    for shared in range(len(sizes) - 1, -1, -1):
        changing = sizes[shared:]
        if torch.tensor(changing).prod() * width > _AT_ONCE:
            break
        begin = own[:shared].tolist()
        candidates = torch.tensor([[*begin, *rest] for rest in product(*map(range, changing))], device=own.device)
        room = catalogue.free_last_codes(candidates.cpu().numpy()).sum(1)
        for place in distances(torch.tensor([row], device=own.device), candidates)[0].argsort(stable=True).tolist():
            key = tuple(candidates[place].tolist())
            if room[place] > taken.get(key, 0):
                taken[key] = taken.get(key, 0) + 1
                return candidates[place]
    raise CrowdedPrefixError(
        f"no free code is left near the prefix {tuple(own.tolist())} for a new item; train anew with larger codebooks (--codebook_sizes)"
    )


def numbered(codes: torch.Tensor, catalogue: ItemCatalogue) -> torch.Tensor:
    """
    (n, levels) codes of new items of a catalogue whose last level numbers items of equal codes: `codes` (n, levels - 1), each with a free number.

    Example:
        >>> catalogue = ItemCatalogue(["a", "b"], codes=[[0, 0], [1, 0]], codebook_sizes=[2, 3])
        >>> numbered(torch.tensor([[0], [0], [1]]), catalogue).tolist()
        [[0, 1], [0, 2], [1, 1]]
    """
    free = torch.from_numpy(catalogue.free_last_codes(codes.cpu().numpy()))
    of = torch.unique(codes, dim=0, return_inverse=True)[1].tolist()
    before: dict[int, int] = {}
    last = []
    for row, prefix in enumerate(of):
        last.append(int(free[row].nonzero()[before.get(prefix, 0)]))
        before[prefix] = before.get(prefix, 0) + 1
    return torch.cat([codes.cpu(), torch.tensor(last)[:, None]], dim=1)
