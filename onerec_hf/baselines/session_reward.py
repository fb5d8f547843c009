"""Baselines of the reward model: logistic regression on the same item features, and the base rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def session_features(
    features: np.ndarray, histories: Sequence[np.ndarray], sessions: Sequence[np.ndarray]
) -> np.ndarray:
    """
    A session for a user as one row: mean features of the session's items, of the history's, their product, and the two lengths (history: log(1 + n)).

    Args:
        features: (N, d) item features.
        histories, sessions: item indices; a history may be empty (zeros).

    Returns:
        (sessions, 3 * d + 2) float32.

    Example:
        >>> session_features(np.eye(2), [np.array([0])], [np.array([0, 1])])[0, :7].tolist()
        [0.5, 0.5, 1.0, 0.0, 0.5, 0.0, 2.0]
    """
    session, history = _means(features, sessions), _means(features, histories)
    lengths = np.stack([[len(s) for s in sessions], np.log1p([len(h) for h in histories])], axis=1)
    return np.concatenate([session, history, session * history, lengths], axis=1).astype(np.float32)


def _means(features: np.ndarray, lists: Sequence[np.ndarray]) -> np.ndarray:
    lengths = np.array([len(rows) for rows in lists])
    flat = np.concatenate([np.asarray(rows, dtype=np.int64) for rows in lists])
    ends = np.cumsum(lengths)
    sums = np.concatenate([np.zeros((1, features.shape[1])), np.cumsum(features[flat], axis=0, dtype=np.float64)])
    return (sums[ends] - sums[ends - lengths]) / np.maximum(lengths, 1)[:, None]


def predict_baseline(
    kind: str, train_features: np.ndarray, train_labels: np.ndarray, features: np.ndarray
) -> np.ndarray:
    """
    Probabilities of one baseline, fitted per objective. A label y in [0, 1] counts as a positive with weight y and a negative with weight 1 - y: the
    cross-entropy that the reward model minimises. Classes are not reweighted, so that predictions stay rates.

    Args:
        kind: "base_rate", or "logistic_regression" (standardised features, L2 with C=0.01).
        train_features: (n, d). train_labels: (n, K), NaN where missing.
        features: (m, d) to predict.

    Returns:
        (m, K) float64.

    Raises:
        ValueError: another kind.

    Example:
        >>> predict_baseline("base_rate", np.zeros((2, 1)), np.array([[0.0], [1.0]]), np.zeros((1, 1))).tolist()
        [[0.5]]
    """
    if kind not in ("base_rate", "logistic_regression"):
        raise ValueError(f"kind must be base_rate or logistic_regression; got {kind!r}")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    columns = []
    for label in train_labels.T:
        known = ~np.isnan(label)
        x, y = train_features[known], label[known]
        if kind == "base_rate" or y.max() == 0 or y.min() == 1:
            columns.append(np.full(len(features), y.mean()))
            continue
        twice, target = np.concatenate([x, x]), np.repeat([1, 0], len(x))
        weight = np.concatenate([y, 1 - y])
        used = weight > 0
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        model.fit(twice[used], target[used], logisticregression__sample_weight=weight[used])
        columns.append(model.predict_proba(features)[:, 1])
    return np.stack(columns, axis=1)
