"""ResidualQuantizer: what the levels leave over adds up, balance on every level, plain k-means, codebooks on disk."""

import sys

import pytest
import torch

from onerec_hf.semantic_ids import Quantizer, ResidualQuantizer, make_quantizer
from tests.rounding import assert_close

POINTS = torch.randn(203, 6, generator=torch.Generator().manual_seed(0))


def test_every_level_is_balanced_and_reduces_the_error():
    quantizer = ResidualQuantizer([8, 5, 4]).fit(POINTS)
    errors = [float(quantizer.reconstruction_error(POINTS, quantizer.codes_[:, :levels])) for levels in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    for level, size in enumerate([8, 5, 4]):
        sizes = quantizer.codes_[:, level].bincount(minlength=size)
        assert int(sizes.max() - sizes.min()) <= 1


def test_levels_quantise_what_the_levels_before_left_over():
    quantizer = ResidualQuantizer([8, 5]).fit(POINTS)
    left = POINTS - quantizer.codebooks_[0][quantizer.codes_[:, 0]]
    for code in range(5):
        mean = left[quantizer.codes_[:, 1] == code].mean(0)
        assert_close(quantizer.codebooks_[1][code], mean)
    wanted = (left - quantizer.codebooks_[1][quantizer.codes_[:, 1]]).square().sum(1).mean()
    assert_close(quantizer.reconstruction_error(POINTS, quantizer.codes_), wanted)


def test_encode_takes_the_nearest_code_of_each_level():
    quantizer = ResidualQuantizer([8, 5]).fit(POINTS)
    new = POINTS[:20] + 0.01
    codes = quantizer.encode(new)
    left = new
    for level, codebook in enumerate(quantizer.codebooks_):
        assert torch.equal(codes[:, level], torch.cdist(left, codebook).argmin(1))
        left = left - codebook[codes[:, level]]


def test_last_level_is_what_the_levels_before_left_over():
    quantizer = ResidualQuantizer([8, 5, 4]).fit(POINTS)
    residuals, codebook = quantizer.last_level(POINTS, quantizer.codes_)
    assert_close(residuals, POINTS - quantizer.decode(quantizer.codes_[:, :2]))
    assert codebook is quantizer.codebooks_[2]


def test_fit_leaves_the_points_alone():
    points = POINTS.clone()
    ResidualQuantizer([8, 5]).fit(points).encode(points)
    assert torch.equal(points, POINTS)


def test_plain_kmeans_is_the_interface_without_the_balance():
    quantizer = make_quantizer("kmeans", [8, 5]).fit(POINTS)
    assert quantizer.method == "kmeans"
    balanced = make_quantizer("balanced", [8, 5]).fit(POINTS)
    sizes = quantizer.codes_[:, 0].bincount(minlength=8)
    assert int(sizes.max() - sizes.min()) > 1
    first = [float(q.reconstruction_error(POINTS, q.codes_[:, :1])) for q in (quantizer, balanced)]
    assert first[0] < first[1]


def test_plain_kmeans_without_faiss_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"onerec-hf\[faiss\]"):
        make_quantizer("kmeans", [4]).fit(POINTS)


@pytest.mark.parametrize("method", ["balanced", "kmeans"])
def test_round_trip(tmp_path, method):
    quantizer = make_quantizer(method, [8, 5]).fit(POINTS)
    quantizer.save(tmp_path / "codebooks.safetensors")
    loaded = Quantizer.load(tmp_path / "codebooks.safetensors")
    assert (loaded.codebook_sizes, loaded.method) == ([8, 5], method)
    assert torch.equal(loaded.encode(POINTS), quantizer.encode(POINTS))
    assert [file.name for file in tmp_path.iterdir()] == ["codebooks.safetensors"]


def test_refuses_damaged_and_other_files(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "codebooks.safetensors"
    ResidualQuantizer([8, 5]).fit(POINTS).save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        Quantizer.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"is not a saved quantiser .its tensors: weight"):
        Quantizer.load(path)
    save_file({"codebook.0": torch.zeros(2, 2)}, path, metadata={"format": "onerec-quantizer", "version": "9"})
    with pytest.raises(ValueError, match=r"quantiser version 9.*update onerec_hf"):
        Quantizer.load(path)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ResidualQuantizer([]), "at least one level"),
        (lambda: ResidualQuantizer([4], clustering="fuzzy"), "clustering must be"),
        (lambda: make_quantizer("pq", [4]), "unknown quantiser 'pq'; choose one of balanced, kmeans, rq-vae"),
        (lambda: ResidualQuantizer([4, 300]).fit(POINTS), "fewer items than codes: 203 items"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
