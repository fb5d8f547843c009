"""ResidualQuantizer: what the levels leave over adds up, balance on every level, codebooks on disk."""

import pytest
import torch

from onerec_hf.semantic_ids import ResidualQuantizer

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
        torch.testing.assert_close(quantizer.codebooks_[1][code], mean, atol=1e-5, rtol=1e-4)
    wanted = (left - quantizer.codebooks_[1][quantizer.codes_[:, 1]]).square().sum(1).mean()
    torch.testing.assert_close(quantizer.reconstruction_error(POINTS, quantizer.codes_), wanted)


def test_encode_takes_the_nearest_code_of_each_level():
    quantizer = ResidualQuantizer([8, 5]).fit(POINTS)
    new = POINTS[:20] + 0.01
    codes = quantizer.encode(new)
    left = new
    for level, codebook in enumerate(quantizer.codebooks_):
        assert torch.equal(codes[:, level], torch.cdist(left, codebook).argmin(1))
        left = left - codebook[codes[:, level]]


def test_round_trip(tmp_path):
    quantizer = ResidualQuantizer([8, 5]).fit(POINTS)
    quantizer.save(tmp_path / "codebooks.safetensors")
    loaded = ResidualQuantizer.load(tmp_path / "codebooks.safetensors")
    assert loaded.codebook_sizes == [8, 5]
    assert torch.equal(loaded.encode(POINTS), quantizer.encode(POINTS))
    assert [file.name for file in tmp_path.iterdir()] == ["codebooks.safetensors"]


def test_refuses_damaged_and_other_files(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "codebooks.safetensors"
    ResidualQuantizer([8, 5]).fit(POINTS).save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        ResidualQuantizer.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no codebooks .its tensors: weight"):
        ResidualQuantizer.load(path)
    with pytest.raises(ValueError, match="at least one level"):
        ResidualQuantizer([])
