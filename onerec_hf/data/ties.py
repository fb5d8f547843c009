"""Ties in time: how many held-out items are the last of their user only by the order of the table's rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from onerec_hf.data.sequences import UserSequences

#: Share of tied neighbours with ascending (or descending) item ids, from which the table is sorted by item and its order means nothing.
IN_ORDER = 0.9
# Fewer tied neighbours are in order by chance.
_FEWEST = 10
# Share of the test targets from which ties are warned of.
_MATTER = 0.01


@dataclass(frozen=True)
class Ties:
    """
    Rows of a user with equal times, in sequences whose last items are held out.

    Args:
        targets: users whose last item is a test target.
        tied: of them, those whose last two items have the same time.
        rows: neighbours with equal times.
        rising: of them, those with ascending item ids.

    Example:
        >>> print(Ties(targets=671, tied=128, rows=21845, rising=21845))
        A tie in time decides 128 of 671 test targets (19.1%); tied rows are sorted by item id (100%), so that "last" means the largest or smallest id.
    """

    targets: int
    tied: int
    rows: int
    rising: int

    @classmethod
    def of(cls, sequences: UserSequences, min_length: int = 3) -> Ties:
        """
        Counts the ties of sequences.

        Args:
            min_length: of the users with a target.

        Example:
            >>> import pandas as pd
            >>> table = pd.DataFrame({"user_id": [1] * 4, "item_id": [5, 6, 7, 8], "timestamp": [0, 1, 2, 2]})
            >>> Ties.of(UserSequences.from_interactions(table)).tied
            1
        """
        same = sequences.tied
        targets = (sequences.offsets[1:] - 1)[sequences.lengths >= min_length]
        before, after = sequences.item_ids[:-1][same[1:]], sequences.item_ids[1:][same[1:]]
        return cls(len(targets), int(same[targets].sum()), int(same.sum()), int((after > before).sum()))

    @classmethod
    def sum(cls, parts: Iterable[Ties]) -> Ties:
        """
        The ties of several sets of users.

        Example:
            >>> Ties.sum([Ties(3, 1, 4, 4), Ties(2, 0, 0, 0)])
            Ties(targets=5, tied=1, rows=4, rising=4)
        """
        counts = [(part.targets, part.tied, part.rows, part.rising) for part in parts]
        return cls(*np.sum(counts, axis=0).tolist()) if counts else cls(0, 0, 0, 0)

    @property
    def in_order(self) -> float:
        """Share of the neighbours with equal times that have ascending item ids, or descending ones if that is more."""
        return max(self.rising, self.rows - self.rising) / self.rows if self.rows else 0.0

    @property
    def share(self) -> float:
        """Share of the test targets that a tie decides."""
        return self.tied / self.targets if self.targets else 0.0

    @property
    def are_sorted(self) -> bool:
        """Whether the table has tied rows in the order of their item ids."""
        return self.in_order >= IN_ORDER and self.rows >= _FEWEST

    @property
    def matter(self) -> bool:
        """Whether the order of the table decides more than a few test targets, and means nothing."""
        return self.are_sorted and self.share >= _MATTER

    def __str__(self) -> str:
        if not self.tied:
            return ""
        text = f"A tie in time decides {self.tied:,} of {self.targets:,} test targets ({self.share:.1%})"
        if self.are_sorted:
            text += f'; tied rows are sorted by item id ({self.in_order:.0%}), so that "last" means the largest or smallest id'
        return text + "."
