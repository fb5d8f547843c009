"""Residual quantiser: a codebook per level, each level clustering what the levels before left over (paper, section 3.1)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from onerec_hf.semantic_ids.balanced_kmeans import BalancedKMeans, check_points, nearest


class ResidualQuantizer:
    """
    `r^1 = e; s^l = cluster of r^l; r^(l+1) = r^l - c^l[s^l]`, with balanced k-means on every level.

    Args:
        codebook_sizes: codes per level.
        max_iter, assignment, seed: as for [`BalancedKMeans`].

    Attributes:
        codebooks_: one (K_l, d) float32 tensor per level. codes_: (N, L) int64, the balanced assignment of the fit; encoding the same points
        again by nearest centroid does not give it.

    Example:
        >>> points = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> quantizer = ResidualQuantizer([5, 4]).fit(points)
        >>> quantizer.codes_[:, 0].bincount().tolist(), quantizer.codes_[:, 1].bincount().tolist()
        ([20, 20, 20, 20, 20], [25, 25, 25, 25])
        >>> quantizer.reconstruction_error(points, quantizer.codes_) < points.square().sum(1).mean()
        tensor(True)
    """

    codebooks_: list[torch.Tensor]
    codes_: torch.Tensor

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        *,
        max_iter: int = 20,
        assignment: Literal["optimal", "greedy"] = "optimal",
        seed: int = 0,
    ):
        self.codebook_sizes = [int(size) for size in codebook_sizes]
        if not self.codebook_sizes:
            raise ValueError("codebook_sizes must name at least one level")
        self.max_iter, self.assignment, self.seed = max_iter, assignment, seed

    def fit(self, points: torch.Tensor | np.ndarray) -> ResidualQuantizer:
        """Fits all levels to (N, d) points."""
        residual = check_points(points).float()
        self.codebooks_, codes = [], []
        for level, size in enumerate(self.codebook_sizes):
            kmeans = BalancedKMeans(
                size, max_iter=self.max_iter, assignment=self.assignment, seed=self.seed + level
            ).fit(residual)
            self.codebooks_.append(kmeans.cluster_centers_)
            codes.append(kmeans.labels_)
            residual = residual - kmeans.cluster_centers_[kmeans.labels_]
        self.codes_ = torch.stack(codes, dim=1)
        return self

    def encode(self, points: torch.Tensor | np.ndarray) -> torch.Tensor:
        """(n, L) int64 nearest codes, level by level, of (n, d) new points."""
        residual, codes = check_points(points).float(), []
        for codebook in self.codebooks_:
            codes.append(nearest(residual, codebook))
            residual = residual - codebook[codes[-1]]
        return torch.stack(codes, dim=1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, d) sum of the centroids that (n, l) codes name, l <= L levels."""
        levels = zip(self.codebooks_, codes.unbind(1), strict=False)  # fewer levels than codebooks are a coarser point
        return torch.stack([codebook[column] for codebook, column in levels]).sum(0)

    def reconstruction_error(self, points: torch.Tensor | np.ndarray, codes: torch.Tensor) -> torch.Tensor:
        """Mean squared distance between (n, d) points and what their codes decode to."""
        return (torch.as_tensor(points).float() - self.decode(codes)).square().sum(1).mean()

    def save(self, path: str | os.PathLike) -> None:
        """Writes the codebooks as one safetensors file: to a temporary name first, then renamed."""
        tensors = {f"codebook.{level}": codebook.contiguous() for level, codebook in enumerate(self.codebooks_)}
        temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
        save_file(tensors, temporary, metadata={"format": "onerec-codebooks", "version": "1"})
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> ResidualQuantizer:
        """
        Reads codebooks; the loaded quantiser encodes and decodes, it has no fit-time `codes_`.

        Raises:
            ValueError: the file is cut short or holds no codebooks.
        """
        try:
            tensors = load_file(os.fspath(path))
        except SafetensorError as error:
            raise ValueError(
                f"{os.fspath(path)} is damaged or cut short ({error}); copy or download it again"
            ) from error
        codebooks = [tensors[f"codebook.{level}"] for level in range(len(tensors)) if f"codebook.{level}" in tensors]
        if not codebooks or len(codebooks) != len(tensors):
            raise ValueError(
                f"{os.fspath(path)} holds no codebooks (its tensors: {', '.join(sorted(tensors)) or 'none'})"
            )
        quantizer = cls([len(codebook) for codebook in codebooks])
        quantizer.codebooks_ = codebooks
        return quantizer
