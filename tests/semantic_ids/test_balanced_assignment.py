"""Balanced assignment: the least cost for small sets, near it for large ones, and prices that even out demand."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from onerec_hf.semantic_ids.balanced_assignment import CentroidPrices, assign_balanced, nearest, two_nearest
from tests.rounding import assert_close


def draw(points, clusters, seed, dim=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(points, dim, generator=generator), torch.randn(clusters, dim, generator=generator)


def cost_of(points, centers, labels):
    return float((points - centers[labels]).square().sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(3, 7))
def test_small_sets_get_the_least_cost_of_all_balanced_assignments(seed, count):
    points, centers = draw(count, 3, seed)
    labels, _ = assign_balanced(points, centers, CentroidPrices(3, points.device))
    size, more = divmod(count, 3)
    wanted = sorted([size + 1] * more + [size] * (3 - more))
    assert sorted(labels.bincount(minlength=3).tolist()) == wanted
    every = itertools.product(range(3), repeat=count)
    best = min(
        cost_of(points, centers, torch.tensor(choice))
        for choice in every
        if sorted(choice.count(k) for k in range(3)) == wanted
    )
    assert cost_of(points, centers, labels) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_large_sets_come_within_three_percent_of_the_least_cost(seed):
    points, centers = draw(1200, 24, seed, dim=6)
    prices = CentroidPrices(24, points.device)
    for _ in range(10):
        prices.refine(points, centers)
    labels, demand = assign_balanced(points, centers, prices)
    assert labels.bincount().tolist() == [50] * 24
    assert torch.equal(demand, two_nearest(points, centers, prices.values)[0].bincount(minlength=24))
    slots = torch.arange(24).repeat_interleave(50)
    cost = torch.cdist(points, centers).square().double()[:, slots]
    best = float(cost[linear_sum_assignment(cost.numpy())].sum())
    assert best <= cost_of(points, centers, labels) * (1 + 1e-6) <= 1.03 * best


def test_prices_even_out_demand():
    points, centers = draw(4000, 16, 0, dim=4)
    before = nearest(points, centers).bincount(minlength=16)
    prices = CentroidPrices(16, points.device)
    for _ in range(10):
        prices.refine(points, centers)
    after = nearest(points, centers, prices.values).bincount(minlength=16)
    excess = lambda counts: float((counts - 250).clamp(min=0).sum()) / 4000  # noqa: E731
    assert excess(before) > 0.2
    assert excess(after) < 0.05


def test_prices_are_left_alone_where_they_cannot_help():
    for points, clusters in ((torch.ones(700, 3), 5), (torch.randn(700, 3), 1)):
        prices = CentroidPrices(clusters, points.device)
        centers = points[:clusters].clone()
        prices.refine(points, centers)
        prices.correct(torch.ones(clusters))
        assert not prices.values.any()
        labels, _ = assign_balanced(points, centers, prices)
        assert labels.bincount().tolist() == [700 // clusters] * clusters


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 50), st.integers(1, 9))
def test_nearest_and_regret_equal_plain_distances(seed, count, clusters):
    points, centers = draw(count, clusters, seed)
    prices = torch.rand(clusters, generator=torch.Generator().manual_seed(seed))
    cost = torch.cdist(points.double(), centers.double()).square() + prices
    ordered = cost.sort(1).values
    choice, regret = two_nearest(points, centers, prices)
    scale = float(
        points.square().sum(1).max() + centers.square().sum(1).max() + 1
    )  # what a distance is the difference of
    assert_close(cost.gather(1, choice[:, None]).squeeze(1).float(), ordered[:, 0], scale=scale)
    if clusters == 1:
        assert regret.isinf().all()
    else:
        assert_close(regret, ordered[:, 1] - ordered[:, 0], scale=scale)
    at = nearest(points, centers, prices)
    assert_close(cost.gather(1, at[:, None]).squeeze(1).float(), ordered[:, 0], scale=scale)
