"""Balanced k-means: cluster sizes differ by at most one, with nearly the error of plain k-means."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from onerec_hf.semantic_ids.balanced_assignment import (
    GAP_ROWS,
    ROWS,
    SOLVER_POINTS,
    CentroidPrices,
    assign_balanced,
    nearest,
)
from onerec_hf.semantic_ids.process_group import SINGLE_PROCESS, SingleProcess, those_in

# Share of final iterations with exact balance. Earlier ones are balanced approximately by prices, at the cost of plain k-means.
_EXACT_SHARE = 0.3


class BalancedKMeans:
    """
    K-means whose clusters all have floor(N / K) or ceil(N / K) points.

    `assignment="optimal"` assigns a price to each centroid so that demand meets capacity ([`CentroidPrices`]); the last iterations (all of
    them for up to 512 points) fill the capacities exactly. `assignment="greedy"` is the paper's Algorithm 1 (arXiv 2502.18965, section
    3.1): each cluster in turn takes the nearest remaining points, so the last clusters get leftovers. If K does not divide N, the first
    N mod K clusters take one more point (the paper does not specify this case).

    Additional memory is linear in N: distances are computed in chunks of rows.

    Args:
        n_clusters: K.
        max_iter: maximum number of iterations.
        tol: converged if at most this share of points changes its cluster; 0 requires no change.
        init: "random" (K distinct rows) or "k-means++" (on a sample of at least 10 K rows).
        assignment: "optimal" or "greedy".
        max_points_per_cluster: the approximate iterations use a sample of this many points per cluster, as faiss does; the exactly balanced
            ones use all points. `None` always uses all.
        seed: seed of the initial centroids and samples. Results are deterministic per seed and device.

    Attributes:
        cluster_centers_: (K, d) float32 means of the clusters. labels_: (N,) int64, the assignment of the best iteration. inertia_: mean
        squared distance of the points to their cluster means. n_iter_: number of iterations.

    Example:
        >>> points = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1]])
        >>> kmeans = BalancedKMeans(2).fit(points)
        >>> kmeans.labels_.bincount().sort().values.tolist()
        [2, 3]
    """

    cluster_centers_: torch.Tensor
    labels_: torch.Tensor
    inertia_: float
    n_iter_: int

    def __init__(
        self,
        n_clusters: int,
        *,
        max_iter: int = 20,
        tol: float = 1e-3,
        init: Literal["random", "k-means++"] = "random",
        assignment: Literal["optimal", "greedy"] = "optimal",
        max_points_per_cluster: int | None = 256,
        seed: int = 0,
    ):
        if n_clusters < 1 or max_iter < 1:
            raise ValueError(f"n_clusters and max_iter must be at least 1; got {n_clusters} and {max_iter}")
        if init not in ("random", "k-means++"):
            raise ValueError(f'init must be "random" or "k-means++"; got {init!r}')
        if assignment not in ("optimal", "greedy"):
            raise ValueError(f'assignment must be "optimal" or "greedy"; got {assignment!r}')
        if max_points_per_cluster is not None and max_points_per_cluster < 1:
            raise ValueError(f"max_points_per_cluster must be at least 1, or None; got {max_points_per_cluster}")
        self.n_clusters, self.max_iter, self.tol, self.init = n_clusters, max_iter, tol, init
        self.assignment, self.max_points_per_cluster, self.seed = assignment, max_points_per_cluster, seed

    def fit(self, points: torch.Tensor | np.ndarray, ranks: SingleProcess = SINGLE_PROCESS) -> BalancedKMeans:
        """
        Clusters (N, d) points, on their device.

        Args:
            ranks: processes that share the points ([`Ranks`]): `points` and `labels_` are this rank's rows, everything else is global. The
                result equals that of one process up to the order of summation. A rank stores its rows and eight bytes per global row (the
                sample order), and receives sums of K or K d numbers; points are sent only for the initial centroids and when few are
                left to assign.

        Raises:
            ValueError: not two-dimensional, NaN or infinite rows (with their number and the first), fewer points than clusters, or
                `assignment="greedy"` with several ranks.
        """
        with ranks.together():
            points = check_points(points, empty=ranks.size > 1).float()
        first, count = ranks.span(len(points))
        check_enough(count, self.n_clusters)
        if ranks.size > 1 and self.assignment == "greedy":
            raise ValueError(
                'assignment="greedy" supports one process only; use assignment="optimal" in distributed runs'
            )
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(count, generator=generator).to(points.device)
        centers = self._initial_centers(points, first, order, generator, ranks)
        self.inertia_ = float("inf")
        if self.assignment == "greedy":
            self._fit_greedy(points, centers, order)
        else:
            self._fit_priced(points, first, centers, order, ranks)
        return self

    def predict(self, points: torch.Tensor | np.ndarray) -> torch.Tensor:
        """(n,) int64 nearest centroid of each of (n, d) points, for new items. It does not preserve balance."""
        return nearest(check_points(points).float().to(self.cluster_centers_.device), self.cluster_centers_)

    def _initial_centers(self, points, first, order, generator, ranks) -> torch.Tensor:
        if self.init == "random":
            return ranks.pick(points, first, order[: self.n_clusters])
        sample = ranks.pick(points, first, order[: max(10 * self.n_clusters, 2048)])
        rows, distances = [0], (sample - sample[0]).square().sum(1)
        for _ in range(1, self.n_clusters):
            weights = distances.double().cpu() + 1e-30  # any row will do if only copies are left
            rows.append(int(torch.multinomial(weights, 1, generator=generator)))
            distances = torch.minimum(distances, (sample - sample[rows[-1]]).square().sum(1))
        return sample[rows]

    def _keep_if_best(self, points, labels, centers, iteration, ranks=SINGLE_PROCESS) -> None:
        self.n_iter_ = iteration
        inertia = _inertia(points, labels, centers, ranks)
        if inertia < self.inertia_:
            self.inertia_, self.labels_, self.cluster_centers_ = inertia, labels, centers

    def _fit_priced(self, points, first, centers, order, ranks) -> None:
        clusters, count = self.n_clusters, len(order)
        prices = CentroidPrices(clusters, points.device)
        wanted = count if self.max_points_per_cluster is None else self.max_points_per_cluster * clusters
        sample = points if wanted >= count else points[those_in(order[:wanted], first, len(points)).sort().values]
        window = prices.sample_size(count)
        late = min(int((1 - _EXACT_SHARE) * self.max_iter), self.max_iter - 1)
        exact_from = 0 if count <= SOLVER_POINTS else late
        previous = None
        for iteration in range(self.max_iter):
            exact = iteration >= exact_from
            rows = order[(torch.arange(window, device=order.device) + iteration * window) % count]
            window_rows, gap_rows = (those_in(some, first, len(points)) for some in (rows, rows[:GAP_ROWS]))
            prices.refine(points[window_rows], centers, ranks=ranks, count=window, gap_rows=len(gap_rows))
            if exact:
                labels, demand = assign_balanced(points, centers, prices, ranks)
                centers = means(points, labels, centers, ranks)
                self._keep_if_best(points, labels, centers, iteration + 1, ranks)
            else:
                labels = nearest(sample, centers, prices.values)
                demand = ranks.sum(labels.bincount(minlength=clusters))
                centers = means(sample, labels, centers, ranks)
            prices.correct(demand.float())
            settled = previous is not None and self._settled(labels, previous, ranks)
            if settled and exact:
                break
            if settled:  # only the exact balance remains
                exact_from = iteration + 1
            # Exactly balanced labels are not comparable with earlier ones, which may come from a sample.
            previous = None if iteration + 1 == exact_from else labels

    def _settled(self, labels, previous, ranks) -> bool:
        changed = (labels != previous).sum()
        changed, count = ranks.sum(torch.stack([changed, torch.full_like(changed, len(labels))])).tolist()
        return changed <= self.tol * count

    def _fit_greedy(self, points, centers, order) -> None:
        """Algorithm 1: every cluster takes its nearest unassigned points."""
        size, more = divmod(len(points), self.n_clusters)
        previous = None
        for iteration in range(1, self.max_iter + 1):
            labels = torch.empty(len(points), dtype=torch.long, device=points.device)
            left = torch.arange(len(points), device=points.device)
            for cluster in range(self.n_clusters):
                distances = (points[left] - centers[cluster]).square().sum(1)
                nearest_first = distances.argsort(stable=True)
                take = size + (cluster < more)
                labels[left[nearest_first[:take]]] = cluster
                left = left[nearest_first[take:].sort().values]
            centers = means(points, labels, centers)
            self._keep_if_best(points, labels, centers, iteration)
            if previous is not None and self._settled(labels, previous, SINGLE_PROCESS):
                break
            previous = labels


def check_points(points: torch.Tensor | np.ndarray, empty: bool = False) -> torch.Tensor:
    """
    Validates (N, d) finite points and returns a tensor.

    Args:
        empty: whether zero rows are allowed.

    Raises:
        ValueError: not two-dimensional, no rows, or NaN or infinite rows (with their number and the first).
    """
    points = torch.as_tensor(points)
    if points.ndim != 2 or not (points.shape[1] if empty else points.numel()):
        raise ValueError(f"points must be (items, dimensions), not empty; got shape {tuple(points.shape)}")
    bad = ~torch.isfinite(points).all(1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(points)} rows contain NaN or infinite values (first: row {int(bad.nonzero()[0])}); fix or drop them"
        )
    return points


def check_enough(count: int, codes: int) -> None:
    """
    Checks that `count` items suffice for one item per code.

    Raises:
        ValueError: fewer points than codes.
    """
    if count < codes:
        raise ValueError(
            f"fewer items than codes: {count} items cannot fill {codes} clusters; use a codebook of at most {count} codes"
        )


def means(
    points: torch.Tensor, labels: torch.Tensor, centers: torch.Tensor, ranks: SingleProcess = SINGLE_PROCESS
) -> torch.Tensor:
    """(K, d) mean of each cluster; empty clusters keep their centroid."""
    counts = ranks.sum(labels.bincount(minlength=len(centers)))[:, None]
    if ranks.size == 1:
        sums = torch.zeros_like(centers).index_add_(0, labels, points)
    else:  # in double, so that the result does not depend on how points are distributed
        sums = torch.zeros_like(centers, dtype=torch.double)
        for rows, own in zip(points.split(ROWS), labels.split(ROWS), strict=True):
            sums.index_add_(0, own, rows.double())
        sums = ranks.sum(sums)
    return torch.where(counts > 0, (sums / counts.clamp(min=1)).to(centers.dtype), centers)


def _inertia(points: torch.Tensor, labels: torch.Tensor, centers: torch.Tensor, ranks: SingleProcess) -> float:
    parts = zip(points.split(ROWS), labels.split(ROWS), strict=True)
    total = sum(float((rows - centers[own]).square().sum(dtype=torch.double)) for rows, own in parts)
    total, count = ranks.sum(torch.tensor([total, len(points)], dtype=torch.double, device=points.device)).tolist()
    return total / count
