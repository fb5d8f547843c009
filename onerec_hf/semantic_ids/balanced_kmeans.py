"""Balanced k-means: clusters whose sizes differ by at most one, at nearly the error of plain k-means."""

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
from onerec_hf.semantic_ids.process_group import ALONE, Alone, those_in

# The last share of the iterations is exactly balanced; before, prices hold the balance nearly, at the cost of plain k-means.
_EXACT_SHARE = 0.3


class BalancedKMeans:
    """
    K-means in which every cluster holds floor(N / K) or ceil(N / K) points, always.

    `assignment="optimal"` puts a price on each centroid so that demand meets capacity ([`CentroidPrices`]); the last iterations, and
    all of them for up to 512 points, also fill the capacities exactly. `assignment="greedy"` is the paper's Algorithm 1 (arXiv
    2502.18965, section 3.1): cluster after cluster takes its nearest points among those left, so that late clusters get what nobody
    wanted; where K does not divide N, the first N mod K clusters take one point more (the paper leaves this open).

    Memory beside the points is linear in N: distances are computed in chunks of rows.

    Args:
        n_clusters: K.
        max_iter: most iterations.
        tol: the share of points that may still change their cluster when it counts as converged; 0 asks for none.
        init: "random" (K different rows) or "k-means++" (on a sample of at least 10 K rows).
        assignment: "optimal" or "greedy".
        max_points_per_cluster: centroids are first moved on a sample of this many points per cluster, as faiss does; the exactly balanced
            iterations see all points. `None` always takes all.
        seed: of the initial centroids and samples; the same seed on the same device gives the same result.

    Attributes:
        cluster_centers_: (K, d) float32 means of the clusters. labels_: (N,) int64, the assignment of the best iteration. inertia_: mean
        squared distance of a point to the mean of its cluster. n_iter_: iterations done.

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

    def fit(self, points: torch.Tensor | np.ndarray, ranks: Alone = ALONE) -> BalancedKMeans:
        """
        Clusters (N, d) points, on their device.

        Args:
            ranks: the processes that hold the points between them ([`Ranks`]): `points` are this rank's rows then, `labels_` too, all else is
                of all. The result is that of one process up to the order of summation. A rank holds its rows, eight bytes for each row of
                all ranks (the order of the samples), and receives sums of K or K d numbers; points are sent for the first centroids and
                where at most 512 are left to assign.

        Raises:
            ValueError: not two-dimensional, NaN or infinite rows (how many, the first), fewer points than clusters, or
                `assignment="greedy"` over ranks.
        """
        with ranks.together():
            points = check_points(points, empty=ranks.size > 1).float()
        first, count = ranks.span(len(points))
        check_enough(count, self.n_clusters)
        if ranks.size > 1 and self.assignment == "greedy":
            raise ValueError('assignment="greedy" is for one process; over ranks there is "optimal"')
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
        """(n,) int64 nearest centroid of each of (n, d) points: for new items; it does not keep the balance."""
        return nearest(check_points(points).float().to(self.cluster_centers_.device), self.cluster_centers_)

    def _initial_centers(self, points, first, order, generator, ranks) -> torch.Tensor:
        if self.init == "random":
            return ranks.pick(points, first, order[: self.n_clusters])
        sample = ranks.pick(points, first, order[: max(10 * self.n_clusters, 2048)])
        rows, distances = [0], (sample - sample[0]).square().sum(1)
        for _ in range(1, self.n_clusters):
            weights = distances.double().cpu() + 1e-30  # where only copies are left any row is as good
            rows.append(int(torch.multinomial(weights, 1, generator=generator)))
            distances = torch.minimum(distances, (sample - sample[rows[-1]]).square().sum(1))
        return sample[rows]

    def _keep_if_best(self, points, labels, centers, iteration, ranks=ALONE) -> None:
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
            if settled:  # what is left to do is the exact balance
                exact_from = iteration + 1
            # Exactly balanced labels are not compared with those before, which may be of a sample.
            previous = None if iteration + 1 == exact_from else labels

    def _settled(self, labels, previous, ranks) -> bool:
        changed = (labels != previous).sum()
        changed, count = ranks.sum(torch.stack([changed, torch.full_like(changed, len(labels))])).tolist()
        return changed <= self.tol * count

    def _fit_greedy(self, points, centers, order) -> None:
        """Algorithm 1: every cluster takes its nearest unassigned points and moves at once."""
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
            if previous is not None and self._settled(labels, previous, ALONE):
                break
            previous = labels


def check_points(points: torch.Tensor | np.ndarray, empty: bool = False) -> torch.Tensor:
    """
    (N, d) finite points as a tensor.

    Args:
        empty: whether there may be no rows.

    Raises:
        ValueError: not two-dimensional, no rows, or NaN or infinite rows (how many, the first).
    """
    points = torch.as_tensor(points)
    if points.ndim != 2 or not (points.shape[1] if empty else points.numel()):
        raise ValueError(f"points must be (items, dimensions), not empty; got shape {tuple(points.shape)}")
    bad = ~torch.isfinite(points).all(1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(points)} rows hold NaN or infinite values (first: row {int(bad.nonzero()[0])}); repair or drop them"
        )
    return points


def check_enough(count: int, codes: int) -> None:
    """
    Checks that every code can have one of `count` items.

    Raises:
        ValueError: fewer points than codes.
    """
    if count < codes:
        raise ValueError(
            f"fewer items than codes: {count} items cannot fill {codes} clusters; use a codebook of at most {count} codes"
        )


def means(points: torch.Tensor, labels: torch.Tensor, centers: torch.Tensor, ranks: Alone = ALONE) -> torch.Tensor:
    """(K, d) mean of each cluster; an empty one keeps its centroid."""
    counts = ranks.sum(labels.bincount(minlength=len(centers)))[:, None]
    if ranks.size == 1:
        sums = torch.zeros_like(centers).index_add_(0, labels, points)
    else:  # in double, so that the result does not show how the points are shared out
        sums = torch.zeros_like(centers, dtype=torch.double)
        for rows, own in zip(points.split(ROWS), labels.split(ROWS), strict=True):
            sums.index_add_(0, own, rows.double())
        sums = ranks.sum(sums)
    return torch.where(counts > 0, (sums / counts.clamp(min=1)).to(centers.dtype), centers)


def _inertia(points: torch.Tensor, labels: torch.Tensor, centers: torch.Tensor, ranks: Alone) -> float:
    parts = zip(points.split(ROWS), labels.split(ROWS), strict=True)
    total = sum(float((rows - centers[own]).square().sum(dtype=torch.double)) for rows, own in parts)
    total, count = ranks.sum(torch.tensor([total, len(points)], dtype=torch.double, device=points.device)).tolist()
    return total / count
