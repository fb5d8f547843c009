"""Metrics of predicted rates per objective: AUC, accuracy within users, calibration and log loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def concordance(labels, scores) -> float:
    """
    The share of pairs with different labels that the scores order correctly, ties counting half: the ROC AUC for labels 0 and 1, and its
    generalisation (Harrell's C) for rates.

    Args:
        labels, scores: (n,) numbers.

    Returns:
        NaN if all labels are equal.

    Example:
        >>> concordance([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), round(concordance([0.1, 0.5, 0.9], [1, 2, 2]), 3)
        (0.75, 0.833)
    """
    from scipy.stats import kendalltau, rankdata

    labels, scores = rankdata(labels, "dense"), rankdata(scores, "dense")
    n = len(labels)
    pairs = n * (n - 1) / 2
    tied_labels, tied_scores = (float((c := np.bincount(ranks)) @ (c - 1) / 2) for ranks in (labels, scores))
    if tied_labels == pairs:
        return float("nan")
    if tied_scores == pairs:
        return 0.5
    # tau-b is (concordant - discordant) / sqrt(pairs untied in labels * pairs untied in scores)
    tau: Any = kendalltau(labels, scores)[0]
    difference = float(tau) * np.sqrt((pairs - tied_labels) * (pairs - tied_scores))
    return float(0.5 + difference / (pairs - tied_labels) / 2)


def calibration_error(labels, probabilities, bins: int = 10) -> float:
    """
    Expected calibration error: sessions sorted by prediction are divided into `bins` groups of (almost) equal size; the error is the mean of
    |mean prediction - mean label| over the groups, weighted by size. Equal sizes suit rare objectives, whose predictions are all near zero.

    Compare it with the base rate: at a base rate of 0.001, an error of 0.001 means no calibration.

    Example:
        >>> calibration_error([0, 0, 1, 1], [0.2, 0.2, 0.7, 0.7], bins=2)
        0.25
    """
    groups = calibration_curve(labels, probabilities, bins)
    total = sum(size for *_, size in groups)
    return sum(size / total * abs(predicted - observed) for predicted, observed, size in groups)


def calibration_curve(labels, probabilities, bins: int = 10) -> list[tuple[float, float, int]]:
    """
    The groups of [`calibration_error`]: sessions sorted by prediction, in `bins` groups of (almost) equal size.

    Returns:
        Mean prediction, mean label and number of sessions of each group, in the order of the predictions.

    Example:
        >>> calibration_curve([0, 0, 1, 1], [0.2, 0.2, 0.7, 0.7], bins=2)
        [(0.2, 0.0, 2), (0.7, 1.0, 2)]
    """
    labels, probabilities = np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    groups = np.array_split(np.argsort(probabilities, kind="stable"), min(bins, len(probabilities)))
    return [(float(probabilities[some].mean()), float(labels[some].mean()), len(some)) for some in groups]


def log_loss(labels, probabilities) -> float:
    """
    Mean binary cross-entropy of labels in [0, 1], in nats.

    Example:
        >>> round(log_loss([1, 0.5], [0.5, 0.5]), 4)
        0.6931
    """
    labels = np.asarray(labels, dtype=np.float64)
    p = np.clip(np.asarray(probabilities, dtype=np.float64), 1e-12, 1 - 1e-12)
    return float(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean())


def reward_metrics(
    labels: np.ndarray,
    probabilities: np.ndarray,
    objectives: Sequence[str],
    base_rates: Sequence[float],
    bins: int = 10,
    users: Sequence | np.ndarray | None = None,
) -> dict[str, float]:
    """
    Per objective, over the sessions that have its label:

    - `auc`: see `concordance`.
    - `calibration_error`: see `calibration_error`; `bias`: mean prediction over mean label (NaN if no label is above 0).
    - `relative_log_loss`: cross-entropy relative to a constant prediction of the training base rate (normalised entropy, He et al. 2014); below 1
      the model is better than the base rate.
    - `within_user_accuracy`, with `users`: see `within_group_concordance`; NaN without a user with two different labels.
    - `positives`: number of sessions with a label above 0. The other metrics are noisy if it is small.

    Args:
        labels: (n, K), NaN or -100 for missing labels.
        probabilities: (n, K).
        base_rates: (K,) mean training labels.
        users: (n,) whose session each row is.

    Returns:
        `{"<objective>/<metric>": value}`; objectives without labels are omitted.

    Example:
        >>> found = reward_metrics(np.array([[0.0], [1.0], [-100]]), np.array([[0.2], [0.9], [0.5]]), ["vtr"], [0.5])
        >>> found["vtr/auc"], round(found["vtr/relative_log_loss"], 3), found["vtr/positives"]
        (1.0, 0.237, 1)
    """
    metrics: dict[str, float] = {}
    for k, name in enumerate(objectives):
        known = labels[:, k] >= 0  # neither NaN nor -100
        if not known.any():
            continue
        y, p = labels[known, k], probabilities[known, k]
        metrics[f"{name}/auc"] = concordance(y, p)
        if users is not None:
            metrics[f"{name}/within_user_accuracy"] = within_group_concordance(y, p, np.asarray(users)[known])[0]
        metrics[f"{name}/calibration_error"] = calibration_error(y, p, bins)
        metrics[f"{name}/bias"] = float(p.mean() / y.mean()) if y.mean() > 0 else float("nan")
        metrics[f"{name}/relative_log_loss"] = log_loss(y, p) / log_loss(y, np.full(len(y), base_rates[k]))
        metrics[f"{name}/positives"] = int((y > 0).sum())
    return metrics


def within_group_concordance(labels, scores, groups) -> tuple[float, int]:
    """
    [`concordance`] of pairs within a group, e.g. of sessions of one user. It measures how a reward ranks the candidates of a user, while the
    AUC over all sessions also rewards distinguishing users.

    Args:
        labels, scores, groups: (n,).

    Returns:
        The share of correctly ordered pairs (NaN without pairs), and the number of pairs with different labels.

    Example:
        >>> within_group_concordance([0, 1, 0, 1], [0.1, 0.2, 0.9, 0.8], ["a", "a", "b", "b"])
        (0.5, 2)
    """
    right, pairs = within_group_pairs(labels, scores, groups)
    return (float(right.sum() / pairs.sum()) if pairs.any() else float("nan")), int(pairs.sum())


def within_group_pairs(labels, scores, groups, least: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """
    Per group how many pairs with labels more than `least` apart the scores order correctly, ties counting half, and how many there are. Draws of groups make
    confidence intervals of [`within_group_concordance`].

    Args:
        labels, scores, groups: (n,).

    Returns:
        (groups,) float64 and int64, in the order of the sorted groups.

    Example:
        >>> right, pairs = within_group_pairs([0, 1, 0.1, 0.2], [0.1, 0.2, 0.9, 0.8], ["b", "b", "a", "a"], least=0.1)
        >>> right.tolist(), pairs.tolist()
        ([0.0, 1.0], [0, 1])
    """
    labels, scores, groups = np.asarray(labels), np.asarray(scores), np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(groups)
    right, pairs = np.zeros(len(sizes)), np.zeros(len(sizes), dtype=np.int64)
    of_groups = np.split(np.argsort(groups, kind="stable"), np.cumsum(sizes)[:-1])
    for group in np.flatnonzero(sizes > 1):
        rows = of_groups[group]
        above = labels[rows][:, None] - labels[rows][None] > least
        margins = (scores[rows][:, None] - scores[rows][None])[above]
        right[group] = (margins > 0).sum() + 0.5 * (margins == 0).sum()
        pairs[group] = above.sum()
    return right, pairs
