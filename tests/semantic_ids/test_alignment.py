"""Alignment: pairs as often as they co-occur, InfoNCE by hand, content that follows behaviour and generalises to items without any."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.semantic_ids.alignment import align_embeddings, cooccurring_pairs, info_nce
from onerec_hf.semantic_ids.embeddings import cooccurrence
from tests.rounding import assert_close, close


def info_nce_by_hand(first, second, temperature, items=None):
    """The docstring's formula, pair by pair."""
    count, total = len(first), 0.0

    def score(i, j):
        return float(first[i] @ second[j] / first[i].norm() / second[j].norm()) / temperature

    def keeps(i, j):
        if items is None or i == j:
            return True
        (left, right), (other_left, other_right) = items[i].tolist(), items[j].tolist()
        return left != other_left and right != other_right and left != other_right

    for i in range(count):
        forth = sum(math.exp(score(i, j)) for j in range(count) if keeps(i, j))
        back = sum(math.exp(score(j, i)) for j in range(count) if keeps(j, i))
        total += math.log(math.exp(score(i, i)) / forth) + math.log(math.exp(score(i, i)) / back)
    return -total / (2 * count)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_info_nce_equals_a_hand_computation(temperature, masked):
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 9, 5, generator=generator, dtype=torch.double)
    items = torch.randint(0, 7, (9, 2), generator=generator) if masked else None
    got = info_nce(first, second, temperature=temperature, items=items)
    assert got.dtype == torch.double
    assert got.item() == pytest.approx(info_nce_by_hand(first, second, temperature, items), rel=1e-12)


def test_false_negatives_are_left_out():
    items = torch.tensor([[0, 1], [0, 2], [3, 1], [4, 0]])
    counted = [
        [1, 0, 0, 0],
        [0, 1, 1, 0],
        [0, 1, 1, 1],
        [1, 1, 1, 1],
    ]  # row: first item of pair i; column: second item of pair j
    first, second = torch.nn.functional.normalize(torch.randn(2, 4, 3, dtype=torch.double), dim=2)
    scores = first @ second.T / 0.2
    odds = scores.exp() * torch.tensor(counted)
    wanted = -((odds.diag() / odds.sum(1)).log().mean() + (odds.diag() / odds.sum(0)).log().mean()) / 2
    assert_close(info_nce(first, second, temperature=0.2, items=items), wanted)


def test_distinct_items_need_no_mask():
    first, second = torch.randn(2, 6, 4)
    items = torch.arange(12).reshape(6, 2)
    assert_close(info_nce(first, second, items=items), info_nce(first, second))


sequences = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=8), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(sequences, st.integers(1, 3))
def test_pairs_come_as_often_as_they_cooccur(lists, window):
    arrays = [np.array(items) for items in lists]
    counts = np.triu(cooccurrence(arrays, 7, window).toarray(), k=1)
    if not counts.any():
        with pytest.raises(ValueError, match="no two items co-occur"):
            cooccurring_pairs(arrays, 7, window=window, max_pairs=10)
        return
    pairs = cooccurring_pairs(arrays, 7, window=window, max_pairs=40_000, seed=1)
    assert pairs.shape == (40_000, 2)
    assert pairs.dtype == np.int64
    drawn = np.zeros((7, 7))
    np.add.at(drawn, (pairs.min(1), pairs.max(1)), 1)
    np.testing.assert_allclose(drawn / 40_000, counts / counts.sum(), atol=0.015)
    assert abs((pairs[:, 0] < pairs[:, 1]).mean() - 0.5) < 0.015


def test_pairs_are_decided_by_the_seed():
    arrays = [np.arange(20)]
    first, again, other = (cooccurring_pairs(arrays, 20, max_pairs=50, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def behaving_items(seed: int = 0):
    """120 items of six groups: in their content the group is weak and noise is strong; users stay within a group. The last 40 items have no
    behaviour."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(6), 20))
    content = rng.normal(size=(120, 16))
    content[:, :6] = np.eye(6)[group]
    warm = np.arange(80)
    users = [rng.permutation(warm[group[:80] == one]) for one in list(range(6)) * 10]
    return content, group, cooccurring_pairs(users, 120, max_pairs=5000)


def separation(vectors, group):
    """Mean cosine within a group less mean cosine across, without an item's cosine to itself."""
    similar = vectors @ vectors.T
    same = group[:, None] == group
    others = ~np.eye(len(group), dtype=bool)
    return similar[same & others].mean() - similar[~same].mean()


def test_aligned_content_follows_behaviour_also_of_items_without_any():
    content, group, pairs = behaving_items()
    aligned = align_embeddings(content, pairs, dim=8, temperature=0.2, steps=300, batch_size=64)
    unit = content / np.linalg.norm(content, axis=1, keepdims=True)
    assert aligned.shape == (120, 8)
    assert aligned.dtype == np.float32
    assert np.linalg.norm(aligned, axis=1) == close(np.ones(len(aligned)))
    for rows in (slice(0, 80), slice(80, 120)):
        assert separation(aligned[rows], group[rows]) > 3 * separation(unit[rows], group[rows])


def test_training_starts_at_the_contents_geometry():
    content, _, pairs = behaving_items()
    start = align_embeddings(content, pairs, dim=16, steps=1, learning_rate=0.0)
    unit = content / np.linalg.norm(content, axis=1, keepdims=True)
    assert start @ start.T == close(unit @ unit.T)


def test_one_map_for_all_items():
    content, _, pairs = behaving_items()
    content[50] = content[3] * 2.5  # the content of a consumed item, at another length
    content[51] = 0
    aligned = align_embeddings(content, pairs, dim=8, steps=20)
    assert aligned[50] == close(aligned[3])
    assert np.isfinite(aligned).all()
    assert align_embeddings(np.zeros((5, 4)), np.array([[0, 1]]), steps=3).shape == (
        5,
        4,
    )  # no more dimensions than content


def test_a_seed_decides_and_the_callers_random_state_stays():
    content, _, pairs = behaving_items()
    before = torch.get_rng_state()
    first, again, other = (align_embeddings(content, pairs, dim=8, steps=10, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_refusals():
    content, _, pairs = behaving_items()
    with pytest.raises(ValueError, match="pairs hold item indices 0 to 120, but the embeddings have rows 0 to 119"):
        align_embeddings(content, np.array([[0, 120]]))
    with pytest.raises(ValueError, match=r"pairs must be \(P, 2\).*got shape \(0, 2\)"):
        align_embeddings(content, np.zeros((0, 2), dtype=np.int64))
    content[7, 2] = np.inf
    with pytest.raises(ValueError, match=r"1 of 120 rows contain NaN or infinite values \(first: row 7\)"):
        align_embeddings(content, pairs)
