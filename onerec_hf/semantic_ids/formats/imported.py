"""Imported semantic IDs, which may collide, and their conversion to a catalogue without collisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from onerec_hf.modeling.catalogue import ItemCatalogue
from onerec_hf.semantic_ids.unique_codes import CrowdedPrefixError, add_digit

_CODE_LIMIT = 2**31 - 1  # a catalogue stores 32-bit codes, and a codebook has its largest code plus one entries


class ImportResult(NamedTuple):
    """
    The result of `ImportedIDs.to_catalogue`.

    `catalogue`: the items in the imported order. `moved` (N,) bool: the items whose semantic ID changed to resolve a collision: a new last
    code ("assign"), or an extra digit above 0 ("extra-digit"). Their number equals the number of collisions.
    """

    catalogue: ItemCatalogue
    moved: np.ndarray


@dataclass(frozen=True, eq=False, init=False, repr=False)
class ImportedIDs:
    """
    Items and codes from another tool. Several items may share all codes.

    Args:
        item_ids: N integers or strings; kept as a list.
        codes: (N, L) integers, not negative; kept as int64.
        codebook_sizes: codes per level (default: the largest code plus one).
        source: name for error messages, e.g. the file.

    Raises:
        ValueError: no items, unequal numbers of ids and codes, non-integer or negative codes, codes outside their codebook.

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
                f"{source}: codes must be integers, not {codes.dtype}; convert them, e.g. with codes.astype('int64')"
            )
        if codes.ndim != 2 or not codes.size:
            raise ValueError(f"{source}: expected codes of shape (items, levels), not empty; got shape {codes.shape}")
        if len(ids) != len(codes):
            raise ValueError(
                f"{source}: codes of {len(codes):,} items, but {len(ids):,} item_ids; pass one id per item, in the order of the codes"
            )
        if codebook_sizes is not None and len(codebook_sizes) != codes.shape[1]:
            raise ValueError(
                f"{source}: {codes.shape[1]} levels, but codebook_sizes has {len(codebook_sizes)}: {list(codebook_sizes)}; pass "
                "one size per level"
            )
        limits = [_CODE_LIMIT] * codes.shape[1] if codebook_sizes is None else [int(size) for size in codebook_sizes]
        bad = (codes < 0) | (codes >= np.asarray(limits))
        if bad.any():
            row, level = (int(index) for index in np.argwhere(bad)[0])
            raise ValueError(
                f"{source}: {int(bad.any(1).sum()):,} of {len(ids):,} items have a code outside its codebook (first: item "
                f"{ids[row]!r:.80}, level {level + 1} of {codes.shape[1]}: code {int(codes[row, level])}; codes run from 0 to "
                f"{limits[level] - 1}); pass the codebook_sizes of the quantiser, or renumber the codes from 0"
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
        """Number of items that share all codes with an earlier item."""
        return len(self) - len(np.unique(self.codes, axis=0))

    def groups(self, limit: int | None = None) -> list[list]:
        """Groups of item ids that share all codes, in item order; the first `limit` groups, or all."""
        sets = sorted(_groups(self.codes), key=lambda rows: rows[0])[:limit]
        return [[self.item_ids[row] for row in rows] for rows in sets]

    def to_catalogue(
        self,
        on_collision: Literal["error", "assign", "extra-digit"] = "error",
        codebook_sizes: Sequence[int] | None = None,
        popularity: np.ndarray | None = None,
    ) -> ImportResult:
        """
        Converts the items to a catalogue, in the same order.

        Args:
            on_collision: how to resolve items that share all codes.

                - "error": raise an error.
                - "assign": the first item keeps its codes. Each further item, in order, gets the lowest free last-level code of its prefix
                  (all codes but the last). This choice is arbitrary; with embeddings, use [`make_unique`].
                - "extra-digit": as in TIGER, adds a level that numbers the items with equal codes from 0 (0 for items without a collision).
                  Its size is that of the largest group.
            codebook_sizes: codes per level, for "extra-digit" with or without the added level (default: those of the import).
            popularity: (N,) interaction counts for the catalogue.

        Raises:
            ValueError: collisions ("error"), more items under a prefix than last-level codes ("assign", `CrowdedPrefixError`), duplicate ids, or
                codes outside `codebook_sizes`.
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
                f"{self.source}: {codes.shape[1]} levels, but codebook_sizes has {len(sizes)}: {sizes}; pass one size per level"
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
                    f"level has only {last_size:,} codes to distinguish them; pass codebook_sizes with a larger last level, or add a "
                    'level with on_collision="extra-digit"'
                )
            late = rows[moved[rows]]
            lowest = np.arange(
                min(last_size, len(rows) + len(late))
            )  # contains enough free codes for any codebook size
            free = np.setdiff1d(lowest, codes[rows, -1])
            codes[late, -1] = free[: len(late)]
        return codes, moved


def _groups(codes: np.ndarray) -> list[np.ndarray]:
    """Row indices of every group of two or more items with equal (N, L) codes, ascending; L may be 0."""
    rooted = np.concatenate([np.zeros((len(codes), 1), dtype=codes.dtype), codes], axis=1)  # a common root, for L = 0
    _, same, sizes = np.unique(rooted, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(same.reshape(-1), kind="stable")
    return [rows for rows in np.split(order, np.cumsum(sizes)[:-1]) if len(rows) > 1]


def _place_in_group(codes: np.ndarray) -> np.ndarray:
    """(N,) number of earlier items with the same codes."""
    return add_digit(torch.from_numpy(codes))[:, -1].numpy()
