"""Balanced k-means: clusters whose sizes differ by at most one, at nearly the error of plain k-means."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

# Rows x centroids distances held at a time.
_CHUNK_ENTRIES = 1 << 24


class BalancedKMeans:
    """
    K-means in which every cluster holds floor(N / K) or ceil(N / K) points, always.

    `assignment="optimal"` puts a price on each centroid so that demand meets capacity (entropic optimal transport over each point's
    nearest centroids, prices kept from one iteration to the next), then fills the capacities exactly, the points with the largest
    regret first. `assignment="greedy"` is the paper's Algorithm 1 (arXiv 2502.18965, section 3.1): cluster after cluster takes its
    nearest points among those left, so that late clusters get what nobody wanted; where K does not divide N, the first N mod K clusters
    take one point more (the paper leaves this open).

    Args:
        n_clusters: K.
        max_iter: most iterations; it stops where no point changes its cluster.
        init: "k-means++" or "random" (K different rows).
        assignment: "optimal" or "greedy".
        seed: of the initial centroids; the same seed gives the same result.

    Attributes:
        cluster_centers_: (K, d) float32. labels_: (N,) int64, the assignment of the best iteration. inertia_: mean squared distance of a
        point to the mean of its cluster. n_iter_: iterations done.

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
        init: Literal["k-means++", "random"] = "k-means++",
        assignment: Literal["optimal", "greedy"] = "optimal",
        seed: int = 0,
    ):
        if n_clusters < 1 or max_iter < 1:
            raise ValueError(f"n_clusters and max_iter must be at least 1; got {n_clusters} and {max_iter}")
        if init not in ("k-means++", "random"):
            raise ValueError(f'init must be "k-means++" or "random"; got {init!r}')
        if assignment not in ("optimal", "greedy"):
            raise ValueError(f'assignment must be "optimal" or "greedy"; got {assignment!r}')
        self.n_clusters, self.max_iter, self.init = n_clusters, max_iter, init
        self.assignment, self.seed = assignment, seed

    def fit(self, points: torch.Tensor | np.ndarray) -> BalancedKMeans:
        """
        Clusters (N, d) points, on their device.

        Raises:
            ValueError: not two-dimensional, NaN or infinite rows (how many, the first), fewer points than clusters.
        """
        points = check_points(points)
        if len(points) < self.n_clusters:
            raise ValueError(
                f"fewer items than codes: {len(points)} items cannot fill {self.n_clusters} clusters; use a codebook of at most "
                f"{len(points)} codes"
            )
        points = points.float()
        centers = self._initial_centers(points)
        prices = points.new_zeros(self.n_clusters)
        self.inertia_, previous = float("inf"), None
        for iteration in range(1, self.max_iter + 1):
            if self.assignment == "greedy":
                labels = self._greedy(points, centers)
            else:
                labels, prices = self._assign(points, centers, prices)
            centers = _means(points, labels, self.n_clusters)
            inertia = float((points - centers[labels]).square().sum(1).double().mean())
            self.n_iter_ = iteration
            if inertia < self.inertia_:
                self.inertia_, self.labels_, self.cluster_centers_ = inertia, labels, centers
            if previous is not None and torch.equal(labels, previous):
                break
            previous = labels
        return self

    def predict(self, points: torch.Tensor | np.ndarray) -> torch.Tensor:
        """(n,) int64 nearest centroid of each of (n, d) points: for new items; it does not keep the balance."""
        return nearest(check_points(points).float().to(self.cluster_centers_.device), self.cluster_centers_)

    def _initial_centers(self, points: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if self.init == "random":
            return points[torch.randperm(len(points), generator=generator)[: self.n_clusters]].clone()
        rows = [int(torch.randint(len(points), (), generator=generator))]
        squares = (points - points[rows[0]]).square().sum(1)
        for _ in range(1, self.n_clusters):
            total = squares.double().cumsum(0).cpu()
            if total[-1] > 0:
                draw = torch.rand((), generator=generator, dtype=torch.double) * total[-1]
                row = min(int(torch.searchsorted(total, draw, right=True)), len(points) - 1)
            else:  # only duplicates are left: any row is as good
                row = int(torch.randint(len(points), (), generator=generator))
            rows.append(row)
            squares = torch.minimum(squares, (points - points[row]).square().sum(1))
        return points[rows].clone()

    def _greedy(self, points: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        """Algorithm 1: every cluster takes its nearest unassigned points and moves at once."""
        labels = torch.empty(len(points), dtype=torch.long, device=points.device)
        left = torch.arange(len(points), device=points.device)
        size, more = divmod(len(points), self.n_clusters)
        for cluster in range(self.n_clusters):
            squares = (points[left] - centers[cluster]).square().sum(1)
            order = squares.argsort(stable=True)
            taken, left = left[order[: size + (cluster < more)]], left[order[size + (cluster < more) :].sort().values]
            labels[taken] = cluster
        return labels

    def _assign(
        self, points: torch.Tensor, centers: torch.Tensor, prices: torch.Tensor, candidates: int = 32, steps: int = 12
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prices at which demand meets capacity, and an exactly balanced assignment at these prices."""
        near, cost = _nearest_candidates(points, centers, min(candidates, self.n_clusters))
        share = len(points) / self.n_clusters
        gap = (cost[:, 1] - cost[:, 0]).mean() if cost.shape[1] > 1 else cost.new_zeros(())
        if gap > 0:
            for step in range(steps):
                temperature = 0.5 * gap * 0.5 ** (3 * step / steps)  # demand sharpens towards the hard assignment
                demand = torch.zeros_like(prices).index_add_(
                    0, near.flatten(), (-(cost + prices[near]) / temperature).softmax(1).flatten()
                )
                prices = prices + temperature * torch.log(demand / share + 1e-3)
        return self._fill(points, centers, near, cost + prices[near], prices), prices

    def _fill(self, points, centers, near, priced, prices) -> torch.Tensor:
        """Rounds of proposals: each point asks for its cheapest open cluster, a cluster keeps those that would lose most elsewhere."""
        clusters = self.n_clusters
        size, more = divmod(len(points), clusters)
        wanted = near.gather(1, priced.argmin(1, keepdim=True)).squeeze(1).bincount(minlength=clusters)
        room = torch.full_like(wanted, size)
        room[wanted.argsort(descending=True, stable=True)[:more]] += 1
        labels = torch.empty(len(points), dtype=torch.long, device=points.device)
        left = torch.arange(len(points), device=points.device)
        while len(left):
            is_open = room > 0
            choice, regret = _two_cheapest(near[left], priced[left].masked_fill(~is_open[near[left]], float("inf")))
            stranded = choice < 0  # all their candidates are full: they look at every open cluster
            for rows in left[stranded].split(max(1, _CHUNK_ENTRIES // clusters)):
                full = _squares(points[rows], centers) + prices
                full = full.masked_fill(~is_open, float("inf"))
                every = torch.arange(clusters, device=full.device).expand(len(rows), -1)
                at = torch.searchsorted(left, rows)
                choice[at], regret[at] = _two_cheapest(every, full)
            # By cluster, largest regret first; the first `room` of each cluster stay.
            order = regret.argsort(descending=True, stable=True)
            order = order[choice[order].argsort(stable=True)]
            asked = choice[order]
            first = torch.searchsorted(asked, torch.arange(clusters, device=asked.device))
            stays = torch.arange(len(asked), device=asked.device) - first[asked] < room[asked]
            labels[left[order[stays]]] = asked[stays]
            room = room - asked[stays].bincount(minlength=clusters)
            left = left[order[~stays].sort().values]
        return labels


def check_points(points: torch.Tensor | np.ndarray) -> torch.Tensor:
    """
    (N, d) finite points as a tensor.

    Raises:
        ValueError: not two-dimensional, no rows, or NaN or infinite rows (how many, the first).
    """
    points = torch.as_tensor(points)
    if points.ndim != 2 or not points.numel():
        raise ValueError(f"points must be (items, dimensions), not empty; got shape {tuple(points.shape)}")
    bad = ~torch.isfinite(points).all(1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(points)} rows hold NaN or infinite values (first: row {int(bad.nonzero()[0])}); repair or drop them"
        )
    return points


def nearest(points: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """(n,) int64 index of the nearest of (K, d) centers, in chunks of rows."""
    chunks = points.split(max(1, _CHUNK_ENTRIES // len(centers)))
    return torch.cat([_squares(chunk, centers).argmin(1) for chunk in chunks])


def _squares(points: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """Squared distances up to each point's own square, which no comparison between centers needs."""
    return centers.square().sum(1) - 2 * points @ centers.T


def _nearest_candidates(points, centers, count) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, count) nearest centers of each point and their squared distances (up to a constant per point)."""
    parts = [
        _squares(chunk, centers).topk(count, dim=1, largest=False)
        for chunk in points.split(max(1, _CHUNK_ENTRIES // len(centers)))
    ]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def _two_cheapest(clusters: torch.Tensor, cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cheapest cluster per row (-1 where all cost infinity) and its regret: how much more the second cheapest costs."""
    values, at = cost.topk(min(2, cost.shape[1]), dim=1, largest=False)
    choice = torch.where(values[:, 0].isinf(), -1, clusters.gather(1, at[:, :1]).squeeze(1))
    regret = (values[:, -1] - values[:, 0]).nan_to_num(nan=0.0)
    return choice, regret


def _means(points: torch.Tensor, labels: torch.Tensor, clusters: int) -> torch.Tensor:
    sums = torch.zeros(clusters, points.shape[1], dtype=points.dtype, device=points.device).index_add_(
        0, labels, points
    )
    return sums / labels.bincount(minlength=clusters)[:, None]
