"""BalancedKMeans: exact balance always, and an error below the paper's greedy algorithm."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.semantic_ids import BalancedKMeans
from tests.rounding import assert_close, close


def clustered(count, dim, centers, seed):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(centers, dim, generator=generator)
    weights = torch.rand(centers, generator=generator) ** 2 + 1e-3
    which = torch.multinomial(weights, count, replacement=True, generator=generator)
    return means[which] + 0.5 * torch.randn(count, dim, generator=generator)


@st.composite
def points_and_clusters(draw):
    count = draw(st.integers(1, 60))
    kind = draw(st.sampled_from(["random", "few values", "constant"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dim = draw(st.integers(1, 4))
    points = torch.randn(count, dim, generator=generator)
    if kind == "few values":
        points = points.round()
    elif kind == "constant":
        points = torch.ones(count, dim)
    return points, draw(st.integers(1, count))


@settings(max_examples=120, deadline=None)
@given(points_and_clusters(), st.sampled_from(["optimal", "greedy"]), st.sampled_from(["k-means++", "random"]))
def test_sizes_differ_by_at_most_one(case, assignment, init):
    points, clusters = case
    kmeans = BalancedKMeans(clusters, assignment=assignment, init=init, max_iter=5).fit(points)
    sizes = kmeans.labels_.bincount(minlength=clusters)
    size, more = divmod(len(points), clusters)
    assert sorted(sizes.tolist()) == sorted([size + 1] * more + [size] * (clusters - more))
    means = torch.stack([points[kmeans.labels_ == k].mean(0) for k in range(clusters)])
    assert_close(kmeans.cluster_centers_, means)
    error = (points - means[kmeans.labels_]).square().sum(1).mean()
    assert kmeans.inertia_ == close(float(error))


@pytest.mark.parametrize("seed", range(3))
def test_error_is_below_the_greedy_algorithms(seed):
    points = clustered(1500, 16, 60, seed)
    greedy = BalancedKMeans(32, assignment="greedy", seed=seed).fit(points).inertia_
    for init in ("random", "k-means++"):
        assert BalancedKMeans(32, init=init, seed=seed).fit(points).inertia_ < 0.97 * greedy


def test_hand_computed_split():
    kmeans = BalancedKMeans(2).fit(np.array([[0.0], [1.0], [2.0], [10.0]]))
    first = kmeans.labels_[0]
    assert (kmeans.labels_ == first).tolist() == [True, True, False, False]
    assert kmeans.inertia_ == pytest.approx((0.25 + 0.25 + 16 + 16) / 4)


def test_is_deterministic_and_predicts_the_nearest():
    points = clustered(300, 8, 12, 0)
    first, second = BalancedKMeans(10, seed=3).fit(points), BalancedKMeans(10, seed=3).fit(points)
    assert torch.equal(first.labels_, second.labels_)
    new = clustered(50, 8, 12, 1)
    distances = torch.cdist(new, first.cluster_centers_)
    assert torch.equal(first.predict(new), distances.argmin(1))


def test_a_sample_is_enough_to_place_the_centroids():
    points = clustered(6000, 8, 40, 2)
    every = BalancedKMeans(20, max_points_per_cluster=None).fit(points)
    sampled = BalancedKMeans(20, max_points_per_cluster=30).fit(points)
    assert sampled.labels_.bincount().tolist() == [300] * 20
    assert sampled.inertia_ < 1.1 * every.inertia_


def test_thousands_of_copies_are_spread_evenly_and_quickly():
    points = torch.cat([torch.ones(5000, 4), clustered(1000, 4, 10, 0)])
    kmeans = BalancedKMeans(50, max_iter=4).fit(points)
    assert kmeans.labels_.bincount(minlength=50).tolist() == [120] * 50


def test_stops_when_nothing_changes():
    points = torch.cat([torch.zeros(5, 2), torch.full((5, 2), 9.0)])
    assert BalancedKMeans(2, max_iter=50).fit(points).n_iter_ < 5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: BalancedKMeans(3).fit(torch.zeros(2, 2)), "fewer items than codes: 2 items cannot fill 3"),
        (lambda: BalancedKMeans(1).fit(torch.tensor([[0.0], [float("nan")], [1.0]])), "1 of 3 rows.*first: row 1"),
        (lambda: BalancedKMeans(1).fit(torch.tensor([[float("inf")]])), "NaN or infinite"),
        (lambda: BalancedKMeans(1).fit(torch.zeros(3)), "items, dimensions"),
        (lambda: BalancedKMeans(0), "at least 1"),
        (lambda: BalancedKMeans(2, init="first"), "init must be"),
        (lambda: BalancedKMeans(2, assignment="fair"), "assignment must be"),
        (lambda: BalancedKMeans(2, max_points_per_cluster=0), "max_points_per_cluster must be"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
