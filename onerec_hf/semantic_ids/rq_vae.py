"""TIGER's RQ-VAE: an autoencoder with a residual-quantised latent, an alternative to clustering."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from logging import INFO
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from onerec_hf.semantic_ids.balanced_assignment import ROWS, nearest
from onerec_hf.semantic_ids.balanced_kmeans import check_enough, check_points, means
from onerec_hf.semantic_ids.quantizer import Quantizer

# Items and k-means iterations for the initialisation of the codebooks.
_START_ITEMS, _START_ITERATIONS = 20_000, 10


@strict
class RQVAEConfig(PreTrainedConfig):
    r"""
    Shape of an [`RQVAEModel`] (TIGER, arXiv 2305.05065, section 4: 768-512-256-128-32, three codebooks of 256).

    Args:
        input_size (`int`, defaults to 768):
            Dimensions of the item embeddings.
        codebook_sizes (`list[int]`, defaults to `[256, 256, 256]`):
            Codes per level.
        hidden_sizes (`list[int]`, defaults to `[512, 256, 128]`):
            Hidden layers of the encoder; reversed in the decoder.
        latent_size (`int`, defaults to 32):
            Dimensions of the latent and of every code vector.
        beta (`float`, defaults to 0.25):
            Weight of the commitment loss.

    Example:
        >>> RQVAEConfig(input_size=8, codebook_sizes=[4, 4]).hidden_sizes
        [512, 256, 128]
    """

    model_type = "rq-vae"

    input_size: int = 768
    codebook_sizes: list[int] | tuple[int, ...] = (256, 256, 256)
    hidden_sizes: list[int] | tuple[int, ...] = (512, 256, 128)
    latent_size: int = 32
    beta: float | int = 0.25

    def __post_init__(self, **kwargs):
        self.codebook_sizes = [int(size) for size in self.codebook_sizes]
        self.hidden_sizes = [int(size) for size in self.hidden_sizes]
        super().__post_init__(**kwargs)


@dataclass
class RQVAEOutput(ModelOutput):
    """
    Output of [`RQVAEModel`] for B items.

    Args:
        loss: scalar; `reconstruction_loss + codebook_loss + beta * commitment_loss`.
        reconstruction_loss, codebook_loss, commitment_loss: scalars; squared distances summed over dimensions and levels, mean over items.
        codes: (B, L) int64.
        reconstruction: (B, input_size), in the units of the input.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    codebook_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None


class RQVAEModel(PreTrainedModel):
    r"""
    Encoder, residual codebooks and decoder (TIGER, arXiv 2305.05065, section 3.1). With `x` the item's embedding, centred and scaled to
    a mean squared norm of one:

        z = encoder(x);  r_1 = z
        c_l = argmin_k ||r_l - e_l[k]||^2;  r_{l+1} = r_l - e_l[c_l]
        q = sum_l e_l[c_l];  x' = decoder(z + sg[q - z])
        loss = ||x - x'||^2 + sum_l ||sg[r_l] - e_l[c_l]||^2 + beta ||r_l - sg[e_l[c_l]]||^2

    `sg` stops the gradient: the decoder's gradient passes straight through the quantisation to the encoder, each codebook is trained by the
    term of its level only, and the commitment terms of all levels reach the encoder. With `quantizes` False the model is a plain
    autoencoder, `q = z`.

    Example:
        >>> model = RQVAEModel(RQVAEConfig(input_size=6, codebook_sizes=[4, 3], hidden_sizes=[8], latent_size=2))
        >>> output = model(torch.randn(5, 6))
        >>> output.codes.shape, output.reconstruction.shape, output.loss.requires_grad
        (torch.Size([5, 2]), torch.Size([5, 6]), True)
    """

    config_class = RQVAEConfig
    main_input_name = "points"
    input_mean: torch.Tensor
    input_scale: torch.Tensor

    def __init__(self, config: RQVAEConfig):
        super().__init__(config)
        sizes = [config.input_size, *config.hidden_sizes, config.latent_size]
        self.encoder, self.decoder = _mlp(sizes), _mlp(sizes[::-1])
        self.codebooks = nn.ParameterList(torch.zeros(size, config.latent_size) for size in config.codebook_sizes)
        self.register_buffer("input_mean", torch.zeros(config.input_size))
        self.register_buffer("input_scale", torch.ones(()))
        self.quantizes = True
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            init.xavier_normal_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RQVAEModel):
            for codebook in module.codebooks:
                init.uniform_(codebook, -1 / len(codebook), 1 / len(codebook))
            init.zeros_(module.input_mean)
            init.ones_(module.input_scale)

    def forward(self, points: torch.Tensor) -> RQVAEOutput:
        """
        Quantises and reconstructs.

        Args:
            points: (B, input_size) item embeddings.
        """
        inputs = (points - self.input_mean) / self.input_scale
        latents = self.encoder(inputs)
        if not self.quantizes:
            reconstruction = self.decoder(latents)
            loss = _distance(inputs, reconstruction)
            return RQVAEOutput(loss=loss, reconstruction_loss=loss, reconstruction=self._restored(reconstruction))
        residual, codes = latents, []
        codebook_loss = commitment_loss = latents.new_zeros(())
        for codebook in self.codebooks:
            codes.append(nearest(residual.detach(), codebook.detach()))
            chosen = codebook[codes[-1]]
            codebook_loss = codebook_loss + _distance(residual.detach(), chosen)
            commitment_loss = commitment_loss + _distance(residual, chosen.detach())
            residual = residual - chosen.detach()
        reconstruction = self.decoder(latents - residual.detach())
        reconstruction_loss = _distance(inputs, reconstruction)
        return RQVAEOutput(
            loss=reconstruction_loss + codebook_loss + self.config.beta * commitment_loss,
            reconstruction_loss=reconstruction_loss,
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
            codes=torch.stack(codes, dim=1),
            reconstruction=self._restored(reconstruction),
        )

    def _restored(self, outputs: torch.Tensor) -> torch.Tensor:
        """Decoder outputs in the units of the input."""
        return outputs * self.input_scale + self.input_mean

    @torch.no_grad()
    def set_input_statistics(self, points: torch.Tensor) -> None:
        """Sets mean and scale from (N, input_size) points; the scale is one if all points are equal."""
        self.input_mean.copy_(points.mean(0))
        distance = (points - self.input_mean).square().sum(1).mean().sqrt()
        self.input_scale.copy_(distance if distance > 0 else torch.ones(()))

    @torch.no_grad()
    def start_codebooks(self, points: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """
        Initialises each codebook with k-means centroids of the residuals of the previous levels (TIGER, section 3.1).

        Args:
            points: (N, input_size), at least as many as the largest codebook.
            generator: CPU generator for the initial centroids.
        """
        residual = self.latents(points)
        for codebook in self.codebooks:
            rows = torch.randperm(len(residual), generator=generator)[: len(codebook)]
            centers = residual[rows.to(residual.device)]
            for _ in range(_START_ITERATIONS):
                centers = means(residual, nearest(residual, centers), centers)
            codebook.copy_(centers)
            residual = residual - centers[nearest(residual, centers)]

    @torch.no_grad()
    def latents(self, points: torch.Tensor) -> torch.Tensor:
        """(n, latent_size) latents of (n, input_size) points, before quantisation."""
        return self.encoder((points - self.input_mean) / self.input_scale)

    @torch.no_grad()
    def encode(self, points: torch.Tensor) -> torch.Tensor:
        """(n, L) int64 codes of (n, input_size) points."""
        residual, codes = self.latents(points), []
        for codebook in self.codebooks:
            codes.append(nearest(residual, codebook))
            residual = residual - codebook[codes[-1]]
        return torch.stack(codes, dim=1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, input_size) reconstructions of (n, l) codes, l <= L."""
        return self._restored(self.decoder(self.quantized(codes)))

    @torch.no_grad()
    def quantized(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, latent_size) sums of the code vectors; zeros if `codes` has no level."""
        total = self.codebooks[0].new_zeros(len(codes), self.config.latent_size)
        for codebook, column in zip(self.codebooks, codes.unbind(1), strict=False):
            total = total + codebook[column]
        return total


class RQVAEQuantizer(Quantizer):
    """
    Semantic IDs by an RQ-VAE, trained with `transformers.Trainer` (AdamW, linear decay).

    As in TIGER and its open re-implementations, codebooks are initialised by k-means and unused codes are not restarted. TIGER runs k-means
    on the first batch of an untrained encoder. Here it runs on up to 20,000 items after `warmup_epochs` as a plain autoencoder, so that later
    latents stay close to the codes (Łańcucki et al., arXiv 2005.08520). On Amazon Beauty (12,101 items, MiniLM, three codebooks of 256, 60
    epochs) all codes remain in use; without warm-up only 77% of the first level do. Clusters are not balanced, and `codes_` equals `encode`
    of the same points.

    Args:
        codebook_sizes: codes per level.
        hidden_sizes, latent_size, beta: see [`RQVAEConfig`].
        epochs: number of epochs, including warm-up.
        warmup_epochs: epochs before the codebooks are initialised, fewer than `epochs`; 0 as in TIGER.
        batch_size, learning_rate: training hyperparameters.
        seed: seed of weights, initial centroids and batches. The global random state is unchanged.

    Attributes:
        model_: the trained [`RQVAEModel`], on the Trainer's device. losses_: mean loss of each epoch. After the warm-up it includes the codebook
        terms, which grow as the latents spread; use `reconstruction_error` to measure the fit. codes_: (N, L) int64.

    Example:
        >>> points = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
        >>> quantizer = RQVAEQuantizer([5, 4], hidden_sizes=[16], latent_size=4, epochs=20).fit(points)
        >>> len(quantizer.losses_), torch.equal(quantizer.encode(points), quantizer.codes_)
        (20, True)
    """

    method = "rq-vae"
    model_: RQVAEModel
    losses_: list[float]

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        *,
        hidden_sizes: Sequence[int] = (512, 256, 128),
        latent_size: int = 32,
        beta: float = 0.25,
        epochs: int = 60,
        warmup_epochs: int = 5,
        batch_size: int = 1024,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ):
        if not 0 <= warmup_epochs < epochs:
            raise ValueError(
                f"warmup_epochs must be at least 0 and less than epochs; got warmup_epochs={warmup_epochs} of epochs={epochs}"
            )
        self.codebook_sizes = [int(size) for size in codebook_sizes]
        self.hidden_sizes, self.latent_size, self.beta = [int(size) for size in hidden_sizes], latent_size, beta
        if not self.codebook_sizes:
            raise ValueError("codebook_sizes is empty; pass at least one level")
        if min(*self.codebook_sizes, *self.hidden_sizes, latent_size) < 1:
            raise ValueError(
                f"all sizes must be at least 1; got codebook_sizes={self.codebook_sizes}, hidden_sizes={self.hidden_sizes}, "
                f"latent_size={latent_size}"
            )
        self.epochs, self.warmup_epochs = epochs, warmup_epochs
        self.batch_size, self.learning_rate, self.seed = batch_size, learning_rate, seed

    def _config(self, input_size: int) -> RQVAEConfig:
        return RQVAEConfig(
            input_size=input_size,
            codebook_sizes=self.codebook_sizes,
            hidden_sizes=self.hidden_sizes,
            latent_size=self.latent_size,
            beta=self.beta,
        )

    def fit(self, points: torch.Tensor | np.ndarray) -> RQVAEQuantizer:
        """
        Trains on (N, d) points.

        Raises:
            ValueError: not two-dimensional, NaN or infinite rows (with their number and the first), fewer points than codes per level.
        """
        points = check_points(points).float()
        check_enough(len(points), max(self.codebook_sizes))
        with _preserved_randomness(), tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                num_train_epochs=self.epochs,
                per_device_train_batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                logging_strategy="epoch",
                save_strategy="no",
                report_to="none",
                disable_tqdm=logging.get_verbosity() > INFO,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                seed=self.seed,
            )
            torch.manual_seed(self.seed)
            model = RQVAEModel(self._config(points.shape[1]))
            model.set_input_statistics(points.cpu())
            start = _StartCodebooks(points, self.warmup_epochs, self.seed)
            trainer = Trainer(
                model,
                arguments,
                data_collator=_points_batch,
                train_dataset=_Points(points.cpu()),
                callbacks=[start],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        self.model_ = model.eval()
        self.losses_ = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        self.codes_ = self.encode(points)
        return self

    def encode(self, points: torch.Tensor | np.ndarray) -> torch.Tensor:
        """(n, L) int64 codes of (n, d) new points."""
        chunks = check_points(points).float().split(ROWS)
        return torch.cat([self.model_.encode(chunk.to(self.model_.device)).to(chunk.device) for chunk in chunks])

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, d) float32 reconstructions of (n, l) codes, l <= L levels."""
        chunks = codes.split(ROWS)
        return torch.cat([self.model_.decode(chunk.to(self.model_.device)).to(chunk.device) for chunk in chunks])

    def last_level(self, points: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, latent_size) residuals before the last level, and the (K, latent_size) last codebook."""
        chunks = zip(points.float().split(ROWS), codes[:, :-1].split(ROWS), strict=True)
        residuals = []
        for chunk, others in chunks:
            device = self.model_.device
            left = self.model_.latents(chunk.to(device)) - self.model_.quantized(others.to(device))
            residuals.append(left.to(chunk.device))
        return torch.cat(residuals), self.model_.codebooks[-1].detach().to(points.device)

    def _state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        config = self.model_.config
        settings = {"input_size": config.input_size, "hidden_sizes": config.hidden_sizes}
        settings |= {"codebook_sizes": config.codebook_sizes, "latent_size": config.latent_size, "beta": config.beta}
        return self.model_.state_dict(), settings

    @classmethod
    def _restore(cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> RQVAEQuantizer:
        input_size = settings.pop("input_size")
        quantizer = cls(**settings)
        # On the meta device, with the file's tensors: wrong sizes in the settings allocate no memory.
        with _preserved_randomness(), torch.device("meta"):
            quantizer.model_ = RQVAEModel(quantizer._config(input_size)).eval()
        quantizer.model_.load_state_dict(tensors, assign=True)
        return quantizer


class _StartCodebooks(TrainerCallback):
    """Initialises the codebooks after the warm-up."""

    def __init__(self, points: torch.Tensor, after: int, seed: int):
        self.points, self.after, self.generator = points, after, torch.Generator().manual_seed(seed)

    def on_epoch_begin(self, args, state, control, model: RQVAEModel, **kwargs):
        epoch = round(state.epoch)
        model.quantizes = epoch >= self.after
        if epoch == self.after:
            count = max(_START_ITEMS, 4 * max(model.config.codebook_sizes))
            rows = torch.randperm(len(self.points), generator=self.generator)[:count]
            model.start_codebooks(self.points[rows.to(self.points.device)].to(model.device), self.generator)


class _Points(torch.utils.data.Dataset):
    """Rows fetched as whole batches; collating row by row would take longer than the training step."""

    def __init__(self, points: torch.Tensor):
        self.points = points

    def __len__(self) -> int:
        return len(self.points)

    def __getitems__(self, rows: list[int]) -> torch.Tensor:
        return self.points[rows]


def _points_batch(points: Any) -> dict[str, torch.Tensor]:
    """Wraps a batch of `_Points` in the model's keyword."""
    return {"points": points}


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Squared distance of two (B, d) sets of rows, mean over rows."""
    return (first - second).square().sum(1).mean()


@contextlib.contextmanager
def _preserved_randomness() -> Iterator[None]:
    """Restores the global random states of Python, numpy and torch, which Trainer seeds."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.accelerator.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
