"""
Item vectors of low rank in blocks by popularity, the block-wise adaptive decomposition of CpRec (arXiv 2004.13139, section 3.2; as in adaptive input
representations, Baevski and Auli, 2019): frequent items have vectors of the full width, rarer ones shorter vectors and a projection to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class LowRankVectors(nn.Module):
    """
    The vectors of an [`~onerec_hf.modeling.item_head.ItemHead`] in blocks: row 0 is zeros, row `i` is found at `place[i]`, its rank by popularity. The
    vector of place p in block b, which begins at place s, is `tables[b][p - s] @ projections[b - 1]`; block 0 has no projection.

    Args:
        blocks: (items, rank) of each block, the most popular items first; the rank of the first is the width.

    Example:
        >>> vectors = LowRankVectors([(1, 4), (2, 1)])
        >>> vectors.initialize(1.0)
        >>> vectors.set_order(torch.tensor([2, 0, 1]))  # the second row of items is the most popular item
        >>> vectors.table().shape, torch.equal(vectors(torch.tensor([0, 2])), vectors.table()[[0, 2]])
        (torch.Size([4, 4]), True)
        >>> sum(weight.numel() for weight in vectors.parameters())  # 1 x 4, 2 x 1 and 1 x 4
        10
    """

    def __init__(self, blocks: list[tuple[int, int]]):
        super().__init__()
        self.blocks = list(blocks)
        width = blocks[0][1]
        self.tables = nn.ParameterList(torch.empty(items, rank) for items, rank in blocks)
        self.projections = nn.ParameterList(torch.empty(rank, width) for _, rank in blocks[1:])
        self.place = nn.Buffer(torch.arange(-1, sum(items for items, _ in blocks)))  # -1 of row 0

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        """Draws vectors of this standard deviation: projections keep the size of a table's rows."""
        for table in self.tables:
            nn.init.normal_(table, std=std)
        for projection in self.projections:
            nn.init.normal_(projection, std=len(projection) ** -0.5)

    def set_order(self, place: torch.Tensor) -> None:
        """
        Assigns the places.

        Args:
            place: (items,) ranks by popularity of the rows from 1 on, 0 for the most popular item.
        """
        self.place[1:] = place.to(self.place)

    def extend(self, row: torch.Tensor) -> None:
        """
        Adds items of no popularity to the last block, with vectors of zeros.

        Args:
            row: (1 + items + new,) the new rows of the old rows, row 0 among them, and of the new items.
        """
        items, rank = self.blocks[-1]
        new = len(row) - len(self.place)
        place = torch.arange(-1, len(row) - 1, device=self.place.device)
        place[: len(self.place)] = self.place
        self.place = torch.empty_like(place).scatter_(0, row.to(place.device), place)
        self.tables[-1] = nn.Parameter(F.pad(self.tables[-1].detach(), (0, 0, 0, new)))
        self.blocks[-1] = (items + new, rank)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(...) rows to (..., width) vectors."""
        place, begin, found = self.place[rows].unsqueeze(-1), 0, None
        for block, table in enumerate(self.tables):
            end = begin + self.blocks[block][0]
            vectors = F.embedding((place[..., 0] - begin).clamp(0, end - begin - 1), table)
            vectors = vectors if block == 0 else vectors @ self.projections[block - 1]
            vectors = vectors.masked_fill((place < begin) | (place >= end), 0.0)
            found, begin = vectors if found is None else found + vectors, end
        assert found is not None
        return found

    def table(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(1 + items, width) all vectors in the order of their rows, row 0 included, in `dtype` or that of the weights."""
        tables = [table.to(dtype) for table in self.tables]
        full = [table @ each.to(dtype) for table, each in zip(tables[1:], self.projections, strict=True)]
        return F.embedding(self.place + 1, F.pad(torch.cat([tables[0], *full]), (0, 0, 1, 0)))


__all__ = ["LowRankVectors"]
