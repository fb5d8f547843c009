"""Codes of new items of a catalogue whose last level numbers items of equal codes."""

from __future__ import annotations

import torch

from onerec_hf.modeling.catalogue import ItemCatalogue


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
