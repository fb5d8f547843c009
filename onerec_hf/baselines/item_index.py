"""Item ids and their indices, saved with the weights of a sequence model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import torch

from onerec_hf.modeling.item_ids import decode_ids, encode_ids, find_keys, longest_id


class ItemIndex:
    """
    N distinct item ids in the order of their indices, 0 to N - 1.

    Args:
        item_ids: N distinct integers or strings.

    Raises:
        ValueError: no ids, or repeated ids.
        TypeError: neither all integers nor all strings.

    Example:
        >>> items = ItemIndex(["m17", "m4", "m256"])
        >>> items.indices(["m256", "m17"]).tolist(), items.ids([1])
        ([2, 0], ['m4'])
    """

    def __init__(self, item_ids: Iterable):
        self._keys, self.id_type = encode_ids(item_ids)
        if not len(self._keys):
            raise ValueError("item_ids is empty: a model needs at least one item")
        self._order = np.argsort(self._keys)
        ordered = self._keys[self._order]
        if (repeated := ordered[1:] == ordered[:-1]).any():
            first = decode_ids(ordered[1:][repeated][:1])[0]
            raise ValueError(f"item_ids: {int(repeated.sum())} ids repeat, e.g. {first!r}. Pass each item once")

    def __len__(self) -> int:
        return len(self._keys)

    def __str__(self) -> str:
        return f"{len(self)} items"

    @cached_property
    def active(self) -> np.ndarray:
        """(N,) bool, all true: items are not withdrawn here, as in an [`~onerec_hf.ItemCatalogue`]."""
        return np.ones(len(self), dtype=bool)

    @cached_property
    def hash(self) -> str:
        """Identifies the ids and their order."""
        return hashlib.sha256(self.id_type.encode() + self._keys.tobytes()).hexdigest()

    @property
    def lineage(self) -> tuple[str, ...]:
        """Hashes of earlier catalogues that grew to this one: none."""
        return ()

    @property
    def num_active(self) -> int:
        """All items."""
        return len(self)

    def num_left(self, indices: np.ndarray) -> int:
        """Items that are not among `indices`, which may repeat."""
        return len(self) - len(np.unique(indices))

    @property
    def item_ids(self) -> list:
        """All item ids in the order of their indices."""
        return decode_ids(self._keys)

    def ids(self, rows) -> list:
        """Item ids of indices."""
        return decode_ids(self._keys[np.asarray(rows, dtype=np.int64)])

    def indices(self, item_ids: Iterable, unknown: str = "error") -> np.ndarray:
        """
        Indices of item ids, (n,) int64.

        Args:
            item_ids: integers or strings, as the index holds them.
            unknown: `"error"` raises on an unknown id; `"mask"` returns -1 for it.

        Raises:
            KeyError: unknown ids.
            TypeError: ids of the other type.
        """
        wanted, id_type = encode_ids(item_ids, longest_id(self._keys))
        if not len(wanted):  # no ids have no type
            return np.zeros(0, dtype=np.int64)
        if id_type != self.id_type:
            raise TypeError(f"the model's item ids are of type {self.id_type}; got {decode_ids(wanted[:1])[0]!r}")
        rows = find_keys(self._keys, self._order, wanted)
        if unknown == "error" and (missing := rows < 0).any():
            raise KeyError(
                f"{int(missing.sum())} of {len(wanted)} item ids are not among the model's {len(self)} items, e.g. "
                f"{decode_ids(wanted[missing][:3])}. Leave them out, or train a model with them"
            )
        return rows

    def to_tensor(self) -> torch.Tensor:
        """The ids as a tensor: (N,) int64, or (N, longest) uint8, the UTF-8 bytes of strings padded with zeros."""
        keys = self._keys.view(np.uint8).reshape(len(self), -1) if self.id_type == "str" else self._keys
        return torch.from_numpy(keys.copy())

    @classmethod
    def from_tensor(cls, keys: torch.Tensor) -> ItemIndex:
        """
        Reads what `to_tensor` wrote.

        Raises:
            ValueError: repeated ids, or bytes that are not UTF-8.

        Example:
            >>> ItemIndex.from_tensor(ItemIndex(["é", "b"]).to_tensor()).item_ids
            ['é', 'b']
        """
        array = np.ascontiguousarray(keys.cpu().numpy())
        return cls(array if array.ndim == 1 else decode_ids(array.view(f"S{array.shape[1]}")[:, 0]))
