"""Semantic IDs made elsewhere, which may collide, and the ways from them to a catalogue, in which nothing does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from onerec_hf.modeling.catalogue import ItemCatalogue
from onerec_hf.semantic_ids.unique_codes import CrowdedPrefixError, add_digit

_CODE_LIMIT = 2**31 - 1  # a catalogue keeps 32-bit codes, and a codebook has one code more than its largest


class ImportResult(NamedTuple):
    """
    What `ImportedIDs.to_catalogue` made.

    `catalogue`: the items in the order of the import. `moved` (N,) bool: the items that did not keep, or not alone, the codes they came
    with: their last code is another one ("assign"), or their extra digit is not 0 ("extra-digit"). There are as many as collisions.
    """

    catalogue: ItemCatalogue
    moved: np.ndarray


@dataclass(frozen=True, eq=False, init=False, repr=False)
class ImportedIDs:
    """
    Items and their codes as another tool left them: several items may share all codes.

    Args:
        item_ids: N integers or strings; kept as a list.
        codes: (N, L) integers, not negative; kept as int64.
        codebook_sizes: codes per level; the smallest that hold `codes` when None.
        source: what errors call it, e.g. the file.

    Raises:
        ValueError: no items, another number of ids than of codes, codes that are no integers, negative, or beyond their codebook.

    Example:
        >>> imported = ImportedIDs(["a", "b", "c"], np.array([[0, 1], [0, 1], [2, 0]]))
        >>> imported.codebook_sizes, imported.collisions, imported.groups()
        ([3, 2], 1, [['a', 'b']])
        >>> catalogue, moved = imported.to_catalogue("assign")
        >>> catalogue.codes.tolist(), moved.tolist()
        ([[0, 1], [0, 0], [2, 0]], [False, True, False])
    """

    item_ids: list
    codes: np.ndarray
    codebook_sizes: list[int]
    source: str

    def __init__(
        self,
        item_ids: Sequence | np.ndarray,
        codes: np.ndarray,
        codebook_sizes: Sequence[int] | None = None,
        source: str = "semantic IDs",
    ):
        ids, codes = np.asarray(item_ids, dtype=object).tolist(), np.asarray(codes)
        if codes.dtype.kind not in "iu":
            raise ValueError(
                f"{source}: codes must be integers, not {codes.dtype}; convert them first, e.g. with codes.astype('int64')"
            )
        if codes.ndim != 2 or not codes.size:
            raise ValueError(
                f"{source}: expected a code per item and level and at least one of each; got shape {codes.shape} (items x levels)"
            )
        if len(ids) != len(codes):
            raise ValueError(
                f"{source}: codes of {len(codes):,} items, but {len(ids):,} item_ids; give one id per item, in the order of the codes"
            )
        if codebook_sizes is not None and len(codebook_sizes) != codes.shape[1]:
            raise ValueError(
                f"{source}: {codes.shape[1]} levels, but codebook_sizes has {len(codebook_sizes)}: {list(codebook_sizes)}; give "
                "one size per level"
            )
        limits = [_CODE_LIMIT] * codes.shape[1] if codebook_sizes is None else [int(size) for size in codebook_sizes]
        bad = (codes < 0) | (codes >= np.asarray(limits))
        if bad.any():
            row, level = (int(index) for index in np.argwhere(bad)[0])
            raise ValueError(
                f"{source}: {int(bad.any(1).sum()):,} of {len(ids):,} items have a code outside its codebook (first: item "
                f"{ids[row]!r:.80}, level {level + 1} of {codes.shape[1]}: code {int(codes[row, level])}; codes run from 0 to "
                f"{limits[level] - 1}); give the codebook_sizes that the codes were made with, or make the codes count from 0"
            )
        codes = codes.astype(np.int64)
        sizes = (codes.max(0) + 1).tolist() if codebook_sizes is None else limits
        for name, value in {"item_ids": ids, "codes": codes, "codebook_sizes": sizes, "source": source}.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.item_ids)

    def __repr__(self) -> str:
        return (
            f"ImportedIDs({len(self)} items from {self.source}, codebook_sizes={self.codebook_sizes}, "
            f"{self.collisions} collisions)"
        )

    @property
    def collisions(self) -> int:
        """Items that share all codes with an earlier item: items less distinct semantic IDs."""
        return len(self) - len(np.unique(self.codes, axis=0))

    def groups(self, limit: int | None = None) -> list[list]:
        """The item ids of every set of items that share all codes, in the items' order; the first `limit` sets, or all."""
        sets = sorted(_groups(self.codes), key=lambda rows: rows[0])[:limit]
        return [[self.item_ids[row] for row in rows] for rows in sets]

    def to_catalogue(
        self,
        on_collision: Literal["error", "assign", "extra-digit"] = "error",
        codebook_sizes: Sequence[int] | None = None,
        popularity: np.ndarray | None = None,
    ) -> ImportResult:
        """
        A catalogue of these items, in this order.

        Args:
            on_collision: what becomes of items that share all codes.

                - "error": nothing, the catalogue refuses them.
                - "assign": the first keeps its codes; each other one, in order, takes the lowest last-level code that is free in its prefix
                  (all codes but the last). Which code that is has no meaning: nothing is known here that says which would suit the item.
                  With embeddings at hand, [`make_unique`] chooses better.
                - "extra-digit": TIGER's way. One level is added, whose code is the item's place among those that share its codes: 0 for the
                  first and for all without a collision. As large as the largest such group.
            codebook_sizes: codes per level (with "extra-digit", with or without the added one); those of the import when None.
            popularity: (N,) interaction counts to keep in the catalogue.

        Raises:
            ValueError: items that share all codes ("error"), more items (`CrowdedPrefixError`) under a prefix than the last level has codes ("assign"), ids that
                repeat, or codes outside `codebook_sizes`.
        """
        if on_collision not in ("error", "assign", "extra-digit"):
            raise ValueError(f'on_collision must be "error", "assign" or "extra-digit"; got {on_collision!r}')
        sizes = self.codebook_sizes if codebook_sizes is None else [int(size) for size in codebook_sizes]
        codes, moved = self.codes, np.zeros(len(self), dtype=bool)
        if on_collision == "extra-digit":
            place = _place_in_group(codes)
            codes, moved = np.concatenate([codes, place[:, None]], axis=1), place > 0
            if len(sizes) == self.codes.shape[1]:
                sizes = [*sizes, int(place.max()) + 1]
        if len(sizes) != codes.shape[1]:
            raise ValueError(
                f"{self.source}: {codes.shape[1]} levels, but codebook_sizes has {len(sizes)}: {sizes}; give one size per level"
            )
        if on_collision == "assign":
            codes, moved = self._assign(sizes[-1])
        return ImportResult(ItemCatalogue(self.item_ids, codes, sizes, popularity=popularity), moved)

    def _assign(self, last_size: int) -> tuple[np.ndarray, np.ndarray]:
        codes, moved = self.codes.copy(), _place_in_group(self.codes) > 0
        for rows in _groups(codes[:, :-1]):
            if not moved[rows].any():
                continue
            if len(rows) > last_size:
                prefix = tuple(codes[rows[0], :-1].tolist())
                raise CrowdedPrefixError(
                    f"{self.source}: {len(rows):,} items share the prefix {prefix} (first: {self.item_ids[rows[0]]!r:.80}), but the last "
                    f"level has only {last_size:,} codes to tell them apart; give codebook_sizes with a larger last level, or add a "
                    'level with on_collision="extra-digit"'
                )
            late = rows[moved[rows]]
            lowest = np.arange(
                min(last_size, len(rows) + len(late))
            )  # enough are free among them, however large the codebook
            free = np.setdiff1d(lowest, codes[rows, -1])
            codes[late, -1] = free[: len(late)]
        return codes, moved


def _groups(codes: np.ndarray) -> list[np.ndarray]:
    """Rows of every set of two or more items with equal (N, L) codes, each in ascending order; L may be 0."""
    rooted = np.concatenate([np.zeros((len(codes), 1), dtype=codes.dtype), codes], axis=1)  # no levels: one root
    _, same, sizes = np.unique(rooted, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(same.reshape(-1), kind="stable")
    return [rows for rows in np.split(order, np.cumsum(sizes)[:-1]) if len(rows) > 1]


def _place_in_group(codes: np.ndarray) -> np.ndarray:
    """(N,) how many earlier items have the same codes."""
    return add_digit(torch.from_numpy(codes))[:, -1].numpy()
