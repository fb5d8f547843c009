"""Counts of pairs of items, and neighbour lists, against loops that say the same."""

import numpy as np
import pytest
import scipy.sparse as sp

from onerec_hf.data import item_pairs
from onerec_hf.data.item_pairs import follow_counts, near_counts, top_neighbours
from tests.rounding import assert_close

NUM_ITEMS = 12


@pytest.fixture
def sequences():
    """Sequences of 0 to 20 items, with repeats."""
    draw = np.random.default_rng(0)
    return [draw.integers(NUM_ITEMS, size=length) for length in (0, 1, 2, 3, 5, 8, 13, 20, 20, 0, 7, 1)]


def loop_counts(sequences, decay, back, window, longest):
    counts = np.zeros((NUM_ITEMS, NUM_ITEMS))
    for sequence in sequences:
        latest = list(sequence)[-longest:]
        for first, a in enumerate(latest):
            for second in range(first + 1, min(first + window + 1, len(latest))):
                b, weight = latest[second], decay ** (second - first - 1)
                counts[a, b] += weight
                counts[b, a] += weight * back
    return counts


@pytest.mark.parametrize(("window", "longest"), [(8, 50), (3, 6), (1, 2), (8, 1)])
def test_near_counts_are_a_loop_s(sequences, window, longest):
    counts = near_counts(sequences, NUM_ITEMS, 0.5, 0.25, window, longest)  # powers of two: sums are exact
    assert counts.dtype == np.float32
    assert (counts.toarray() == loop_counts(sequences, 0.5, 0.25, window, longest)).all()
    assert counts.has_canonical_format


def test_default_weights_are_the_prototype_s(sequences):
    assert_close(near_counts(sequences, NUM_ITEMS).toarray(), loop_counts(sequences, 0.7, 0.3, 8, 50), terms=100)


def test_follow_counts_are_a_loop_s(sequences):
    assert (follow_counts(sequences, NUM_ITEMS).toarray() == loop_counts(sequences, 1, 0, 1, 50)).all()
    assert (follow_counts(sequences, NUM_ITEMS, longest=4).toarray() == loop_counts(sequences, 1, 0, 1, 4)).all()
    assert follow_counts(sequences, NUM_ITEMS).data.all()  # no stored zeros


def test_flat_sequences_with_offsets_count_the_same(sequences):
    flat = np.concatenate(sequences), np.cumsum([0, *map(len, sequences)])
    assert (near_counts(flat, NUM_ITEMS) != near_counts(sequences, NUM_ITEMS)).nnz == 0
    assert (follow_counts(flat, NUM_ITEMS) != follow_counts(sequences, NUM_ITEMS)).nnz == 0


def test_items_outside_of_the_catalogue_keep_their_place():
    counts = near_counts([np.array([2, -1, 4, -1])], NUM_ITEMS, decay=0.5, back=0)
    assert (counts[2, 4], counts.nnz) == (0.5, 1)
    assert follow_counts([np.array([2, -1, 4, -1])], NUM_ITEMS).nnz == 0


def test_old_pairs_and_pairs_with_new_items_are_all_pairs(sequences):
    """Appended items, items of new users, and users without new ones."""
    cut = [len(sequence) * number % 4 // 2 * len(sequence) // 2 for number, sequence in enumerate(sequences)]
    old = [sequence[:length] for sequence, length in zip(sequences, cut, strict=True)]
    new = np.concatenate([np.arange(len(s)) >= length for s, length in zip(sequences, cut, strict=True)])
    assert 0 < new.sum() < len(new)
    weights = 0.5, 0.25
    together = near_counts(old, NUM_ITEMS, *weights) + near_counts(sequences, NUM_ITEMS, *weights, new=new)
    assert (together != near_counts(sequences, NUM_ITEMS, *weights)).nnz == 0
    together = follow_counts(old, NUM_ITEMS) + follow_counts(sequences, NUM_ITEMS, new=new)
    assert (together != follow_counts(sequences, NUM_ITEMS)).nnz == 0
    with pytest.raises(ValueError, match=r"new has 1 entries, the sequences have"):
        follow_counts(sequences, NUM_ITEMS, new=new[:1])


@pytest.mark.parametrize("nothing", [[], [np.zeros(0, dtype=np.int64)], [np.array([3]), np.array([4])]])
def test_no_pairs(nothing):
    assert near_counts(nothing, NUM_ITEMS).nnz == follow_counts(nothing, NUM_ITEMS).nnz == 0
    found, values = top_neighbours(near_counts(nothing, NUM_ITEMS), 3)
    assert (found == -1).all()
    assert (values == 0).all()
    assert found.shape == values.shape == (NUM_ITEMS, 3)


def test_bad_input():
    with pytest.raises(ValueError, match=r"0\.\.11, the catalogue, or be -1; found -2 to 4"):
        near_counts([np.array([-2, 4])], NUM_ITEMS)
    with pytest.raises(ValueError, match="found 0 to 12"):
        follow_counts([np.array([0, 12])], NUM_ITEMS)
    with pytest.raises(ValueError, match="offsets must go from 0 to 2"):
        near_counts((np.array([0, 1]), np.array([0, 1])), NUM_ITEMS)
    with pytest.raises(ValueError, match=r"k \(0\)"):
        top_neighbours(sp.csr_matrix((2, 2)), 0)
    with pytest.raises(ValueError, match=r"negative value \(-1\)"):
        top_neighbours(sp.csr_matrix([[-1.0, 2.0]]), 1)


@pytest.mark.parametrize("block", [1, 7, 10**6])
@pytest.mark.parametrize("k", [1, 4, 40])
def test_neighbours_are_a_sorted_loop_s(monkeypatch, block, k):
    monkeypatch.setattr(item_pairs, "_BLOCK", block)
    draw = np.random.default_rng(1)
    dense = draw.integers(0, 4, size=(9, 30)).astype(np.float32)  # many ties, some rows' worth of zeros
    dense[4] = 0
    rows, columns = draw.choice([0.5, 1, 2], size=9), draw.choice([0.5, 1, 2, 4], size=30)
    found, values = top_neighbours(sp.csr_matrix(dense), k, rows, columns)
    assert (found.dtype, values.dtype) == (np.int32, np.float32)
    for row in range(9):
        best = sorted((-dense[row, i] * columns[i] * rows[row], i) for i in range(30) if dense[row, i])[:k]
        assert found[row].tolist() == [i for _, i in best] + [-1] * (k - len(best))
        assert values[row].tolist() == [dense[row, i] for _, i in best] + [0] * (k - len(best))


def test_neighbours_of_any_sparse_format_and_unscaled():
    matrix = sp.coo_matrix(([1.0, 3.0, 2.0], ([0, 0, 2], [2, 0, 1])), shape=(3, 3))
    for each in (matrix, matrix.tocsc(), matrix.tocsr()):
        found, values = top_neighbours(each, 2)
        assert found.tolist() == [[0, 2], [-1, -1], [1, -1]]
        assert values.tolist() == [[3, 1], [0, 0], [2, 0]]
