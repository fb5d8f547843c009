"""The item catalogue: which item has which semantic ID. It travels with the checkpoint as `catalogue.safetensors`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers.utils import cached_file

from .trie_onerec import SemanticIDTrie

CATALOGUE_NAME = "catalogue.safetensors"
_FORMAT = "onerec-catalogue"
_VERSION = "1"
_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class ItemCatalogue:
    """
    Item ids and their semantic IDs: N distinct ids, N distinct code tuples, in a fixed row order. Immutable.

    Ids are integers or strings, and come back exactly as they went in. Rows (int64, 0..N-1) are what the rest of the code computes
    with; -1 stands for "no item".

    Args:
        item_ids: N distinct integers or strings.
        codes: (N, L) integers, rows distinct, `0 <= codes[:, l] < codebook_sizes[l]`.
        codebook_sizes: size of each level.
        popularity: (N,) interaction counts, optional.
        embedding_fingerprint: names the embeddings that the codes came from, for the record.

    Raises:
        ValueError: ids or codes that repeat, codes outside their codebook, lengths that differ.

    Example:
        >>> catalogue = ItemCatalogue(["m17", "m4"], codes=[[0, 1], [1, 0]], codebook_sizes=[2, 2])
        >>> catalogue.rows(["m4", "m17"]).tolist(), catalogue.ids([1, 0])
        ([1, 0], ['m4', 'm17'])
    """

    def __init__(
        self,
        item_ids: Sequence | np.ndarray,
        codes,
        codebook_sizes: Sequence[int],
        popularity=None,
        embedding_fingerprint: str = "",
    ):
        keys, self.id_type = _encode_ids(item_ids)
        codes = np.asarray(codes)
        self.codebook_sizes = [int(size) for size in codebook_sizes]
        if codes.shape != (len(keys), len(self.codebook_sizes)):
            raise ValueError(
                f"codes: expected shape {(len(keys), len(self.codebook_sizes))} (items x levels), got {codes.shape}"
            )
        self._keys, self.codes = keys, codes.astype(np.int32)
        if len(keys) == 0:
            raise ValueError("a catalogue needs at least one item")
        for level, size in enumerate(self.codebook_sizes):
            low, high = int(codes[:, level].min()), int(codes[:, level].max())
            if low < 0 or high >= size:
                raise ValueError(f"codes of level {level} run from {low} to {high}; its codebook has {size} codes")
        self._id_order = np.argsort(keys, kind="stable")
        self._code_order = np.lexsort(self.codes.T[::-1])
        ordered = keys[self._id_order]
        if (repeated := ordered[1:] == ordered[:-1]).any():
            first = self.ids([self._id_order[1:][repeated][0]])[0]
            raise ValueError(f"{int(repeated.sum())} item ids repeat, e.g. {first!r}; every item stands in one row")
        ordered = self.codes[self._code_order]
        if (repeated := (ordered[1:] == ordered[:-1]).all(1)).any():
            first, second = self.ids(np.stack([self._code_order[:-1], self._code_order[1:]], 1)[repeated][0])
            raise ValueError(
                f"{int(repeated.sum())} items share a semantic ID with another, e.g. {first!r} and {second!r}; "
                "resolve collisions first (onerec_hf.semantic_ids.make_unique)"
            )
        self.popularity = None if popularity is None else np.asarray(popularity, dtype=np.int64)
        if self.popularity is not None and self.popularity.shape != (len(keys),):
            raise ValueError(f"popularity: expected shape {(len(keys),)}, got {self.popularity.shape}")
        self.embedding_fingerprint = embedding_fingerprint

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"ItemCatalogue({len(self)} items, {self.id_type} ids, codebook_sizes={self.codebook_sizes})"

    def __deepcopy__(self, memo):  # immutable: copies of a model share it
        return self

    @cached_property
    def hash(self) -> str:
        """SHA-256 over ids, codes and codebook sizes in row order: two catalogues with one hash name the same items."""
        digest = hashlib.sha256(f"{_FORMAT}/{_VERSION}/{self.id_type}/{self.codebook_sizes}/{len(self)}".encode())
        digest.update(np.ascontiguousarray(self._keys).tobytes())
        digest.update(np.ascontiguousarray(self.codes).tobytes())
        return digest.hexdigest()

    @cached_property
    def trie(self) -> SemanticIDTrie:
        """The semantic IDs as a trie (on the CPU; `.to(device)` moves it)."""
        return SemanticIDTrie(self.codes, self.codebook_sizes, order=self._code_order)

    @property
    def item_ids(self) -> list:
        """All item ids in row order."""
        return self.ids(np.arange(len(self)))

    def rows(self, item_ids: Iterable, unknown: str = "error") -> np.ndarray:
        """
        Rows of item ids, (n,) int64.

        Args:
            item_ids: integers or strings, as the catalogue holds them.
            unknown: "error" raises on an id that the catalogue does not hold; "mask" gives -1 for it.

        Raises:
            KeyError: unknown ids (how many, the first three).
            TypeError: ids of the other type (a string asked of integer ids, say).
        """
        item_ids = item_ids.tolist() if isinstance(item_ids, np.ndarray | torch.Tensor) else list(item_ids)
        if not item_ids:
            return np.zeros(0, dtype=np.int64)
        wanted, id_type = _encode_ids(item_ids)
        if id_type != self.id_type:
            raise TypeError(f"item ids of this catalogue are of type {self.id_type}; got {item_ids[0]!r}")
        position = np.searchsorted(self._keys, wanted, sorter=self._id_order).clip(max=len(self) - 1)
        rows = self._id_order[position]
        missing = self._keys[rows] != wanted
        if missing.any():
            if unknown == "error":
                examples = [item_ids[i] for i in np.flatnonzero(missing)[:3]]
                raise KeyError(
                    f"{int(missing.sum())} of {len(item_ids)} item ids are not in the catalogue of {len(self)} items, e.g. "
                    f'{examples}; pass unknown="skip" to leave them out'
                )
            rows = np.where(missing, -1, rows)
        return rows

    def ids(self, rows) -> list:
        """Item ids of rows, as Python integers or strings; `None` for -1."""
        rows = np.asarray(rows, dtype=np.int64)
        keys = self._keys[rows]
        found = keys.tolist() if self.id_type == "int" else [key.decode() for key in keys.tolist()]
        return [item if row >= 0 else None for item, row in zip(found, rows.tolist(), strict=True)]

    def rows_of_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Rows of code tuples: (..., L) integers give (...,) int64; -1 where the tuple names no item."""
        trie = self.trie.to(codes.device)
        leaves = trie.find_leaves(codes)
        return torch.where(leaves >= 0, trie.leaf_to_row[leaves], -1)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the catalogue as one safetensors file: to a temporary name first, then renamed."""
        tensors = {"codes": self.codes, "id_order": self._id_order, "code_order": self._code_order}
        keys = np.ascontiguousarray(self._keys)
        tensors["item_ids"] = keys if self.id_type == "int" else keys.view(np.uint8).reshape(len(keys), -1)
        if self.popularity is not None:
            tensors["popularity"] = self.popularity
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "id_type": self.id_type,
            "codebook_sizes": ",".join(map(str, self.codebook_sizes)),
            "hash": self.hash,
            "embedding_fingerprint": self.embedding_fingerprint,
        }
        temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> ItemCatalogue:
        """
        Reads a catalogue file.

        Raises:
            ValueError: the file is cut short, is no catalogue, or is of a later version.
        """
        try:
            with safe_open(os.fspath(path), framework="np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        except SafetensorError as error:
            raise ValueError(
                f"{os.fspath(path)} is damaged or cut short ({error}); copy or download it again"
            ) from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{os.fspath(path)} is no item catalogue (format {metadata.get('format')!r})")
        if metadata["version"] != _VERSION:
            raise ValueError(
                f"{os.fspath(path)} is of catalogue version {metadata['version']}, this onerec_hf reads version {_VERSION}; "
                "update onerec_hf"
            )
        catalogue = object.__new__(cls)  # the constructor's checks held when the file was written
        keys = tensors["item_ids"]
        catalogue.id_type = metadata["id_type"]
        catalogue._keys = keys if catalogue.id_type == "int" else keys.reshape(-1).view(f"S{keys.shape[1]}")
        catalogue.codes = tensors["codes"]
        catalogue._id_order, catalogue._code_order = tensors["id_order"], tensors["code_order"]
        catalogue.codebook_sizes = [int(size) for size in metadata["codebook_sizes"].split(",")]
        catalogue.popularity = tensors.get("popularity")
        catalogue.embedding_fingerprint = metadata["embedding_fingerprint"]
        return catalogue

    @classmethod
    def find(cls, repo: str | os.PathLike, **kwargs) -> ItemCatalogue | None:
        """The catalogue of a local folder or Hub repository, or `None` where it holds none. Takes `from_pretrained`'s hub arguments."""
        hub = {name: kwargs[name] for name in _HUB_KWARGS if kwargs.get(name) is not None}
        path = cached_file(repo, CATALOGUE_NAME, _raise_exceptions_for_missing_entries=False, **hub)
        return None if path is None else cls.load(path)


def _encode_ids(item_ids) -> tuple[np.ndarray, str]:
    """Ids as a sortable array: int64, or fixed-width UTF-8 bytes (a tenth of the memory of Python strings)."""
    if isinstance(item_ids, np.ndarray) and item_ids.dtype.kind in "iu":
        return item_ids.astype(np.int64), "int"
    kinds = set(map(type, item_ids))
    if all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
        return np.asarray(item_ids, dtype=np.int64), "int"
    if not all(issubclass(kind, str) for kind in kinds):
        names = sorted(kind.__name__ for kind in kinds)
        raise TypeError(f"item ids must be all integers or all strings; got {', '.join(names)}")
    encoded = [item.encode() for item in item_ids]
    if any(key.endswith(b"\0") for key in encoded):
        raise ValueError("item ids must not end in a NUL character")
    return np.asarray(encoded, dtype=np.bytes_), "str"


__all__ = ["CATALOGUE_NAME", "ItemCatalogue"]
