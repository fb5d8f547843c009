"""What a log says about each item before a period: impressions, and per objective how much more feedback than expected."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PRIOR = 2.0  # expected feedback that is added to both sides of a ratio, so that rarely shown items stay near 1


@dataclass(frozen=True, eq=False)
class ItemStatistics:
    """
    Counts of impressions and feedback per item over one or several logs. Feedback is compared with what the log's mean rate would give for as
    many impressions, so logs with different rates (days, pages, surfaces) may be added.

    Args:
        shown: (items,) impressions.
        observed, expected: (items, objectives) sums of feedback values, and the mean rate times the impressions with a known value.

    Example:
        >>> log = ItemStatistics.count([0, 0, 1], [[1.0], [1.0], [0.0]], num_items=3)
        >>> log.features().astype(float).round(2).tolist()  # the third item was never shown
        [[0.41, 0.18], [0.0, -0.29], [-0.69, 0.0]]
        >>> (log + log).shown.tolist()
        [4.0, 2.0, 0.0]
    """

    shown: np.ndarray
    observed: np.ndarray
    expected: np.ndarray

    @classmethod
    def count(cls, items, values, num_items: int) -> ItemStatistics:
        """
        Counts a log.

        Args:
            items: (rows,) item indices.
            values: (rows, objectives) feedback, NaN where unknown.
        """
        items, values = np.asarray(items, dtype=np.int64), np.asarray(values, dtype=np.float64)
        known = ~np.isnan(values)
        filled = np.where(known, values, 0.0)
        mean = filled.sum(0) / np.maximum(known.sum(0), 1)
        shown, *sums = (
            np.bincount(items, weights=column, minlength=num_items)
            for column in (np.ones(len(items)), *filled.T, *known.T)
        )
        half = values.shape[1]
        return cls(shown, np.stack(sums[:half], axis=1), np.stack(sums[half:], axis=1) * mean)

    def __add__(self, other: ItemStatistics) -> ItemStatistics:
        return ItemStatistics(self.shown + other.shown, self.observed + other.observed, self.expected + other.expected)

    @property
    def known(self) -> np.ndarray:
        """(objectives,) whether the logs have any feedback for the objective."""
        return self.observed.sum(0) > 0

    def features(self, objectives: np.ndarray | None = None) -> np.ndarray:
        """
        (items, 1 + objectives) float32: log of the impressions over the mean number of impressions (1 is added to both), and per objective log of
        observed over expected feedback. An item that was never shown has ratios of 1.

        Args:
            objectives: (objectives,) bool, which ones to return; all by default.
        """
        ratio = np.log((self.observed + PRIOR) / (self.expected + PRIOR))
        ratio = ratio if objectives is None else ratio[:, objectives]
        exposure = np.log((self.shown + 1) / (self.shown.mean() + 1))
        return np.concatenate([exposure[:, None], ratio], axis=1).astype(np.float32)
