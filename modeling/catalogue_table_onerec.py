"""A table of items and their semantic IDs, and its lookups: ids to rows, rows to codes, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import torch

from .item_ids import (
    check_codes,
    check_popularity,
    decode_ids,
    encode_ids,
    find_keys,
    lower_bound,
    sorted_orders,
)
from .trie_onerec import SemanticIDTrie


class CatalogueTable:
    """
    The arrays of an [`ItemCatalogue`] and what is looked up in them. They may lie in a mapped file: nothing here writes to them, and
    every lookup takes many items at once.

    Args:
        item_ids, codes, codebook_sizes, popularity: as for [`ItemCatalogue`].
    """

    def __init__(self, item_ids: Sequence | np.ndarray, codes, codebook_sizes: Sequence[int], popularity=None):
        keys, self.id_type = encode_ids(item_ids)
        self.codebook_sizes = [int(size) for size in codebook_sizes]
        if len(keys) == 0:
            raise ValueError("a catalogue needs at least one item")
        codes = check_codes(codes, len(keys), self.codebook_sizes)
        self._hold(
            keys,
            codes,
            np.ones(len(keys), dtype=bool),
            check_popularity(popularity, len(keys)),
            *sorted_orders(keys, codes, self.codebook_sizes),
        )

    def _hold(
        self,
        keys: np.ndarray,
        codes: np.ndarray,
        active: np.ndarray,
        popularity: np.ndarray | None,
        id_order: np.ndarray,
        code_order: np.ndarray,
    ) -> None:
        self._keys, self.codes, self.active, self.popularity = keys, codes, active, popularity
        self._id_order, self._code_order = id_order, code_order
        for array in (codes, active, popularity):
            if array is not None:
                array.flags.writeable = False

    def __len__(self) -> int:
        return len(self._keys)

    @cached_property
    def num_active(self) -> int:
        """Items that may be generated: those that are not retired."""
        return int(np.count_nonzero(self.active))

    @cached_property
    def trie(self) -> SemanticIDTrie:
        """The semantic IDs that may be generated, those of active items, as a trie (on the CPU; `.to(device)` moves it)."""
        order = self._code_order[self.active.take(self._code_order)]
        return SemanticIDTrie(self.codes, self.codebook_sizes, order=order)

    @property
    def item_ids(self) -> list:
        """All item ids in row order."""
        return decode_ids(self._keys)

    def rows(self, item_ids: Iterable, unknown: str = "error") -> np.ndarray:
        """
        Rows of item ids, (n,) int64. Retired items have theirs.

        Args:
            item_ids: integers or strings, as the catalogue holds them.
            unknown: "error" raises on an id that the catalogue does not hold; "mask" gives -1 for it.

        Raises:
            KeyError: unknown ids (how many, the first three).
            TypeError: ids of the other type (a string asked of integer ids, say).
        """
        wanted = self._encode(item_ids)
        rows = find_keys(self._keys, self._id_order, wanted)
        if unknown == "error" and (missing := rows < 0).any():
            raise KeyError(
                f"{int(missing.sum())} of {len(wanted)} item ids are not in the catalogue of {len(self)} items, e.g. "
                f'{decode_ids(wanted[missing][:3])}; pass unknown="skip" to leave them out'
            )
        return rows

    def _encode(self, item_ids: Iterable) -> np.ndarray:
        """Ids as this catalogue holds them."""
        wanted, id_type = encode_ids(item_ids)
        if len(wanted) == 0:  # no ids are of any type
            return self._keys[:0]
        if id_type != self.id_type:
            raise TypeError(
                f"item ids of this catalogue are of type {self.id_type}; got {decode_ids(wanted[:1])[0]!r}"
            )
        return wanted

    def ids(self, rows) -> list:
        """Item ids of rows, as Python integers or strings; `None` for -1."""
        rows = np.asarray(rows, dtype=np.int64)
        found = decode_ids(self._keys[rows])
        for position in np.flatnonzero(rows < 0).tolist():
            found[position] = None
        return found

    def rows_of_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Rows of code tuples: (..., L) integers give (...,) int64; -1 where the tuple names no item. Retired items are found."""
        wanted = codes.reshape(-1, len(self.codebook_sizes)).cpu().numpy()
        return torch.from_numpy(self._holders(wanted)).view(codes.shape[:-1]).to(codes.device)

    def _holders(self, codes: np.ndarray) -> np.ndarray:
        """Rows of (n, L) code tuples, -1 where one is free."""
        rows = self._code_order.take(lower_bound(self.codes, self._code_order, codes), mode="clip")
        return np.where((self.codes.take(rows, axis=0) == codes).all(1), rows, -1)

    def free_last_codes(self, prefixes: np.ndarray) -> np.ndarray:
        """
        Which items could still be added under prefixes of codes.

        Args:
            prefixes: (n, L - 1) codes of all levels but the last.

        Returns:
            (n, K) bool, K the size of the last codebook: True where no item has prefix and code, be it active or retired.

        Raises:
            ValueError: another shape, or codes outside their codebook.

        Example:
            >>> catalogue = CatalogueTable(["m17", "m4"], codes=[[0, 1], [1, 0]], codebook_sizes=[2, 2])
            >>> catalogue.free_last_codes(np.array([[0], [1]])).tolist()
            [[True, False], [False, True]]
        """
        prefixes = check_codes(prefixes, len(prefixes), self.codebook_sizes[:-1])
        begin, end = (lower_bound(self.codes, self._code_order, prefixes, after) for after in (False, True))
        taken = end - begin
        within = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
        rows = self._code_order[np.repeat(begin, taken) + within]
        free = np.ones((len(prefixes), self.codebook_sizes[-1]), dtype=bool)
        free[np.repeat(np.arange(len(prefixes)), taken), self.codes[rows, -1]] = False
        return free


__all__ = ["CatalogueTable"]
