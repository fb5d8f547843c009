"""Imported semantic IDs: collisions are counted and resolved."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.semantic_ids.formats.imported import ImportedIDs

COLLIDING = ImportedIDs(["a", "b", "c", "d", "e"], [[0, 2], [1, 1], [0, 2], [0, 0], [0, 2]])


@st.composite
def imports(draw):
    levels = draw(st.integers(1, 3))
    row = st.lists(st.integers(0, 3), min_size=levels, max_size=levels)
    codes = np.array(draw(st.lists(row, min_size=1, max_size=14)))
    return ImportedIDs([f"i{n}" for n in range(len(codes))], codes)


class TestCollisions:
    def test_counts_and_groups(self):
        assert COLLIDING.collisions == 2
        assert COLLIDING.groups() == [["a", "c", "e"]]
        two = ImportedIDs([9, 8, 7, 6], [[1], [0], [0], [1]])
        assert two.groups() == [[9, 6], [8, 7]]
        assert two.groups(limit=1) == [[9, 6]]

    def test_error_is_the_catalogues(self):
        with pytest.raises(ValueError, match=r"2 items share a semantic ID with another, e.g. 'a' and 'c'"):
            COLLIDING.to_catalogue()

    def test_assign_by_hand(self):
        catalogue, moved = COLLIDING.to_catalogue("assign", codebook_sizes=[2, 5], popularity=np.arange(5))
        assert catalogue.codes.tolist() == [[0, 2], [1, 1], [0, 1], [0, 0], [0, 3]]
        assert moved.tolist() == [False, False, True, False, True]
        assert catalogue.popularity.tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(
            ValueError,
            match=r"4 items share the prefix \(0,\) \(first: 'a'\), but the last level has only 3 codes.*extra-digit",
        ):
            COLLIDING.to_catalogue("assign")

    def test_extra_digit_by_hand(self):
        catalogue, moved = COLLIDING.to_catalogue("extra-digit")
        assert catalogue.codes.tolist() == [[0, 2, 0], [1, 1, 0], [0, 2, 1], [0, 0, 0], [0, 2, 2]]
        assert catalogue.codebook_sizes == [2, 3, 3]
        assert moved.tolist() == [False, False, True, False, True]
        assert COLLIDING.to_catalogue("extra-digit", [4, 4]).catalogue.codebook_sizes == [4, 4, 3]
        assert COLLIDING.to_catalogue("extra-digit", [4, 4, 4]).catalogue.codebook_sizes == [4, 4, 4]

    @settings(deadline=None, max_examples=60)
    @given(imports())
    def test_policies(self, imported):
        rows = list(map(tuple, imported.codes.tolist()))
        count = Counter(rows)
        assert imported.collisions == len(rows) - len(count)
        assert sum(map(len, imported.groups())) == sum(n for n in count.values() if n > 1)
        later = np.array([rows[i] in rows[:i] for i in range(len(rows))])

        extra, moved = imported.to_catalogue("extra-digit")
        assert extra.codes[:, -1].tolist() == [rows[:i].count(rows[i]) for i in range(len(rows))]
        assert extra.codebook_sizes[-1] == max(count.values())
        np.testing.assert_array_equal(moved, later)

        bucket = max(Counter(row[:-1] for row in rows).values())
        assigned, moved = imported.to_catalogue("assign", [*imported.codebook_sizes[:-1], max(bucket, 4)])
        np.testing.assert_array_equal(moved, later)
        np.testing.assert_array_equal(assigned.codes[~moved], imported.codes[~moved])
        np.testing.assert_array_equal(assigned.codes[:, :-1], imported.codes[:, :-1])
        assert len(np.unique(assigned.codes, axis=0)) == len(rows)
        for i in np.flatnonzero(moved):  # no lower code was free when its turn came
            taken = {row[-1] for row in rows if row[:-1] == rows[i][:-1]}
            taken |= {assigned.codes[j, -1] for j in range(i) if moved[j] and rows[j][:-1] == rows[i][:-1]}
            assert set(range(assigned.codes[i, -1])) <= taken

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda: COLLIDING.to_catalogue("drop"), "on_collision must be .* got 'drop'"),
            (lambda: COLLIDING.to_catalogue(codebook_sizes=[4]), r"2 levels, but codebook_sizes has 1: \[4\]"),
            (lambda: COLLIDING.to_catalogue("extra-digit", [4]), "3 levels, but codebook_sizes has 1"),
            (lambda: COLLIDING.to_catalogue("extra-digit", [4, 4, 2]), "level 2"),
            (lambda: ImportedIDs(["a", "a"], [[0], [1]]).to_catalogue(), "1 item ids repeat"),
            (lambda: ImportedIDs(["a"], [[0], [1]]), "codes of 2 items, but 1 item_ids"),
            (lambda: ImportedIDs(["a"], [0]), r"got shape \(1,\)"),
            (lambda: ImportedIDs([], np.zeros((0, 2), int)), r"got shape \(0, 2\)"),
            (lambda: ImportedIDs(["a"], [[0.5]]), "must be integers, not float64"),
        ],
    )
    def test_refuses(self, call, words):
        with pytest.raises(ValueError, match=words):
            call()
