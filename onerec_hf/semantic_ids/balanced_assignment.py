"""Balanced assignment of points to centroids: prices that equalise demand, then exact capacities."""

from __future__ import annotations

import torch

from onerec_hf.semantic_ids.process_group import SINGLE_PROCESS, SingleProcess

# Chunk size of passes over all points.
ROWS = 65_536
# Maximum number of distances (rows x centroids) in memory: per chunk, and for the sample that fits the prices.
_CHUNK_ENTRIES, _SAMPLE_ENTRIES = 1 << 20, 1 << 27
# Sets up to this size are solved exactly by scipy, larger ones with prices.
SOLVER_POINTS = 512
# Sinkhorn steps per kernel. Each scales a centroid by at most 1000, and 1000^8 still fits into float32; entries that underflow in the
# kernel remain negligible.
_SCALING_STEPS = 8
_MAX_ROUNDS = 32
# With at most this many points left over all ranks, every rank gathers them and finishes alone: for few points, communication costs more
# than computing the distances.
_FINISHED_LOCALLY = 4096
# The bit patterns of non-negative float32 regrets are ordered like their values.
_MAX_BITS, _BITS_AT_ONCE = 2**31 - 1, 4
# Sample rows that estimate the gap between the nearest and second nearest centroid.
GAP_ROWS = 2048


class CentroidPrices:
    """
    A price per centroid, added to its squared distance, at which demand meets capacity: the dual variables of balanced assignment,
    fitted by entropic optimal transport (Sinkhorn steps) on a sample of points. They carry over to the next k-means iteration,
    since centroids move little.

    The softmax temperature is a multiple of the mean gap between the nearest and second nearest centroid. It increases if the steps do not
    reach balance (distant centroids need more demand) and decreases if they do (soft demand then approaches hard demand).

    Args:
        clusters: number of centroids.
        device: device of the points.
    """

    def __init__(self, clusters: int, device: torch.device):
        self.values = torch.zeros(clusters, device=device)
        self._heat, self._temperature = 0.5, 0.0

    def sample_size(self, points: int) -> int:
        """Sample size of `refine` for this number of points."""
        clusters = len(self.values)
        return min(points, max(16 * clusters, 4096), max(1, _SAMPLE_ENTRIES // clusters))

    def refine(
        self,
        sample: torch.Tensor,
        centers: torch.Tensor,
        steps: int = 16,
        tolerance: float = 0.02,
        ranks: SingleProcess = SINGLE_PROCESS,
        count: int | None = None,
        gap_rows: int = GAP_ROWS,
    ) -> None:
        """
        Updates the prices until the sample's soft demand deviates from balance by less than `tolerance`, in at most `steps` steps. If ranks
        share the sample, `count` is its total size, and the first `gap_rows` of this rank's part estimate the gap.
        """
        if len(centers) == 1:
            return
        best = (squares(sample[:gap_rows], centers) + self.values).topk(2, dim=1, largest=False).values
        gap = float(ranks.mean(best[:, 1] - best[:, 0]))
        if gap == 0:  # every point is equally near to two centroids: prices cannot separate points
            self._temperature = 0.0
            return
        self._temperature = self._heat * gap
        balanced, count = False, len(sample) if count is None else count
        for _ in range(0, steps, _SCALING_STEPS):
            kernel = self._kernel(sample, centers)
            scaling = torch.ones_like(self.values)  # exp(-change of price / temperature)
            for _ in range(_SCALING_STEPS):
                # Soft demand in Sinkhorn form: two products with the kernel, no exponential.
                demand = scaling * ranks.sum((kernel @ scaling).reciprocal() @ kernel) * (len(centers) / count)
                balanced = float((demand - 1).clamp(min=0).mean()) < tolerance
                if balanced:
                    break
                scaling = scaling / (demand + 1e-3)
            self.values = self.values - self._temperature * scaling.log()
            if balanced:
                break
        self._heat = max(0.1, 0.75 * self._heat) if balanced else min(2.0, 1.4 * self._heat)

    def _kernel(self, sample: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        """(n, K) exp(-(cost - least cost of the row) / temperature) at the current prices."""
        offset, table = centers.square().sum(1) + self.values, centers.T.contiguous()
        kernel = sample.new_empty(len(sample), len(centers))
        for rows, chunk in zip(kernel.split(_rows(centers)), sample.split(_rows(centers)), strict=True):
            cost = torch.addmm(offset, chunk, table, alpha=-2)
            torch.exp(cost.sub_(cost.amin(1, keepdim=True)).mul_(-1 / self._temperature), out=rows)
        return kernel

    def correct(self, counts: torch.Tensor) -> None:
        """A damped step towards the demand of all points, which the sample only estimates."""
        demand = counts * (len(counts) / counts.sum())
        self.values = self.values + 0.5 * self._temperature * torch.log(demand + 0.1)


def squares(points: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """(n, K) squared distances up to a constant per point (its squared norm)."""
    return torch.addmm(centers.square().sum(1), points, centers.T, alpha=-2)


def nearest(points: torch.Tensor, centers: torch.Tensor, prices: torch.Tensor | None = None) -> torch.Tensor:
    """(n,) int64 index of the cheapest of (K, d) centroids for each of (n, d) points, in chunks of rows."""
    offset = centers.square().sum(1) if prices is None else centers.square().sum(1) + prices
    table = centers.T.contiguous()
    return torch.cat(
        [torch.addmm(offset, chunk, table, alpha=-2).min(1).indices for chunk in points.split(_rows(centers))]
    )


def two_nearest(
    points: torch.Tensor, centers: torch.Tensor, prices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) cheapest centroid and (n,) regret, the extra cost of the second cheapest (infinite for a single centroid)."""
    offset, table = centers.square().sum(1) + prices, centers.T.contiguous()
    choices, regrets = [], []
    for chunk in points.split(_rows(centers)):
        cost = torch.addmm(offset, chunk, table, alpha=-2)
        least, choice = cost.min(1)
        cost.scatter_(1, choice[:, None], float("inf"))
        choices.append(choice)
        regrets.append(cost.min(1).values - least)
    return torch.cat(choices), torch.cat(regrets)


def assign_balanced(
    points: torch.Tensor, centers: torch.Tensor, prices: CentroidPrices, ranks: SingleProcess = SINGLE_PROCESS
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    (N,) labels whose counts differ by at most one, and the (K,) counts under prices alone.

    Up to 512 points are assigned at minimum total cost. Larger sets are assigned in rounds: every point requests its cheapest open
    centroid, and each centroid accepts the points with the largest regret until it is full. With `ranks`, points and labels are this
    rank's and counts are global.
    """
    choice, regret = two_nearest(points, centers, prices.values)
    demand = ranks.sum(choice.bincount(minlength=len(centers)))
    first, count = ranks.span(len(points))
    if count <= SOLVER_POINTS:
        return _least_cost(ranks.gather(points), centers)[first : first + len(points)], demand
    size, more = divmod(count, len(centers))
    room = torch.full_like(demand, size)
    room[demand.argsort(descending=True, stable=True)[:more]] += 1
    return _fill(points, centers, prices.values, room, choice, regret, ranks, _MAX_ROUNDS), demand


def _fill(points, centers, prices, room, choice, regret, ranks, rounds) -> torch.Tensor:
    labels = torch.empty_like(choice)
    left = torch.arange(len(points), device=points.device)
    for done in range(1, rounds + 1):
        if ranks.size == 1:
            kept = accepted(choice, regret, room)
            room = room - choice[kept].bincount(minlength=len(room))
        else:
            kept, room = accepted_over_ranks(ranks, choice, regret, room)
        labels[left[kept]] = choice[kept]
        left = left[~kept]
        first, count = ranks.span(len(left))
        if not count:
            return labels
        mine, is_open = slice(first, first + len(left)), room.nonzero().squeeze(1)
        alone = ranks.size > 1 and count <= _FINISHED_LOCALLY
        requesting = ranks.gather(points[left]) if alone else points[left]
        position, regret = two_nearest(requesting, centers[is_open], prices[is_open])
        choice = is_open[position]
        if alone:
            ended = _fill(requesting, centers, prices, room, choice, regret, SINGLE_PROCESS, rounds - done)
            labels[left] = ended[mine]
            return labels
    # Points left after this many rounds are (nearly) equal, such as copies of one item, so their order hardly matters.
    first, count = ranks.span(len(left))
    slots = torch.arange(len(room), device=room.device).repeat_interleave(room)
    if ranks.size == 1 and count <= SOLVER_POINTS:
        cost = squares(points[left].double(), centers.double())[:, slots]
        labels[left] = slots[_solve(cost)]
    else:
        labels[left] = slots[first : first + len(left)]
    return labels


def accepted(choice: torch.Tensor, regret: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """
    (n,) bool: for each centroid, the `room` requesting points with the largest regret (ties: the first).

    Args:
        choice, regret: (n,), as returned by `two_nearest`.
        room: (K,) int64.

    Example:
        >>> accepted(torch.tensor([0, 0, 0, 1]), torch.tensor([1.0, 3.0, 3.0, 0.0]), torch.tensor([1, 1]))
        tensor([False,  True, False,  True])
    """
    order = regret.argsort(descending=True, stable=True)
    order = order[choice[order].argsort(stable=True)]
    requested = choice[order]
    first = torch.searchsorted(requested, torch.arange(len(room), device=room.device))
    kept = torch.empty_like(choice, dtype=torch.bool)
    kept[order] = torch.arange(len(requested), device=requested.device) - first[requested] < room[requested]
    return kept


def accepted_over_ranks(
    ranks: SingleProcess, choice: torch.Tensor, regret: torch.Tensor, room: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    [`accepted`] over all ranks: (n,) bool for this rank's points, and the remaining (K,) room.

    Only counts are communicated, no points. A search finds the smallest accepted regret of each centroid, four bits at a time: the ranks
    sum the numbers of points above sixteen thresholds, 128 bytes per centroid. Ties at the threshold go to earlier ranks.

    Args:
        choice, regret: (n,), of this rank.
        room: (K,) int64, global.
    """
    every = torch.arange(len(room), device=room.device)
    worth = regret.view(torch.int32).long()
    keys = (choice << 32) + (_MAX_BITS - worth)  # by centroid, largest regret first
    keys, order = keys.sort(stable=True)
    first = torch.searchsorted(keys, every << 32)

    def reaching(thresholds: torch.Tensor) -> torch.Tensor:
        """(K, t) number of this rank's points that request a centroid with a regret of at least the (K, t) `thresholds` (as bit patterns)."""
        last = (every[:, None] << 32) + (_MAX_BITS - thresholds)
        return torch.searchsorted(keys, last, right=True) - first[:, None]

    threshold = torch.zeros_like(room)
    for shift in range(32 - _BITS_AT_ONCE, -1, -_BITS_AT_ONCE):
        steps = threshold[:, None] + (torch.arange(2**_BITS_AT_ONCE, device=room.device) << shift)
        enough = ranks.sum(reaching(steps)) >= room[:, None]
        enough[:, 0] = True  # with fewer requests than room, all stay
        threshold = steps.gather(1, enough.sum(1, keepdim=True) - 1).squeeze(1)
    counts = reaching(torch.stack([threshold + 1, threshold], dim=1))
    gathered = ranks.gather(torch.stack([counts[:, 0], counts[:, 1] - counts[:, 0]])[None])  # (ranks, 2, K)
    above, tied = gathered.sum(0)
    at_threshold = room - above
    earlier = gathered[: ranks.rank, 1].sum(0)
    allowed = counts[:, 0] + (at_threshold - earlier).clamp(min=0)
    kept = torch.empty_like(choice, dtype=torch.bool)
    requested = choice[order]
    # Points below the threshold never stay, whatever room a rank has left.
    allowed = torch.minimum(allowed, counts[:, 1])
    kept[order] = torch.arange(len(requested), device=requested.device) - first[requested] < allowed[requested]
    return kept, room - above - torch.minimum(at_threshold, tied)


def _least_cost(points: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """The balanced assignment with the minimum total squared distance."""
    clusters = len(centers)
    size, more = divmod(len(points), clusters)
    cost = squares(points.double(), centers.double())
    slots = torch.arange(clusters, device=points.device).repeat(size + (more > 0))
    cost = cost.repeat(1, size + (more > 0))
    if more:  # a centroid may take one point above `size` only if all have `size`
        cost[:, -clusters:] += (cost.max() - cost.min() + 1) * len(points)
    return slots[_solve(cost)]


def _solve(cost: torch.Tensor) -> torch.Tensor:
    """(n,) distinct columns of an (n, m) cost matrix, n <= m, with minimum total cost."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(cost.device)


def _rows(centers: torch.Tensor) -> int:
    return max(1, _CHUNK_ENTRIES // len(centers))
