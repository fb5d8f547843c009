"""fit_semantic_ids: from embeddings to a catalogue and a true report."""

import numpy as np
import pytest
import torch

from onerec_hf.semantic_ids import fit_semantic_ids

VECTORS = np.random.default_rng(0).normal(size=(120, 8)).astype(np.float32)
IDS = [f"item-{i}" for i in range(120)]


def test_catalogue_is_unique_and_report_is_true():
    fitted = fit_semantic_ids(IDS, VECTORS, [6, 5, 10], popularity=np.arange(120), recipe="random")
    codes = fitted.catalogue.codes
    assert fitted.catalogue.item_ids == IDS
    assert len(np.unique(codes, axis=0)) == 120
    report = fitted.report
    for level, size in enumerate([6, 5, 10]):
        counts = np.bincount(codes[:, level], minlength=size)
        assert report.cluster_sizes[level] == [counts.min(), counts.max()]
    assert report.cluster_sizes[:2] == [[20, 20], [24, 24]]
    before = fitted.quantizer.codes_
    assert report.collisions == 120 - len(torch.unique(before, dim=0)) > 0
    assert report.moved == int((before.numpy() != codes).any(1).sum())
    errors = [float(fitted.quantizer.reconstruction_error(VECTORS, before[:, :n])) for n in (1, 2, 3)]
    variance = float(np.square(VECTORS - VECTORS.mean(0)).sum(1).mean())
    assert report.residual_energy == pytest.approx([error / variance for error in errors], rel=1e-4)
    assert f"{report.collisions} collisions" in report.table()
    assert report.as_dict()["num_items"] == 120


def test_is_deterministic():
    first, second = (fit_semantic_ids(IDS, VECTORS, [6, 5, 10], seed=1) for _ in range(2))
    assert first.catalogue.hash == second.catalogue.hash
    assert fit_semantic_ids(IDS, VECTORS, [6, 5, 10], seed=2).catalogue.hash != first.catalogue.hash


def test_identical_items_still_get_ids_of_their_own():
    fitted = fit_semantic_ids(list(range(64)), np.ones((64, 4)), [4, 4, 16])
    assert len(np.unique(fitted.catalogue.codes, axis=0)) == 64


@pytest.mark.parametrize(
    ("ids", "vectors", "sizes", "words"),
    [
        (IDS, VECTORS[:5], [4], "a row for each of 120 items"),
        (IDS, np.where(np.arange(120)[:, None] == 7, np.nan, VECTORS), [4, 4, 9], "1 of 120 items.*'item-7'"),
        (IDS, VECTORS, [256, 4], "fewer items than codes: 120 items cannot fill"),
        (IDS, VECTORS, [2, 2, 2], "items share the prefix"),
        ([*IDS[:-1], IDS[0]], VECTORS, [6, 5, 10], "item ids repeat"),
    ],
)
def test_refuses(ids, vectors, sizes, words):
    with pytest.raises(ValueError, match=words):
        fit_semantic_ids(ids, vectors, sizes)
