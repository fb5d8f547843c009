"""Baselines without trained weights: popularity and item-to-item nearest neighbours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse

if TYPE_CHECKING:
    from typing import Self

# Entries of one dense (users, items) or (items, items) block; 2**22 float64 are 32 MiB.
_BLOCK_ENTRIES = 2**22


class RankingBaseline(ABC):
    """
    Scores every item for every history and ranks them. Ties go to the more popular item, then to the lower index.

    Subclasses see items numbered by that order ("ranks": 0 is the most popular), so that a tie goes to the lower rank.

    Example:
        >>> class Unpopularity(RankingBaseline):
        ...     settings = {}
        ...     def _fit(self, interactions): ...
        ...     def _restore(self, arrays): ...
        ...     def _score(self, ranks, lengths):
        ...         return np.tile(np.arange(self.num_items, dtype=float), (len(lengths), 1))
        >>> Unpopularity().fit([[0, 1], [0]], num_items=3).recommend([[0]], k=2)
        array([[2, 1]])
    """

    num_items: int | None = None

    def fit(self, sequences: Sequence, num_items: int) -> Self:
        """
        Fits the training interactions.

        Args:
            sequences: one 1-D integer array of item indices per user, oldest first.
            num_items: size of the catalogue.

        Returns:
            The baseline.

        Raises:
            ValueError: no sequences, an empty one, or an index outside `0..num_items - 1`.

        Example:
            >>> PopularityBaseline().fit([[0, 2], [2]], num_items=4).popularity
            array([1, 0, 2, 0])
        """
        rows, lengths = _flatten(sequences, "sequences", num_items)
        if len(lengths) == 0:
            raise ValueError("sequences is empty: pass at least one")
        if (lengths == 0).any():
            raise ValueError(
                f"sequences[{np.argmin(lengths)}] is empty ({np.sum(lengths == 0)} such of {len(lengths)}): drop these users"
            )
        self._number(np.bincount(rows, minlength=num_items))
        self._fit(self._user_items(self._rank_of_row[rows], lengths))
        return self

    def _number(self, popularity: np.ndarray) -> None:
        """Numbers the items by popularity."""
        self.num_items, self.popularity = len(popularity), popularity
        self._row_of_rank = np.argsort(-popularity, kind="stable")
        self._rank_of_row = np.empty_like(self._row_of_rank)
        self._rank_of_row[self._row_of_rank] = np.arange(len(popularity))

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments that make such a baseline."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What `fit` computed, for saving."""
        return {"popularity": self.popularity}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> Self:
        """
        The baseline as if it were fitted, from the [`arrays`] of one.

        Raises:
            ValueError, KeyError: other arrays.

        Example:
            >>> fitted = ItemKNNBaseline().fit([[0, 1], [2, 1]], num_items=3)
            >>> ItemKNNBaseline().restore(fitted.arrays()).recommend([[0]], k=1)
            array([[1]])
        """
        popularity = arrays["popularity"]
        if popularity.ndim != 1 or popularity.dtype != np.int64 or (popularity < 0).any():
            raise ValueError("popularity must hold a count for each item")
        self._number(popularity)
        self._restore(arrays)
        return self

    def recommend(
        self, histories: Sequence, k: int, exclude_seen: bool = True, active: np.ndarray | None = None
    ) -> np.ndarray:
        """
        The k best items for each history. Memory stays bounded: users are scored in blocks.

        Args:
            histories: n 1-D integer arrays of item indices, oldest first. An empty history gets the most popular items.
            k: items per history, at least 1.
            exclude_seen: leave out every item of the history.
            active: (items,) bool, false for retired items, which are in no ranking; all are ranked when not given.

        Returns:
            (n, k) int64 item indices, best first, -1 where fewer than k items remain.

        Raises:
            RuntimeError: before `fit`.
            ValueError: k < 1, or an index outside the catalogue.

        Example:
            >>> baseline = PopularityBaseline().fit([[0, 2], [2], [2, 0, 1]], num_items=3)
            >>> baseline.recommend([[2], [0, 1]], k=2)
            array([[ 0,  1],
                   [ 2, -1]])
        """
        return self.top_items(histories, k, histories if exclude_seen else None, active=active)[0]

    def top_items(
        self,
        histories: Sequence,
        k: int,
        exclude: Sequence | None = None,
        allow: Sequence | None = None,
        active: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        `recommend` with lists of items to leave out and to choose from, and with scores.

        Args:
            histories: as for `recommend`.
            k: items per history, at least 1.
            exclude: n 1-D integer arrays of item indices to leave out.
            allow: n 1-D integer arrays of the only item indices to choose from.
            active: as for `recommend`.

        Returns:
            (n, k) int64 item indices, best first, -1 where fewer than k items remain; and (n, k) float64 scores, -inf there.

        Raises:
            RuntimeError: before `fit`.
            ValueError: k < 1, or an index outside the catalogue.

        Example:
            >>> baseline = PopularityBaseline().fit([[0, 2], [2], [2, 0, 1]], num_items=3)
            >>> indices, scores = baseline.top_items([[2]], k=2, exclude=[[2]], allow=[[1, 2]])
            >>> indices.tolist(), scores.tolist()
            ([[1, -1]], [[1.0, -inf]])
        """
        if self.num_items is None:
            raise RuntimeError(f"{type(self).__name__} is not fitted: call fit(sequences, num_items) before recommend")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        ranks, ends = self._ranks(histories, "histories")
        lists = {
            name: self._ranks(some, name)
            for name, some in (("exclude", exclude), ("allow", allow))
            if some is not None
        }
        users = len(ends) - 1
        indices, values = np.full((users, k), -1, dtype=np.int64), np.full((users, k), -np.inf)
        depth = min(k, self.num_items)
        block = max(1, _BLOCK_ENTRIES // self.num_items)
        for start in range(0, users, block):
            stop = min(start + block, users)
            scores = self._score(ranks[ends[start] : ends[stop]], np.diff(ends[start : stop + 1]))
            if active is not None:
                scores[:, ~active[self._row_of_rank]] = -np.inf
            if "allow" in lists:
                shut = np.ones(scores.shape, dtype=bool)
                shut[_places(*lists["allow"], start, stop)] = False
                scores[shut] = -np.inf
            if "exclude" in lists:
                scores[_places(*lists["exclude"], start, stop)] = -np.inf
            best = _top(scores, depth)
            found = np.take_along_axis(scores, best, axis=1)
            indices[start:stop, :depth] = np.where(found > -np.inf, self._row_of_rank[best], -1)
            values[start:stop, :depth] = found
        return indices, values

    def _ranks(self, lists: Sequence, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The lists' items by rank, one list after the other, and where each begins."""
        assert self.num_items is not None
        rows, lengths = _flatten(lists, name, self.num_items)
        return self._rank_of_row[rows], np.concatenate([[0], np.cumsum(lengths)])

    @abstractmethod
    def _fit(self, interactions: scipy.sparse.csr_array) -> None:
        """`interactions`: (users, items by rank), 1.0 where the user has the item."""

    @abstractmethod
    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """What `_fit` sets, from [`arrays`]."""

    @abstractmethod
    def _score(self, ranks: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Fresh (users, items by rank) float64 scores; `ranks` holds the users' histories one after the other."""

    def _user_items(self, ranks: np.ndarray, lengths: np.ndarray) -> scipy.sparse.csr_array:
        starts = np.concatenate([[0], np.cumsum(lengths)])
        # A copy: `sum_duplicates` works in place, and the caller still needs `ranks`.
        entries = (np.ones(len(ranks)), ranks.copy(), starts)
        matrix = scipy.sparse.csr_array(entries, shape=(len(lengths), self.num_items))
        matrix.sum_duplicates()
        matrix.data[:] = 1.0
        return matrix


class PopularityBaseline(RankingBaseline):
    """
    Recommends the items with the most training interactions (repetitions count), the same for everyone but for the items seen.

    Example:
        >>> PopularityBaseline().fit([[3, 1], [1]], num_items=4).recommend([[], [1]], k=2)
        array([[1, 3],
               [3, 0]])
    """

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def _fit(self, interactions: scipy.sparse.csr_array) -> None:
        self._restore(self.arrays())

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._counts = self.popularity[self._row_of_rank].astype(np.float64)

    def _score(self, ranks: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.tile(self._counts, (len(lengths), 1))


class ItemKNNBaseline(RankingBaseline):
    """
    Item-to-item nearest neighbours over the binary user-item matrix: an item's score is the sum of its similarities to the
    distinct items of the history. With c_ij users in common and n_i users of item i, cosine is c_ij / (sqrt(n_i n_j) + shrinkage).
    Items without a similarity to the history score 0 and follow by popularity.

    Args:
        num_neighbors: most similar items of each history item that count; None counts all.
        similarity: `"cosine"`.
        shrinkage: added to the denominator; damps similarities of few common users.
        last_n: latest interactions of a history that count (all are still excluded as seen); None counts all.

    Raises:
        ValueError: an unknown similarity, `num_neighbors` or `last_n` below 1, a negative shrinkage.

    Example:
        >>> baseline = ItemKNNBaseline(last_n=1).fit([[0, 1], [0, 1], [2, 3]], num_items=4)
        >>> baseline.recommend([[2, 0], [3]], k=2)
        array([[1, 3],
               [2, 0]])
    """

    def __init__(
        self,
        num_neighbors: int | None = None,
        similarity: str = "cosine",
        shrinkage: float = 0.0,
        last_n: int | None = None,
    ):
        if similarity != "cosine":
            raise ValueError(f"similarity must be 'cosine', got {similarity!r}")
        if num_neighbors is not None and num_neighbors < 1:
            raise ValueError(f"num_neighbors must be at least 1 or None, got {num_neighbors}")
        if last_n is not None and last_n < 1:
            raise ValueError(f"last_n must be at least 1 or None, got {last_n}")
        if shrinkage < 0:
            raise ValueError(f"shrinkage must not be negative, got {shrinkage}")
        self.num_neighbors = num_neighbors
        self.similarity = similarity
        self.shrinkage = shrinkage
        self.last_n = last_n

    def _fit(self, interactions: scipy.sparse.csr_array) -> None:
        num_items = len(self.popularity)
        users = np.bincount(interactions.indices, minlength=num_items)
        item_users = interactions.T.tocsr()
        block = max(1, _BLOCK_ENTRIES // num_items)
        blocks = []
        for start in range(0, num_items, block):
            common = (item_users[start : start + block] @ interactions).tocoo()
            items, others = common.coords
            similarities = common.data / (np.sqrt(users[items + start] * users[others]) + self.shrinkage)
            keep = np.flatnonzero(items + start != others)
            if self.num_neighbors is not None:
                keep = keep[np.lexsort((others[keep], -similarities[keep], items[keep]))]
                counts = np.bincount(items[keep], minlength=common.shape[0])
                places = np.arange(len(keep)) - np.repeat(np.cumsum(counts) - counts, counts)
                keep = keep[places < self.num_neighbors]
            pairs = (items[keep], others[keep])
            blocks.append(scipy.sparse.csr_array((similarities[keep], pairs), shape=common.shape))
        self._similarities = scipy.sparse.vstack(blocks, format="csr")

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_neighbors", "similarity", "shrinkage", "last_n")}

    def arrays(self) -> dict[str, np.ndarray]:
        """What `fit` computed, for saving: the popularity, and the similarities between items by rank as a sparse matrix."""
        found: Any = self._similarities
        parts = {
            "values": found.data,
            "others": found.indices.astype(np.int64),
            "starts": found.indptr.astype(np.int64),
        }
        return {**super().arrays(), **parts}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        assert self.num_items is not None
        values, others, starts = (arrays[name] for name in ("values", "others", "starts"))
        whole = starts.shape == (self.num_items + 1,) and starts[0] == 0 and (np.diff(starts) >= 0).all()
        if not (
            whole and values.ndim == 1 and values.shape == others.shape == (starts[-1],) and np.isfinite(values).all()
        ):
            raise ValueError("values, others and starts are no sparse matrix")
        if len(others) and not 0 <= others.min() <= others.max() < self.num_items:
            raise ValueError(f"others must lie between 0 and {self.num_items - 1}")
        shape = (self.num_items, self.num_items)
        self._similarities = scipy.sparse.csr_array((values, others, starts), shape=shape)

    def _score(self, ranks: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if self.last_n is not None:
            from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(ranks))
            ranks, lengths = ranks[from_end <= self.last_n], np.minimum(lengths, self.last_n)
        scores = self._user_items(ranks, lengths) @ self._similarities
        # Equal sums in another order differ in the last bits: rounding makes them ties again.
        return scipy.sparse.csr_array(scores).toarray().round(12)


def _places(ranks: np.ndarray, ends: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the entries that the lists of users `start` to `stop` name in a block of scores."""
    return np.repeat(np.arange(stop - start), np.diff(ends[start : stop + 1])), ranks[ends[start] : ends[stop]]


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """(n, k) columns of each row's k highest scores, best first; equal scores in column order, at the k-th place too."""
    kth = np.partition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k, None]
    above, tied = scores > kth, scores == kth
    missing = k - above.sum(axis=1, keepdims=True)
    columns = np.nonzero(above | (tied & (np.cumsum(tied, axis=1) <= missing)))[1].reshape(-1, k)
    order = np.argsort(-np.take_along_axis(scores, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


def _flatten(sequences: Sequence, name: str, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """All indices one after the other (int64), and the length of each sequence."""
    arrays = [np.asarray(sequence) for sequence in sequences]
    for number, array in enumerate(arrays):
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(
                f"{name}[{number}]: expected a 1-D integer array of item indices, got shape {array.shape} of {array.dtype}"
            )
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    rows = np.concatenate([np.empty(0, dtype=np.int64), *(array.astype(np.int64) for array in arrays)])
    outside = np.flatnonzero((rows < 0) | (rows >= num_items))
    if len(outside):
        number = np.searchsorted(np.cumsum(lengths), outside[0], side="right")
        raise ValueError(
            f"{name}[{number}] holds index {rows[outside[0]]}, outside 0..{num_items - 1} "
            f"({len(outside)} such entries of {len(rows)}): num_items must be the size of the catalogue"
        )
    return rows, lengths
