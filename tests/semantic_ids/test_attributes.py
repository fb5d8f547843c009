"""Attribute embeddings: what makes items close, absent attributes, determinism, errors."""

import numpy as np
import pytest

from onerec_hf.semantic_ids import attribute_embeddings, embedding_fingerprint

TAGS, AUTHORS, TYPES = ["1,2", "1,2", "9", ""], ["a", "b", "c", ""], ["x", "x", "y", ""]
DURATIONS = [10_000, 11_000, 200_000, 0]


def test_items_alike_are_close_and_absent_attributes_are_zero():
    vectors = attribute_embeddings(TAGS, AUTHORS, TYPES, DURATIONS)
    assert vectors.dtype == np.float32
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 1
    assert not vectors[3].any()
    tags, author, kind, duration = np.split(vectors, [32, 64, 96], axis=1)
    for part in (tags, author, kind, duration):
        np.testing.assert_allclose(np.linalg.norm(part[:3], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(tags[0], tags[1])
    assert duration[0] @ duration[1] > 0.9 > duration[0] @ duration[2]


def test_rare_tags_weigh_more():
    vectors = attribute_embeddings(["1,7", "1,8", "1,9", "7"], [""] * 4, [""] * 4, [0] * 4, dim=512)
    assert vectors[0] @ vectors[3] > vectors[0] @ vectors[1]  # 7 is rarer than 1


def test_the_seed_decides_the_fingerprint():
    prints = {
        embedding_fingerprint(attribute_embeddings(TAGS, AUTHORS, TYPES, DURATIONS, seed=s), "attributes")
        for s in (0, 0, 1)
    }
    assert len(prints) == 2


def test_bad_attributes_get_one_clear_error():
    with pytest.raises(ValueError, match=r"1 of 4 durations are negative or not finite \(first: row 2, nan\)"):
        attribute_embeddings(TAGS, AUTHORS, TYPES, [1, 2, float("nan"), 3])
    with pytest.raises(ValueError, match="unequal lengths: 4 tags, 3 authors"):
        attribute_embeddings(TAGS, AUTHORS[:3], TYPES, DURATIONS)
