"""RQVAEQuantizer: its loss and gradients by hand, what training reaches, files, and a caller who is left undisturbed."""

import os
import random

import numpy as np
import pytest
import torch
import transformers

from onerec_hf.semantic_ids.quantizer import Quantizer, make_quantizer
from onerec_hf.semantic_ids.rq_vae import RQVAEConfig, RQVAEModel, RQVAEQuantizer
from tests.rounding import assert_close

SMALL = {
    "hidden_sizes": (24,),
    "latent_size": 4,
    "epochs": 30,
    "warmup_epochs": 3,
    "batch_size": 64,
    "learning_rate": 5e-3,
}


def grouped_points(rows: int = 400, seed: int = 0) -> torch.Tensor:
    """Points around 12 centres on a plane in 10 dimensions, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(2, 10, generator=generator)
    centres = 4 * torch.randn(12, 2, generator=generator) @ plane
    noise = 0.3 * torch.randn(rows, 10, generator=generator)
    return 7 + centres[torch.arange(rows) % 12] + noise


def random_model(seed: int = 0, **config) -> RQVAEModel:
    torch.manual_seed(seed)
    model = RQVAEModel(
        RQVAEConfig(**{"input_size": 6, "codebook_sizes": [5, 4], "hidden_sizes": [8], "latent_size": 3, **config})
    )
    for codebook in model.codebooks:
        torch.nn.init.normal_(codebook)
    return model


@pytest.fixture(scope="module")
def fitted():
    return RQVAEQuantizer([8, 6], **SMALL).fit(grouped_points())


def test_losses_equal_a_hand_computation():
    model, points = random_model(beta=0.4), torch.randn(7, 6)
    model.set_input_statistics(points)
    output = model(points)
    reconstruction = codebook = commitment = 0.0
    with torch.no_grad():
        inputs = (points - points.mean(0)) / (points - points.mean(0)).square().sum(1).mean().sqrt()
        for row, x in enumerate(inputs):
            z = model.encoder(x)
            left, chosen = z, torch.zeros(3)
            for level, table in enumerate(model.codebooks):
                distances = [float((left - code).square().sum()) for code in table]
                code = int(np.argmin(distances))
                assert int(output.codes[row, level]) == code
                codebook += distances[code] / 7
                commitment += distances[code] / 7
                left, chosen = left - table[code], chosen + table[code]
            reconstruction += float((x - model.decoder(chosen)).square().sum()) / 7
    assert output.reconstruction_loss.item() == pytest.approx(reconstruction, rel=1e-5)
    assert output.codebook_loss.item() == pytest.approx(codebook, rel=1e-5)
    assert output.commitment_loss.item() == pytest.approx(commitment, rel=1e-5)
    assert output.loss.item() == pytest.approx(reconstruction + codebook + 0.4 * commitment, rel=1e-5)


def test_gradients_go_where_the_stops_let_them():
    model, points = random_model(), torch.randn(9, 6)
    encoder, decoder, codebooks = model.encoder[0].weight, model.decoder[0].weight, list(model.codebooks)

    def reached(loss):
        parameters = [encoder, decoder, *codebooks]
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return [gradient is not None and bool(gradient.any()) for gradient in gradients]

    output = model(points)
    assert reached(output.reconstruction_loss) == [True, True, False, False]
    assert reached(output.codebook_loss) == [False, False, True, True]
    assert reached(output.commitment_loss) == [True, False, False, False]


def test_the_decoders_gradient_passes_straight_through():
    model, points = random_model(), torch.randn(9, 6)
    latents = model.encoder(points).detach()
    quantized = model.quantized(model.encode(points)).requires_grad_()
    wanted = torch.autograd.grad((points - model.decoder(quantized)).square().sum(1).mean(), quantized)[0]
    caught = []

    def watch(module, args, output):
        output.register_hook(caught.append)

    model.encoder[-1].register_forward_hook(watch)
    model(points).reconstruction_loss.backward()
    assert_close(caught[0], wanted)
    assert not torch.equal(latents, quantized.detach())


def test_each_level_moves_to_the_mean_of_what_it_is_given():
    """The codebook term's gradient: 2 / B sum over the code's items (code - residual)."""
    model, points = random_model(), torch.randn(50, 6)
    output = model(points)
    output.codebook_loss.backward()
    left = model.latents(points)
    for codebook, codes in zip(model.codebooks, output.codes.unbind(1), strict=True):
        wanted = torch.zeros_like(codebook)
        wanted.index_add_(0, codes, 2 / 50 * (codebook.detach()[codes] - left))
        assert_close(codebook.grad, wanted)
        left = left - codebook.detach()[codes]


def test_codebooks_start_at_means_of_the_residuals():
    model, points = random_model(), grouped_points()[:, :6]
    model.set_input_statistics(points)
    with torch.no_grad():
        before = [
            float(model(points).codebook_loss),
            model.start_codebooks(points),
            float(model(points).codebook_loss),
        ]
    assert before[2] < before[0] / 2
    first, table = model.encode(points)[:, 0], model.codebooks[0].detach()
    latents = model.latents(points)
    for code in first.unique():
        torch.testing.assert_close(table[code], latents[first == code].mean(0), atol=1e-2, rtol=1e-2)


def test_training_beats_the_mean_and_uses_the_codes(fitted):
    points = grouped_points()
    assert len(fitted.losses_) == 30
    assert fitted.losses_[2] < fitted.losses_[0]
    assert fitted.losses_[-1] < fitted.losses_[3]
    trivial = (points - points.mean(0)).square().sum(1).mean()
    errors = [fitted.reconstruction_error(points, fitted.codes_[:, :levels]) for levels in (1, 2)]
    assert errors[1] < errors[0] < trivial
    assert errors[1] < 0.2 * trivial
    assert len(fitted.codes_[:, 0].unique()) >= 6
    assert fitted.codes_.shape == (400, 2)
    assert fitted.codes_.dtype == torch.int64
    assert torch.equal(fitted.encode(points.numpy()), fitted.codes_)


def test_codes_of_a_loaded_quantizer_are_the_nearest_in_latent_space(fitted, tmp_path):
    fitted.save(tmp_path / "quantizer.safetensors")
    loaded = Quantizer.load(tmp_path / "quantizer.safetensors")
    assert isinstance(loaded, RQVAEQuantizer)
    assert [file.name for file in tmp_path.iterdir()] == ["quantizer.safetensors"]
    assert loaded.codebook_sizes == [8, 6]
    assert not loaded.model_.training
    assert all(
        torch.equal(value, loaded.model_.state_dict()[name]) for name, value in fitted.model_.state_dict().items()
    )
    new = grouped_points(90, seed=0) + 0.05
    codes = loaded.encode(new)
    assert torch.equal(codes, fitted.encode(new))
    for levels in (1, 2):
        assert torch.equal(loaded.decode(codes[:, :levels]), fitted.decode(codes[:, :levels]))
    with torch.no_grad():
        left = loaded.model_.encoder((new - loaded.model_.input_mean) / loaded.model_.input_scale)
    for level, codebook in enumerate(loaded.model_.codebooks):
        assert torch.equal(codes[:, level], torch.cdist(left, codebook.detach()).argmin(1))
        if level == 1:
            residual, last = loaded.last_level(new, codes)
            assert_close(residual, left)
            assert torch.equal(last, codebook)
            assert not last.requires_grad
        left = left - codebook.detach()[codes[:, level]]


def test_the_network_is_saved_as_any_model(fitted, tmp_path):
    fitted.model_.save_pretrained(tmp_path)
    loaded = RQVAEModel.from_pretrained(tmp_path)
    assert loaded.config.codebook_sizes == [8, 6]
    assert torch.equal(loaded.encode(grouped_points()), fitted.codes_)
    assert torch.equal(loaded.decode(fitted.codes_), fitted.decode(fitted.codes_))


def test_decoding_is_the_network_in_the_inputs_units(fitted):
    codes = fitted.codes_[:20]
    model = fitted.model_
    with torch.no_grad():
        latents = model.codebooks[0][codes[:, 0]] + model.codebooks[1][codes[:, 1]]
        wanted = model.decoder(latents) * model.input_scale + model.input_mean
    assert_close(fitted.decode(codes), wanted)
    assert_close(model(grouped_points()[:20]).reconstruction, wanted)


@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_a_seed_decides_everything(warmup_epochs):
    points, settings = grouped_points(150), {**SMALL, "epochs": 4, "warmup_epochs": warmup_epochs}
    first, again, other = (RQVAEQuantizer([8, 6], **settings, seed=seed).fit(points) for seed in (3, 3, 4))
    assert first.losses_ == again.losses_ != other.losses_
    for name, value in first.model_.state_dict().items():
        assert torch.equal(value, again.model_.state_dict()[name]), name
    assert torch.equal(first.codes_, again.codes_)


def test_fit_leaves_no_trace(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    quantizer = RQVAEQuantizer([8, 6], **{**SMALL, "epochs": 2, "warmup_epochs": 1}).fit(grouped_points(100))
    quantizer.save("quantizer.safetensors")
    Quantizer.load("quantizer.safetensors")
    assert random.getstate() == states[0]
    assert all(np.array_equal(now, before) for now, before in zip(np.random.get_state(), states[1], strict=True))
    assert torch.equal(torch.get_rng_state(), states[2])
    assert os.listdir(tmp_path) == ["quantizer.safetensors"]
    assert capfd.readouterr() == ("", "")


def test_progress_shows_where_transformers_is_told_to_talk(capfd):
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    try:
        transformers.logging.set_verbosity_info()
        transformers.logging.enable_progress_bar()
        RQVAEQuantizer([4], **{**SMALL, "epochs": 2, "warmup_epochs": 1}).fit(grouped_points(40))
    finally:
        transformers.logging.set_verbosity(verbosity)
        if not bars:
            transformers.logging.disable_progress_bar()
    assert "2/2" in capfd.readouterr().err


def test_equal_points_stay_finite():
    quantizer = RQVAEQuantizer([3, 2], **{**SMALL, "epochs": 3, "warmup_epochs": 1}).fit(torch.full((20, 5), 2.0))
    assert torch.isfinite(quantizer.decode(quantizer.codes_)).all()


def test_made_by_name():
    quantizer = make_quantizer("rq-vae", [4, 4], seed=2, epochs=7, latent_size=3)
    assert isinstance(quantizer, RQVAEQuantizer)
    assert (quantizer.seed, quantizer.epochs, quantizer.latent_size) == (2, 7, 3)


def test_refusals():
    points = grouped_points(30)
    points[[4, 9], 2] = float("nan")
    with pytest.raises(ValueError, match=r"2 of 30 rows contain NaN or infinite values \(first: row 4\)"):
        RQVAEQuantizer([8]).fit(points)
    with pytest.raises(ValueError, match="fewer items than codes: 7 items cannot fill 8 clusters"):
        RQVAEQuantizer([4, 8]).fit(grouped_points(7))
    with pytest.raises(ValueError, match=r"points must be \(items, dimensions\)"):
        RQVAEQuantizer([4]).fit(torch.zeros(5))
    with pytest.raises(ValueError, match="at least one level"):
        RQVAEQuantizer([])
    with pytest.raises(ValueError, match="all sizes must be at least 1"):
        RQVAEQuantizer([4], hidden_sizes=[0])
    with pytest.raises(ValueError, match="warmup_epochs=5 of epochs=5"):
        RQVAEQuantizer([4], epochs=5)


@pytest.mark.slow
def test_beauty_keeps_every_code_in_use(data_folder):
    points = np.load(data_folder / "amazon_beauty" / "minilm_l6_v2_f16.npy").astype(np.float32)
    quantizer = RQVAEQuantizer([256, 256, 256], epochs=10).fit(points)
    trivial = float(np.square(points - points.mean(0)).sum(1).mean())
    assert float(quantizer.reconstruction_error(points, quantizer.codes_)) < 0.7 * trivial
    for column in quantizer.codes_.unbind(1):
        assert len(column.unique()) > 0.9 * 256
