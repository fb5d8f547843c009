"""
The reward model of the simulator: a logistic regression of what was watched in a log, on what a recommender sees. It is cheap, and it errs as reward models
do: tastes are guessed from few watched items, an item's appeal from few impressions, and fatigue adds to the logit where in truth it multiplies the rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_IMPRESSIONS = 20  # by which an item's rate is drawn towards the mean


class LoggedReward:
    """
    Expected share of a session that is watched.

    Args:
        items: (items, d) unit vectors of their contents.
        log: per row the history, the session shown (item indices), and which of its items were watched.

    Example:
        >>> items = np.eye(4)
        >>> log = [([0], [0, 1], [True, False]), ([1], [1, 0], [True, False])] * 50
        >>> model = LoggedReward(items, log)
        >>> model.score([[0]], [[0, 1]])[0] > model.score([[0]], [[1, 2]])[0]
        True
    """

    def __init__(self, items: np.ndarray, log: Sequence[tuple[Sequence[int], Sequence[int], Sequence[bool]]]):
        self._items = items
        shown = np.concatenate([np.asarray(session, dtype=int) for _, session, _ in log])
        watched = np.concatenate([np.asarray(seen, dtype=float) for _, _, seen in log])
        mean, count = watched.mean(), np.bincount(shown, minlength=len(items))
        rate = (np.bincount(shown, watched, len(items)) + _IMPRESSIONS * mean) / (count + _IMPRESSIONS)
        self._appeal = np.log(rate / (1 - rate))
        rows = np.concatenate([self._features(history, session) for history, session, _ in log])
        self._centre, self._scale = rows.mean(0), rows.std(0) + 1e-9
        self._weights = _logistic(self._standard(rows), watched)

    def _features(self, history: Sequence[int], session: Sequence[int]) -> np.ndarray:
        """(positions, 5): likeness to the history's mean and to its nearest item, the item's own rate, likeness to earlier items, and the position."""
        own, past = self._items[np.asarray(session, dtype=int)], self._items[np.asarray(history, dtype=int)]
        likeness = own @ past.T if len(past) else np.zeros((len(own), 1))
        earlier = (np.maximum(np.tril(own @ own.T, -1), 0.0) ** 2).sum(1)
        return np.stack(
            [
                likeness.mean(1),
                likeness.max(1),
                self._appeal[np.asarray(session, dtype=int)],
                earlier,
                np.arange(len(own)),
            ],
            axis=1,
        )

    def _standard(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([(rows - self._centre) / self._scale, np.ones((len(rows), 1))], axis=1)

    def score(self, histories: Sequence[Sequence[int]], sessions: Sequence[Sequence[int]]) -> np.ndarray:
        """(sessions,) expected shares."""
        rows = [self._features(*each) for each in zip(histories, sessions, strict=True)]
        rates = 1 / (1 + np.exp(-self._standard(np.concatenate(rows)) @ self._weights))
        ends = np.cumsum([len(each) for each in rows])
        return np.array([part.mean() for part in np.split(rates, ends[:-1])])


def _logistic(rows: np.ndarray, labels: np.ndarray, ridge: float = 1.0, steps: int = 20) -> np.ndarray:
    """The weights of a logistic regression, by Newton's method."""
    weights = np.zeros(rows.shape[1])
    for _ in range(steps):
        rates = 1 / (1 + np.exp(-rows @ weights))
        curvature = (rows * (rates * (1 - rates))[:, None]).T @ rows + ridge * np.eye(len(weights))
        weights += np.linalg.solve(curvature, rows.T @ (labels - rates) - ridge * weights)
    return weights
