"""
What is older than `max_history` (technical report, arXiv 2506.13695, section 2.2): a processor compresses it to clusters of similar items, by hierarchical
k-means over the items' vectors, and saves the vectors beside the catalogue.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import numpy as np

from .files import find_file, read_of_catalogue, save_of_catalogue, short

if TYPE_CHECKING:
    from .catalogue import ItemCatalogue

LIFELONG_NAME = "lifelong.safetensors"
FORMAT, VERSION = "onerec-lifelong", "1"
_ROUNDS = 5  # of k-means in a split: its parts are split again, and their borders need not be exact


def compress_history(vectors: np.ndarray, most: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """
    Hierarchical k-means of a history's items: the largest cluster is split into the cube root of its size until `most` are there.

    Args:
        vectors: (items, width) finite floats, oldest item first.
        most: number of clusters; a history that is not longer stays as it is.
        seed: of the first centres.

    Returns:
        (clusters,) int64 places of the items that are closest to their clusters' centres, in order of time, and (clusters,) int64 sizes. Items with equal
        vectors are never apart while `most` allows it.

    Raises:
        ValueError: vectors that are no (items, width) table of finite numbers, or `most` below 1.

    Example:
        >>> places, sizes = compress_history(np.array([[0.0], [9.0], [0.1], [9.1], [0.2]]), most=2)
        >>> places.tolist(), sizes.tolist()
        ([2, 3], [3, 2])
    """
    vectors = np.asarray(vectors, np.float32)
    if most < 1 or vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError(
            f"compress_history needs finite vectors (items, width) and most >= 1; got {vectors.shape} and {most}"
        )
    if len(vectors) <= most:
        return np.arange(len(vectors)), np.ones(len(vectors), np.int64)
    random = np.random.default_rng(seed)
    clusters, done = [(-len(vectors), 0, np.arange(len(vectors)))], []
    number = 1
    while clusters and len(clusters) + len(done) < most:
        _, _, members = heappop(clusters)
        ways = min(max(2, round(len(members) ** (1 / 3))), most - len(clusters) - len(done))
        parts = _split(vectors[members], ways, random) if len(members) > 1 else []
        if len(parts) < 2:  # all of them are equal
            done.append(members)
            continue
        for part in parts:
            heappush(clusters, (-len(part), number, members[part]))
            number += 1
    found = [members for _, _, members in clusters] + done
    places = np.array([members[_closest(vectors[members])] for members in found])
    order = np.argsort(places)
    return places[order], np.array([len(members) for members in found])[order]


def _split(vectors: np.ndarray, ways: int, random: np.random.Generator) -> list[np.ndarray]:
    """Places of the members of each part that is not empty."""
    distinct = np.unique(vectors, axis=0) if len(vectors) <= 4 * ways else vectors
    centres = distinct[random.choice(len(distinct), min(ways, len(distinct)), replace=False)]
    if len(vectors) > 4 * ways and (centres == centres[0]).all():  # drawn equal: another item, if there is one
        others = np.flatnonzero((vectors != centres[0]).any(1))
        if not len(others):
            return []
        centres[1] = vectors[others[0]]
    own = np.zeros(len(vectors), np.int64)
    for _ in range(_ROUNDS):
        distance = np.square(centres).sum(1) - 2 * vectors @ centres.T
        own = distance.argmin(1)
        used = np.unique(own)
        centres = np.stack([vectors[own == each].mean(0) for each in used])
        own = np.searchsorted(used, own)
    return [np.flatnonzero(own == each) for each in range(len(centres))]


def _closest(vectors: np.ndarray) -> int:
    """The last of the members that are closest to the centre."""
    distance = np.square(vectors - vectors.mean(0)).sum(1)
    return len(vectors) - 1 - int(distance[::-1].argmin())


@dataclass(frozen=True, eq=False)
class LifelongHistory:
    """
    Compresses what a history has beyond its latest items.

    Args:
        vectors: (items, width) float16, in the order of item indices: content, or whatever says which items are alike.
        items: clusters of a compressed history ([`LifelongConfig`]).
        queries: states of the pathway in the encoder.
        pools_items: `config.encoder_pools_items`: a state is a whole item's place, otherwise a token's.
        longest: items of a history that are read at all, the latest ones.

    Example:
        >>> lifelong = LifelongHistory(np.eye(3, dtype=np.float16), items=2, queries=4)
        >>> rows, sizes, counts = lifelong.compressed(np.array([0, 0, 1, 2]), np.array([3, 1]))
        >>> rows.tolist(), sizes.tolist(), counts.tolist()  # the first user's items 0, 0 and 1, the second's item 2
        ([0, 1, 2], [2, 1, 1], [2, 1])
    """

    vectors: np.ndarray
    items: int = 2000
    queries: int = 128
    longest: int = 100_000
    pools_items: bool = False

    def places_of(self, tokens_per_item: int) -> int:
        """Places of items that the pathway's states take."""
        return self.queries if self.pools_items else self.queries // tokens_per_item

    def compressed(self, rows: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Items and sizes of the clusters of ragged histories, one after another, and the number of clusters of each.

        Warns:
            UserWarning: items beyond the `longest` latest ones, which are left out.
        """
        if (beyond := np.maximum(lengths - self.longest, 0)).any():
            warnings.warn(
                f"left out the oldest {int(beyond.sum()):,} items of {int((beyond > 0).sum()):,} of {len(lengths):,} histories: a lifelong pathway reads "
                f"{self.longest:,} items"
            )
        found, sizes, counts = [], [], []
        for own in np.split(rows, np.cumsum(lengths)[:-1]):
            own = own[-self.longest :]
            places, size = compress_history(self.vectors[own], self.items)
            found.append(own[places]), sizes.append(size), counts.append(len(places))
        return np.concatenate(found), np.concatenate(sizes), np.array(counts)

    def save(self, path: str | os.PathLike, catalogue_hash: str) -> None:
        """Writes the vectors and sizes: to a temporary name first, then renamed."""
        sizes = {name: str(int(getattr(self, name))) for name in ("items", "queries", "longest", "pools_items")}
        tensors = {"vectors": np.ascontiguousarray(self.vectors, np.float16)}
        save_of_catalogue(path, tensors, FORMAT, VERSION, catalogue_hash, **sizes)

    @classmethod
    def load(cls, path: str | os.PathLike, catalogue: ItemCatalogue) -> LifelongHistory:
        """
        Raises:
            ValueError: the file is damaged, is of another version, or belongs to another catalogue.
        """
        tensors, metadata = read_of_catalogue(path, "lifelong history", FORMAT, VERSION, catalogue.hash)
        try:
            items, queries, longest = (int(metadata[name]) for name in ("items", "queries", "longest"))
            vectors = tensors["vectors"]
            if vectors.dtype != np.float16 or vectors.ndim != 2 or len(vectors) != len(catalogue):
                raise ValueError(f"vectors are {vectors.dtype} of shape {vectors.shape}")
            if min(items, queries, longest) < 1 or not np.isfinite(vectors).all():
                raise ValueError("sizes below 1, or vectors that are not finite")
        except (ValueError, KeyError) as error:
            raise ValueError(f"{os.fspath(path)} is damaged ({short(error)}); copy or download it again") from error
        return cls(vectors, items, queries, longest, metadata.get("pools_items") == "1")

    @classmethod
    def find(cls, repo: str | os.PathLike, catalogue: ItemCatalogue, **kwargs) -> LifelongHistory | None:
        """Of a local folder or Hub repository, or `None` where it holds none. Takes `from_pretrained`'s hub arguments."""
        path = find_file(repo, LIFELONG_NAME, **kwargs)
        return None if path is None else cls.load(path, catalogue)


__all__ = ["LIFELONG_NAME", "LifelongHistory", "compress_history"]
