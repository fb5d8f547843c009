"""fit_semantic_ids: from embeddings to a catalogue and a true report."""

import numpy as np
import pytest
import torch

from onerec_hf.semantic_ids import extend_catalogue, fit_semantic_ids

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


def test_extra_digit_keeps_the_codes_and_counts_the_groups():
    fitted = fit_semantic_ids(IDS, VECTORS, [6, 5], on_collision="extra-digit")
    codes = fitted.catalogue.codes
    assert np.array_equal(codes[:, :2], fitted.quantizer.codes_.numpy())
    largest = int(torch.unique(fitted.quantizer.codes_, dim=0, return_counts=True)[1].max())
    assert fitted.catalogue.codebook_sizes == [6, 5, largest]
    assert (fitted.report.extra_digit, fitted.report.moved) == (largest, 0)
    assert len(np.unique(codes, axis=0)) == 120


def test_new_items_get_their_nearest_free_codes():
    fitted = fit_semantic_ids(IDS, VECTORS, [6, 5, 10])
    new = np.concatenate([VECTORS[:3] + 1e-4, np.random.default_rng(5).normal(size=(7, 8)).astype(np.float32)])
    names = [f"new-{i}" for i in range(10)]
    grown = extend_catalogue(fitted.catalogue, fitted.quantizer, names, new)
    assert np.array_equal(grown.codes[:120], fitted.catalogue.codes)
    assert len(np.unique(grown.codes, axis=0)) == 130
    codes = grown.codes[grown.indices(names)]
    nearest = fitted.quantizer.encode(new).numpy()
    assert np.array_equal(codes[:, :2], nearest[:, :2])
    taken = {tuple(row) for row in fitted.catalogue.codes.tolist()}
    for code, wanted in zip(codes.tolist(), nearest.tolist(), strict=True):
        alone = (nearest[:, :2] == np.array(wanted[:2])).all(1).sum() == 1
        if alone and tuple(wanted) not in taken:
            assert code == wanted


def test_new_items_without_room_are_refused():
    fitted = fit_semantic_ids(range(8), np.arange(8.0)[:, None], [2, 4])
    with pytest.raises(ValueError, match="no free code is left near the prefix"):
        extend_catalogue(fitted.catalogue, fitted.quantizer, [8], np.array([[9.0]]))
    other = fit_semantic_ids(range(8), np.arange(8.0)[:, None], [2, 8])
    with pytest.raises(ValueError, match=r"codebook sizes \[2, 8\], the catalogue \[2, 4\]"):
        extend_catalogue(fitted.catalogue, other.quantizer, [8], np.array([[9.0]]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        extend_catalogue(fitted.catalogue, fitted.quantizer, [8], np.array([[np.nan]]))


def test_a_popularity_rank_needs_popularity():
    fitted = fit_semantic_ids(IDS, VECTORS, [6, 5], on_collision="popularity-rank", popularity=np.arange(120))
    assert fitted.catalogue.codes[119, 2] == 0
    assert fitted.report.extra_digit == fitted.catalogue.codebook_sizes[2] > 1
    with pytest.raises(ValueError, match="needs popularity; pass one count per item"):
        fit_semantic_ids(IDS, VECTORS, [6, 5], on_collision="popularity-rank")
    with pytest.raises(ValueError, match="popularity has 3 counts for 120 items"):
        fit_semantic_ids(IDS, VECTORS, [6, 5], on_collision="popularity-rank", popularity=np.arange(3))


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
        (IDS, VECTORS[:5], [4], "one row for each of 120 items"),
        (IDS, np.where(np.arange(120)[:, None] == 7, np.nan, VECTORS), [4, 4, 9], "1 of 120 items.*'item-7'"),
        (IDS, VECTORS, [256, 4], "fewer items than codes: 120 items cannot fill"),
        (IDS, VECTORS, [2, 2, 2], "items share the prefix"),
        ([*IDS[:-1], IDS[0]], VECTORS, [6, 5, 10], "item ids repeat"),
    ],
)
def test_refuses(ids, vectors, sizes, words):
    with pytest.raises(ValueError, match=words):
        fit_semantic_ids(ids, vectors, sizes)
