"""The report: every number against a plain computation, the table and the picture."""

import numpy as np
import pytest
import torch

from onerec_hf.semantic_ids import compare_reports, fit_semantic_ids, plot_reports

VECTORS = np.random.default_rng(1).normal(size=(150, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def fitted():
    return fit_semantic_ids(range(150), VECTORS, [5, 6, 40])


def test_numbers_equal_a_plain_computation(fitted):
    report, codes = fitted.report, fitted.catalogue.codes
    for level, size in enumerate([5, 6, 40]):
        counts = np.bincount(codes[:, level], minlength=size)
        share = counts[counts > 0] / 150
        assert report.utilisation[level] == pytest.approx((counts > 0).mean())
        assert report.entropy[level] == pytest.approx(-(share * np.log(share)).sum() / np.log(size))
        assert report.distinct_prefixes[level] == len(np.unique(codes[:, : level + 1], axis=0))
    distances = np.square(VECTORS[:, None] - VECTORS[None]).sum(2) + np.where(np.eye(150), np.inf, 0)
    near = distances.argsort(1)[:, :10]
    for level in range(3):
        same = (codes[near, : level + 1] == codes[:, None, : level + 1]).all(2)
        assert report.neighbour_agreement[level] == pytest.approx(same.mean(), abs=1e-9)
    assert report.neighbour_agreement[0] > 1.5 / 5  # chance for five balanced codes is a fifth
    assert report.distinct_prefixes[2] == 150


def test_table_names_method_levels_and_collisions(fitted):
    lines = fitted.report.table().splitlines()
    assert lines[1].split()[:3] == ["balanced", "1", "5"]
    assert f"{fitted.report.collisions} collisions among 150 items, resolved by moving" in lines[-1]
    extra = fit_semantic_ids(range(150), VECTORS, [5, 6], on_collision="extra-digit").report
    assert f"resolved by an additional level of {extra.extra_digit} codes" in extra.table()


def test_methods_stand_side_by_side_in_table_and_picture(fitted, tmp_path):
    plain = fit_semantic_ids(range(150), VECTORS, [5, 6, 40], method="kmeans").report
    text = compare_reports([fitted.report, plain])
    assert text.index("balanced  ") < text.index("kmeans  ")
    plot_reports([fitted.report, plain], tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [file.name for file in tmp_path.iterdir()] == ["report.png"]


def test_picture_without_matplotlib_says_what_to_install(fitted, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"onerec-hf\[plots\]"):
        plot_reports([fitted.report], tmp_path / "report.png")


def test_a_single_item_has_a_report():
    report = fit_semantic_ids([7], torch.ones(1, 3), [1, 1]).report
    assert report.entropy == [1.0, 1.0]
    assert report.neighbour_agreement == [1.0, 1.0]
