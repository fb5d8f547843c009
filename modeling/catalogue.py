"""The item catalogue: items, their semantic IDs, and the lookups between them. It travels with the checkpoint as `catalogue.safetensors`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .catalogue_file import FORMAT, read_catalogue_file, write_catalogue_file
from .constraint import SemanticIDTrie
from .files import find_file
from .item_ids import (
    check_codes,
    check_popularity,
    decode_ids,
    encode_ids,
    find_keys,
    longest_id,
    lower_bound,
    sorted_orders,
)


class CatalogueTable:
    """
    The arrays of an [`ItemCatalogue`] and the lookups in them. They may be mapped from a file and are never written to. Every lookup takes many
    items at once.

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

    def num_left(self, indices: np.ndarray) -> int:
        """
        Active items that are not among `indices`, which may repeat: the candidates of a user who has these items.

        Example:
            >>> CatalogueTable(["m17", "m4"], codes=[[0, 1], [1, 0]], codebook_sizes=[2, 2]).num_left(np.array([1, 1]))
            1
        """
        return self.num_active - int(self.active[np.unique(indices)].sum())

    @cached_property
    def trie(self) -> SemanticIDTrie:
        """The semantic IDs that may be generated, those of active items, as a trie (on the CPU; `.to(device)` moves it)."""
        order = self._code_order[self.active.take(self._code_order)]
        return SemanticIDTrie(self.codes, self.codebook_sizes, order=order)

    @property
    def item_ids(self) -> list:
        """All item ids, in the order of item indices."""
        return decode_ids(self._keys)

    def indices(self, item_ids: Iterable, unknown: str = "error") -> np.ndarray:
        """
        Item indices of item ids, (n,) int64; retired items too.

        Args:
            item_ids: integers or strings, as the catalogue holds them.
            unknown: "error" raises on an id that is not in the catalogue; "mask" returns -1 for it.

        Raises:
            KeyError: unknown ids (how many, the first three).
            TypeError: ids of the other type (strings where the catalogue has integers).
        """
        wanted = self._encode(item_ids, longest_id(self._keys))
        rows = find_keys(self._keys, self._id_order, wanted)
        if unknown == "error" and (missing := rows < 0).any():
            raise KeyError(
                f"{int(missing.sum())} of {len(wanted)} item ids are not in the catalogue of {len(self)} items, e.g. "
                f'{decode_ids(wanted[missing][:3])}; pass unknown="skip" to leave them out'
            )
        return rows

    def _encode(self, item_ids: Iterable, longest: int | None = None) -> np.ndarray:
        """Ids as this catalogue holds them; see [`encode_ids`]."""
        wanted, id_type = encode_ids(item_ids, longest)
        if len(wanted) == 0:  # no ids are of any type
            return self._keys[:0]
        if id_type != self.id_type:
            raise TypeError(
                f"item ids of this catalogue are of type {self.id_type}; got {decode_ids(wanted[:1])[0]!r}"
            )
        return wanted

    def ids(self, rows) -> list:
        """Item ids of item indices, as Python integers or strings; `None` for -1."""
        rows = np.asarray(rows, dtype=np.int64)
        found = decode_ids(self._keys[rows])
        for position in np.flatnonzero(rows < 0).tolist():
            found[position] = None
        return found

    def indices_of_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Item indices of code tuples: (..., L) integers to (...,) int64; -1 where no item has the codes. Retired items are found."""
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


CATALOGUE_NAME = "catalogue.safetensors"


@dataclass(frozen=True)
class CatalogueDiff:
    """
    What changed from one catalogue to another, as item ids.

    Attributes:
        added: only the other catalogue holds them.
        removed: only the first one does: their codes were freed.
        retired, restored: both hold them; they were generated before and no longer are, or the other way round.
        recoded: both hold them, under different codes.
    """

    added: list
    removed: list
    retired: list
    restored: list
    recoded: list

    def __str__(self) -> str:
        return ", ".join(f"{len(items)} {name}" for name, items in vars(self).items())


class ItemCatalogue(CatalogueTable):
    """
    Item ids and their semantic IDs: N distinct ids, N distinct code tuples, in a fixed order.

    Ids are integers or strings and are returned exactly as given. The rest of the code computes with item indices (int64, 0..N-1); -1 means
    "no item".

    A catalogue never changes: [`add`], [`retire`] and [`restore`] return a new one, its `version` one higher and this one's hash at
    the end of its `lineage`. A model takes any catalogue that descends from its own, without training. A retired item keeps its index
    and its codes, so that histories with it can be read, but is not generated any more.

    Args:
        item_ids: N distinct integers or strings.
        codes: (N, L) integers, rows distinct, `0 <= codes[:, l] < codebook_sizes[l]`.
        codebook_sizes: size of each level.
        popularity: (N,) interaction counts, optional.
        embedding_fingerprint: identifies the embeddings behind the codes.

    Attributes:
        codes: (N, L) int32, read-only.
        active: (N,) bool, read-only; False where an item is retired.
        popularity: (N,) int64, read-only, or `None`.

    Raises:
        ValueError: ids or codes that repeat, codes outside their codebook, lengths that differ.

    Example:
        >>> catalogue = ItemCatalogue(["m17", "m4"], codes=[[0, 1], [1, 0]], codebook_sizes=[2, 2])
        >>> catalogue.indices(["m4", "m17"]).tolist(), catalogue.ids([1, 0])
        ([1, 0], ['m4', 'm17'])
        >>> grown = catalogue.add(["m256"], codes=[[1, 1]]).retire(["m17"])
        >>> grown
        ItemCatalogue(3 items (1 retired), str ids, codebook_sizes=[2, 2], version=2)
        >>> print(catalogue.diff(grown))
        1 added, 0 removed, 1 retired, 0 restored, 0 recoded
    """

    def __init__(
        self,
        item_ids: Sequence | np.ndarray,
        codes,
        codebook_sizes: Sequence[int],
        popularity=None,
        embedding_fingerprint: str = "",
    ):
        super().__init__(item_ids, codes, codebook_sizes, popularity)
        self.embedding_fingerprint = embedding_fingerprint
        self._lineage: tuple[str, ...] = ()
        self._hash: str | None = None

    def __repr__(self) -> str:
        retired = f" ({len(self) - self.num_active} retired)" if self.num_active < len(self) else ""
        version = f", version={self.version}" if self.version else ""
        return f"ItemCatalogue({len(self)} items{retired}, {self.id_type} ids, codebook_sizes={self.codebook_sizes}{version})"

    def __deepcopy__(self, memo):  # immutable: copies of a model share it
        return self

    @property
    def version(self) -> int:
        """How many changes made this catalogue: 0 for a fresh one."""
        return len(self._lineage)

    @property
    def lineage(self) -> list[str]:
        """Hashes of the catalogues that this one grew from, oldest first."""
        return list(self._lineage)

    @property
    def hash(self) -> str:
        """
        SHA-256 over the parent's hash, ids, codes, activity and codebook sizes in the order of item indices: catalogues with equal
        hashes have equal items. A loaded catalogue has the one that its file was saved with; [`verify`] computes it anew.
        """
        if self._hash is None:
            self._hash = self._digest()
        return self._hash

    def _digest(self) -> str:
        parent = self._lineage[-1] if self._lineage else ""
        digest = hashlib.sha256(f"{FORMAT}/{self.id_type}/{self.codebook_sizes}/{len(self)}/{parent}".encode())
        for array in (self._keys, self.codes, np.packbits(self.active)):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()

    def add(
        self, item_ids: Sequence | np.ndarray, codes, popularity=None, embedding_fingerprint: str | None = None
    ) -> ItemCatalogue:
        """
        The catalogue with new items appended; present items keep their indices and codes.

        Args:
            item_ids: n ids of the catalogue's type, none of which it holds. With none, the catalogue itself is returned.
            codes: (n, L) integers, taken neither by an active nor by a retired item; [`free_last_codes`] finds free ones.
            popularity: (n,) interaction counts, for a catalogue that has them; 0 when not given.
            embedding_fingerprint: of the embeddings that the new codes came from, where it differs.

        Raises:
            ValueError: ids that the catalogue holds, codes that are taken or outside their codebook, repeated ids or codes.
            TypeError: ids of the other type.
        """
        keys = self._encode(item_ids)
        if len(keys) == 0:
            return self
        codes = check_codes(codes, len(keys), self.codebook_sizes)
        by_id, by_code = sorted_orders(keys, codes, self.codebook_sizes)
        present = find_keys(self._keys, self._id_order, keys)
        held = np.flatnonzero(present >= 0)
        retired = held[~self.active[present[held]]]
        if len(retired):
            raise ValueError(
                f"{len(retired)} of {len(keys)} item ids are in the catalogue, retired, e.g. {self.ids(present[retired[:1]])[0]!r}; "
                "bring them back with restore()"
            )
        if len(held):
            raise ValueError(
                f"{len(held)} of {len(keys)} item ids are in the catalogue already, e.g. {self.ids(present[held[:1]])[0]!r}; "
                "add only new ones"
            )
        holders = self._holders(codes)
        if len(taken := np.flatnonzero(holders >= 0)):
            new, holder = decode_ids(keys[taken[:1]])[0], holders[taken[0]]
            raise ValueError(
                f"{len(taken)} of {len(keys)} semantic IDs are taken, e.g. {codes[taken[0]].tolist()} of {new!r} by "
                f"{'' if self.active[holder] else 'the retired '}{self.ids([holder])[0]!r}; free_last_codes() finds free ones, "
                "retire(..., free_codes=True) frees some"
            )
        counts = check_popularity(popularity, len(keys))
        if self.popularity is not None:
            counts = np.append(self.popularity, np.zeros(len(keys), dtype=np.int64) if counts is None else counts)
        elif counts is not None:
            raise ValueError("this catalogue keeps no popularity, so none can be added; leave popularity out")
        before_id = np.searchsorted(self._keys, keys[by_id], sorter=self._id_order)
        before_code = lower_bound(self.codes, self._code_order, codes[by_code])
        grown = self._next(
            np.append(self._keys, keys),
            np.append(self.codes, codes, axis=0),
            np.append(self.active, np.ones(len(keys), dtype=bool)),
            counts,
            np.insert(self._id_order, before_id, len(self) + by_id),
            np.insert(self._code_order, before_code, len(self) + by_code),
        )
        grown.embedding_fingerprint = (
            self.embedding_fingerprint if embedding_fingerprint is None else embedding_fingerprint
        )
        return grown

    def retire(self, item_ids: Iterable, free_codes: bool = False) -> ItemCatalogue:
        """
        The catalogue with items that are not generated any more. They keep their indices and codes, so that histories with them are
        read as before and no other item takes their codes; [`restore`] brings them back.

        Args:
            item_ids: ids of the catalogue; those retired before stay so. Where none changes, the catalogue itself is returned.
            free_codes: drop the items, retired ones too, so that `add` may assign their codes to new items: their ids become unknown,
                in histories too, and the indices of later items decrease.

        Raises:
            KeyError: unknown ids.
            ValueError: no active item would be left.
        """
        named = np.zeros(len(self), dtype=bool)
        named[self.indices(item_ids)] = True
        active = self.active & ~named
        if not (named if free_codes else named & self.active).any():
            return self
        if not active.any():
            raise ValueError(
                f"this would leave none of {self.num_active} active items; a catalogue needs at least one"
            )
        if not free_codes:
            return self._with_active(active)
        moved = np.cumsum(~named) - 1  # the new index of each item that stays
        id_order, code_order = (moved[order[~named.take(order)]] for order in (self._id_order, self._code_order))
        popularity = None if self.popularity is None else self.popularity[~named]
        return self._next(self._keys[~named], self.codes[~named], active[~named], popularity, id_order, code_order)

    def restore(self, item_ids: Iterable) -> ItemCatalogue:
        """
        The catalogue with retired items active again; those that are active stay so. Where none changes, the catalogue itself is
        returned.

        Raises:
            KeyError: unknown ids; `retire(..., free_codes=True)` makes them so, and [`add`] takes them as new items.
        """
        active = self.active.copy()
        active[self.indices(item_ids)] = True
        return self if (active == self.active).all() else self._with_active(active)

    def with_popularity(self, popularity) -> ItemCatalogue:
        """
        The catalogue with other interaction counts. Its items are the same, so `version` and `hash` stay.

        Args:
            popularity: (N,) interaction counts, or `None`.

        Raises:
            ValueError: another number of counts.
        """
        changed = copy(self)
        changed.popularity = check_popularity(popularity, len(self))
        if changed.popularity is not None:
            changed.popularity.flags.writeable = False
        return changed

    def _with_active(self, active: np.ndarray) -> ItemCatalogue:
        return self._next(self._keys, self.codes, active, self.popularity, self._id_order, self._code_order)

    def diff(self, other: ItemCatalogue) -> CatalogueDiff:
        """
        What changed from this catalogue to `other`. Between codebooks of different sizes, every item is recoded.

        Raises:
            TypeError: ids of the other type.
        """
        if other.id_type != self.id_type:
            raise TypeError(f"one catalogue has {self.id_type} ids, the other {other.id_type} ids: none is in both")
        there = find_keys(other._keys, other._id_order, self._keys)
        common = np.flatnonzero(there >= 0)
        there_too = there[common]
        added = np.ones(len(other), dtype=bool)
        added[there_too] = False
        before, after = self.active[common], other.active[there_too]
        if self.codebook_sizes == other.codebook_sizes:
            recoded = common[(self.codes[common] != other.codes[there_too]).any(1)]
        else:
            recoded = common
        return CatalogueDiff(
            added=other.ids(np.flatnonzero(added)),
            removed=self.ids(np.flatnonzero(there < 0)),
            retired=self.ids(common[before & ~after]),
            restored=self.ids(common[~before & after]),
            recoded=self.ids(recoded),
        )

    def _next(self, *arrays) -> ItemCatalogue:
        """The next version, with these arrays."""
        changed = object.__new__(type(self))
        changed.id_type, changed.codebook_sizes = self.id_type, self.codebook_sizes
        changed._hold(*arrays)
        changed.embedding_fingerprint = self.embedding_fingerprint
        changed._lineage, changed._hash = (*self._lineage, self.hash), None
        return changed

    def save(self, path: str | os.PathLike) -> None:
        """Writes the catalogue as one safetensors file: to a temporary name first, then renamed. `path` may be the file it came from."""
        metadata = {
            "id_type": self.id_type,
            "codebook_sizes": ",".join(map(str, self.codebook_sizes)),
            "hash": self.hash,
            "lineage": ",".join(self._lineage),
            "embedding_fingerprint": self.embedding_fingerprint,
        }
        arrays = {
            "item_ids": self._keys,
            "codes": self.codes,
            "active": self.active,
            "id_order": self._id_order,
            "code_order": self._code_order,
        }
        if self.popularity is not None:
            arrays["popularity"] = self.popularity
        write_catalogue_file(path, arrays, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> ItemCatalogue:
        """
        Maps a catalogue file: its header is checked, its arrays are read when they are used. [`verify`] checks them too.

        Raises:
            ValueError: the file is cut short, is no catalogue, or is of another version.
        """
        arrays, metadata = read_catalogue_file(path)
        catalogue = object.__new__(cls)  # the constructor's checks held when the file was written
        catalogue.id_type = metadata["id_type"]
        catalogue.codebook_sizes = [int(size) for size in metadata["codebook_sizes"].split(",")]
        catalogue._hold(
            arrays["item_ids"],
            arrays["codes"],
            arrays["active"],
            arrays.get("popularity"),
            arrays["id_order"],
            arrays["code_order"],
        )
        catalogue.embedding_fingerprint = metadata["embedding_fingerprint"]
        catalogue._lineage = tuple(filter(None, metadata["lineage"].split(",")))
        catalogue._hash = metadata["hash"]
        return catalogue

    def verify(self) -> None:
        """
        Checks everything that loading takes from the file: sorts ids and codes anew and computes the hash (seconds for millions of
        items).

        Raises:
            ValueError: the arrays are not those that the catalogue was saved with.
        """
        check_codes(self.codes, len(self), self.codebook_sizes)
        decode_ids(self._keys)
        id_order, code_order = sorted_orders(np.array(self._keys), self.codes, self.codebook_sizes)
        same = np.array_equal(id_order, self._id_order) and np.array_equal(code_order, self._code_order)
        if not same or self._digest() != self.hash:
            raise ValueError("the catalogue does not match its hash: its file was damaged; copy or download it again")

    @classmethod
    def find(cls, repo: str | os.PathLike, **kwargs) -> ItemCatalogue | None:
        """The catalogue of a local folder or Hub repository, or `None` where it holds none. Takes `from_pretrained`'s hub arguments."""
        path = find_file(repo, CATALOGUE_NAME, **kwargs)
        return None if path is None else cls.load(path)


__all__ = ["CATALOGUE_NAME", "CatalogueDiff", "CatalogueTable", "ItemCatalogue"]
