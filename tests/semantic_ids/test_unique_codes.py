"""make_unique: no two items share a semantic ID, at the least cost, and nothing else changes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.semantic_ids import add_digit, fit_semantic_ids, make_unique
from onerec_hf.semantic_ids.crowded_prefixes import spill
from onerec_hf.semantic_ids.unique_codes import CrowdedPrefixError


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 3), st.integers(2, 8))
def test_unique_with_as_few_changes_as_needed(seed, count, levels, last):
    generator = torch.Generator().manual_seed(seed)
    upper = torch.randint(0, 4, (count, levels - 1), generator=generator)
    codes = torch.cat([upper, torch.randint(0, last, (count, 1), generator=generator)], 1)
    largest = max(int((upper == row).all(1).sum()) for row in upper)
    residuals, codebook = torch.randn(count, 3, generator=generator), torch.randn(last, 3, generator=generator)
    if largest > last:
        with pytest.raises(ValueError, match=rf"{largest} items share the prefix .* only {last} codes"):
            make_unique(codes, residuals, codebook)
        return
    result = make_unique(codes, residuals, codebook)
    assert len(torch.unique(result.codes, dim=0)) == count
    assert torch.equal(result.codes[:, :-1], upper)
    assert torch.equal(result.moved, result.codes[:, -1] != codes[:, -1])
    # Prefixes without a collision stay as they are.
    for i in range(count):
        same = (upper == upper[i]).all(1)
        if len(torch.unique(codes[same, -1])) == int(same.sum()):
            assert torch.equal(result.codes[same], codes[same])


@pytest.mark.parametrize("seed", range(8))
def test_cost_is_the_least_of_all_permutations(seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.zeros(4, 2, dtype=torch.long)
    residuals, codebook = torch.randn(4, 2, generator=generator), torch.randn(6, 2, generator=generator)
    cost = torch.cdist(residuals, codebook).square()
    rows = torch.arange(4)
    best = min(float(cost[rows, torch.tensor(choice)].sum()) for choice in itertools.permutations(range(6), 4))
    chosen = make_unique(codes, residuals, codebook).codes[:, 1]
    assert float(cost[rows, chosen].sum()) == pytest.approx(best, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(1, 12), st.integers(2, 9))
def test_only_allowed_codes_are_given(seed, count, last):
    generator = torch.Generator().manual_seed(seed)
    upper = torch.randint(0, 3, (count, 1), generator=generator)
    codes = torch.cat([upper, torch.randint(0, last, (count, 1), generator=generator)], 1)
    by_prefix = torch.rand(3, last, generator=generator) < 0.7
    residuals, codebook = torch.randn(count, 2, generator=generator), torch.randn(last, 2, generator=generator)
    allowed = by_prefix[upper.squeeze(1)]
    crowded = any(int((upper == k).sum()) > int(by_prefix[k].sum()) for k in upper.flatten().tolist())
    if crowded:
        with pytest.raises(ValueError, match="to distinguish them"):
            make_unique(codes, residuals, codebook, allowed)
        return
    result = make_unique(codes, residuals, codebook, allowed)
    assert len(torch.unique(result.codes, dim=0)) == count
    assert allowed.gather(1, result.codes[:, 1:]).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_the_extra_digit_counts_each_group_in_row_order(rows):
    longer = add_digit(torch.tensor(rows))
    assert longer[:, :2].tolist() == [list(row) for row in rows]
    assert longer[:, 2].tolist() == [rows[:i].count(row) for i, row in enumerate(rows)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=30))
def test_the_popularity_rank_counts_the_more_popular_of_each_group(rows):
    codes, counts = torch.tensor(rows)[:, :2], torch.tensor(rows)[:, 2]
    longer = add_digit(codes, counts)
    assert torch.equal(longer[:, :2], codes)
    for place, (first, second, count) in enumerate(rows):
        group = [(-n, i) for i, (a, b, n) in enumerate(rows) if (a, b) == (first, second)]
        assert int(longer[place, 2]) == sorted(group).index((-count, place))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(1, 24), st.integers(2, 4), st.integers(1, 8))
def test_a_crowded_prefix_spills_into_the_nearest_ones(seed, count, last, used):
    """Up to as many items as there are semantic IDs, all under few prefixes: each gets one, and those who fit stay."""
    sizes, generator = [4, 2, last], torch.Generator().manual_seed(seed)
    count = min(count, 8 * last)
    centres = torch.randn(4, 2, 3, generator=generator)
    flat = torch.randint(0, used, (count,), generator=generator)
    codes = torch.stack([flat // 2, flat % 2, torch.randint(0, last, (count,), generator=generator)], 1)
    points = centres[codes[:, 0], codes[:, 1]] + 0.1 * torch.randn(count, 3, generator=generator)
    spilt, moved = spill(
        codes,
        sizes,
        lambda prefixes: torch.full((len(prefixes),), last),
        lambda rows, prefixes: torch.cdist(points[rows], centres[prefixes[:, 0], prefixes[:, 1]]),
    )
    groups = torch.unique(spilt[:, :-1], dim=0, return_counts=True)[1]
    assert groups.max() <= last
    assert torch.equal(spilt[~moved], codes[~moved])
    before = codes[:, 0] * 2 + codes[:, 1]
    assert int(moved.sum()) == int((before.bincount() - last).clamp(min=0).sum())
    result = make_unique(spilt, points, torch.randn(last, 3, generator=generator))
    assert len(torch.unique(result.codes, dim=0)) == count


def test_more_items_than_ids_stay_an_error():
    vectors = np.random.default_rng(0).normal(size=(9, 3))
    for sizes in ([2, 4], [8]):  # a single level has no other prefix
        with pytest.raises(CrowdedPrefixError, match="items share the prefix"):
            fit_semantic_ids(range(9), vectors, sizes)


def test_a_fit_of_crowded_items_does_not_fail():
    vectors = np.concatenate([np.full((30, 4), 5.0), np.eye(4)]) + 0.01 * np.random.default_rng(0).normal(size=(34, 4))
    fitted = fit_semantic_ids(range(34), vectors, codebook_sizes=[4, 4, 4], method="kmeans")
    assert len(np.unique(fitted.catalogue.codes, axis=0)) == 34
