"""Assigning points to centroids so that every centroid gets the same number: prices that even out demand, then an exact finish."""

from __future__ import annotations

import torch

from onerec_hf.semantic_ids.process_group import ALONE, Alone

# Points that are handled at a time where every one of them has to be looked at.
ROWS = 65_536
# Rows x centroids distances held at a time; the sample that prices are searched on may hold more.
_CHUNK_ENTRIES, _SAMPLE_ENTRIES = 1 << 20, 1 << 27
# Sets up to this size are assigned at the least cost by scipy's solver, larger ones by prices.
SOLVER_POINTS = 512
# Sinkhorn steps on one kernel. Each scales a centroid by at most 1000: the eighth power is still a float32, and what underflowed in the
# kernel would still be nothing.
_SCALING_STEPS = 8
_MAX_ROUNDS = 32
# Where ranks have no more points than this left between them, each rank gets these and ends the rounds by itself: the last rounds are about
# few points, and asking the other ranks would take longer than their distances.
_ENDED_BY_EACH = 4096
# Regrets are non-negative float32, whose bits are ordered as they are.
_MOST_BITS, _BITS_AT_ONCE = 2**31 - 1, 4
# Rows of a sample that the gap between best and second best centroid is taken from.
GAP_ROWS = 2048


class CentroidPrices:
    """
    A price per centroid, added to its squared distance, at which demand meets capacity: the dual variables of balanced assignment,
    found by entropic optimal transport (Sinkhorn steps) on a sample of points. They are kept from one k-means iteration to the next,
    since centroids move little.

    The temperature of a point's choice is a multiple of its mean gap between best and second best centroid. It rises where the steps did
    not reach balance (far centroids have to be made attractive) and falls where they did (soft demand then nears the hard one).

    Args:
        clusters: number of centroids.
        device: of the points.
    """

    def __init__(self, clusters: int, device: torch.device):
        self.values = torch.zeros(clusters, device=device)
        self._heat, self._temperature = 0.5, 0.0

    def sample_size(self, points: int) -> int:
        """Rows that `refine` wants of this many points."""
        clusters = len(self.values)
        return min(points, max(16 * clusters, 4096), max(1, _SAMPLE_ENTRIES // clusters))

    def refine(
        self,
        sample: torch.Tensor,
        centers: torch.Tensor,
        steps: int = 16,
        tolerance: float = 0.02,
        ranks: Alone = ALONE,
        count: int | None = None,
        gap_rows: int = GAP_ROWS,
    ) -> None:
        """
        Moves the prices until the sample's soft demand is off balance by less than `tolerance`, at most `steps` times. Where ranks hold a part
        of the sample each, `count` is the size of the whole, and the first `gap_rows` of this rank's part are those that the gap is taken from.
        """
        if len(centers) == 1:
            return
        best = (squares(sample[:gap_rows], centers) + self.values).topk(2, dim=1, largest=False).values
        gap = float(ranks.mean(best[:, 1] - best[:, 0]))
        if gap == 0:  # every point is as near to two centroids: prices cannot tell points apart
            self._temperature = 0.0
            return
        self._temperature = self._heat * gap
        balanced, count = False, len(sample) if count is None else count
        for _ in range(0, steps, _SCALING_STEPS):
            kernel = self._kernel(sample, centers)
            scaling = torch.ones_like(self.values)  # exp(-change of price / temperature)
            for _ in range(_SCALING_STEPS):
                # Sinkhorn's form of the soft demand: two products with the kernel, no exponential.
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
        """(n, K) exp(-(cost - least cost of the row) / temperature) at the present prices."""
        offset, table = centers.square().sum(1) + self.values, centers.T.contiguous()
        kernel = sample.new_empty(len(sample), len(centers))
        for rows, chunk in zip(kernel.split(_rows(centers)), sample.split(_rows(centers)), strict=True):
            cost = torch.addmm(offset, chunk, table, alpha=-2)
            torch.exp(cost.sub_(cost.amin(1, keepdim=True)).mul_(-1 / self._temperature), out=rows)
        return kernel

    def correct(self, counts: torch.Tensor) -> None:
        """A damped step by how many of all points chose each centroid, which the sample only estimates."""
        demand = counts * (len(counts) / counts.sum())
        self.values = self.values + 0.5 * self._temperature * torch.log(demand + 0.1)


def squares(points: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """(n, K) squared distances less each point's own square, which no comparison between centroids needs."""
    return torch.addmm(centers.square().sum(1), points, centers.T, alpha=-2)


def nearest(points: torch.Tensor, centers: torch.Tensor, prices: torch.Tensor | None = None) -> torch.Tensor:
    """(n,) int64 cheapest of (K, d) centroids for (n, d) points, in chunks of rows."""
    offset = centers.square().sum(1) if prices is None else centers.square().sum(1) + prices
    table = centers.T.contiguous()
    return torch.cat(
        [torch.addmm(offset, chunk, table, alpha=-2).min(1).indices for chunk in points.split(_rows(centers))]
    )


def two_nearest(
    points: torch.Tensor, centers: torch.Tensor, prices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) cheapest centroid and (n,) regret: how much more the second cheapest costs (infinite where there is none)."""
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
    points: torch.Tensor, centers: torch.Tensor, prices: CentroidPrices, ranks: Alone = ALONE
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    (N,) labels whose counts differ by at most one, and the (K,) counts that the prices alone would have given.

    Up to 512 points are assigned at the least total cost. More of them ask for their cheapest centroid in rounds; a centroid keeps those
    that would lose most elsewhere and closes when it is full. With `ranks` the points are this rank's, counts are everyone's.
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
            stays = staying(choice, regret, room)
            room = room - choice[stays].bincount(minlength=len(room))
        else:
            stays, room = staying_of(ranks, choice, regret, room)
        labels[left[stays]] = choice[stays]
        left = left[~stays]
        first, count = ranks.span(len(left))
        if not count:
            return labels
        mine, is_open = slice(first, first + len(left)), room.nonzero().squeeze(1)
        alone = ranks.size > 1 and count <= _ENDED_BY_EACH
        asking = ranks.gather(points[left]) if alone else points[left]
        position, regret = two_nearest(asking, centers[is_open], prices[is_open])
        choice = is_open[position]
        if alone:
            ended = _fill(asking, centers, prices, room, choice, regret, ALONE, rounds - done)
            labels[left] = ended[mine]
            return labels
    # Points that are still left after so many rounds are equal or nearly so (copies of one item): who goes where matters little.
    first, count = ranks.span(len(left))
    slots = torch.arange(len(room), device=room.device).repeat_interleave(room)
    if ranks.size == 1 and count <= SOLVER_POINTS:
        cost = squares(points[left].double(), centers.double())[:, slots]
        labels[left] = slots[_solve(cost)]
    else:
        labels[left] = slots[first : first + len(left)]
    return labels


def staying(choice: torch.Tensor, regret: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """
    (n,) bool: of the points that ask for a centroid, the `room` of it with the largest regret; of equal ones the first.

    Args:
        choice, regret: (n,), what `two_nearest` gives.
        room: (K,) int64.

    Example:
        >>> staying(torch.tensor([0, 0, 0, 1]), torch.tensor([1.0, 3.0, 3.0, 0.0]), torch.tensor([1, 1]))
        tensor([False,  True, False,  True])
    """
    order = regret.argsort(descending=True, stable=True)
    order = order[choice[order].argsort(stable=True)]
    asked = choice[order]
    first = torch.searchsorted(asked, torch.arange(len(room), device=room.device))
    stays = torch.empty_like(choice, dtype=torch.bool)
    stays[order] = torch.arange(len(asked), device=asked.device) - first[asked] < room[asked]
    return stays


def staying_of(
    ranks: Alone, choice: torch.Tensor, regret: torch.Tensor, room: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What [`~onerec_hf.semantic_ids.balanced_assignment.staying`] gives where the points of all ranks stand one after the other: (n,) bool for
    this rank's; and the (K,) room that is left then.

    Of each centroid the smallest regret that may stay is searched for, four bits at a time: the ranks add up how many of their points
    reach each of sixteen thresholds, 128 bytes a centroid. Where points of equal regret stand at the threshold, those of earlier ranks
    come first.

    Args:
        choice, regret: (n,), this rank's.
        room: (K,) int64, of all ranks.
    """
    every = torch.arange(len(room), device=room.device)
    worth = regret.view(torch.int32).long()
    keys = (choice << 32) + (_MOST_BITS - worth)  # by centroid, largest regret first
    keys, order = keys.sort(stable=True)
    first = torch.searchsorted(keys, every << 32)

    def reaching(thresholds: torch.Tensor) -> torch.Tensor:
        """(K, t) how many of this rank's points ask for a centroid with at least the regret whose bits are (K, t) `thresholds`."""
        last = (every[:, None] << 32) + (_MOST_BITS - thresholds)
        return torch.searchsorted(keys, last, right=True) - first[:, None]

    threshold = torch.zeros_like(room)
    for shift in range(32 - _BITS_AT_ONCE, -1, -_BITS_AT_ONCE):
        steps = threshold[:, None] + (torch.arange(2**_BITS_AT_ONCE, device=room.device) << shift)
        enough = ranks.sum(reaching(steps)) >= room[:, None]
        enough[:, 0] = True  # where fewer ask than there is room for, all stay
        threshold = steps.gather(1, enough.sum(1, keepdim=True) - 1).squeeze(1)
    counts = reaching(torch.stack([threshold + 1, threshold], dim=1))
    everyones = ranks.gather(torch.stack([counts[:, 0], counts[:, 1] - counts[:, 0]])[None])  # (ranks, 2, K)
    above, tied = everyones.sum(0)
    at_threshold = room - above
    earlier = everyones[: ranks.rank, 1].sum(0)
    allowed = counts[:, 0] + (at_threshold - earlier).clamp(min=0)
    stays = torch.empty_like(choice, dtype=torch.bool)
    asked = choice[order]
    # Behind those at the threshold stand the ones below it, who do not stay however much room a rank has.
    allowed = torch.minimum(allowed, counts[:, 1])
    stays[order] = torch.arange(len(asked), device=asked.device) - first[asked] < allowed[asked]
    return stays, room - above - torch.minimum(at_threshold, tied)


def _least_cost(points: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """The balanced assignment of least total squared distance."""
    clusters = len(centers)
    size, more = divmod(len(points), clusters)
    cost = squares(points.double(), centers.double())
    slots = torch.arange(clusters, device=points.device).repeat(size + (more > 0))
    cost = cost.repeat(1, size + (more > 0))
    if more:  # any centroid may take one point above `size`, but only when all have `size`
        cost[:, -clusters:] += (cost.max() - cost.min() + 1) * len(points)
    return slots[_solve(cost)]


def _solve(cost: torch.Tensor) -> torch.Tensor:
    """(n,) distinct columns of an (n, m) cost matrix, n <= m, at the least sum."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(cost.device)


def _rows(centers: torch.Tensor) -> int:
    return max(1, _CHUNK_ENTRIES // len(centers))
