"""Base class of quantisers of item embeddings: fit, encode, decode, save and load."""

from __future__ import annotations

import importlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file

from onerec_hf.modeling.files import listed, read_safetensors, refusing, replacing, sort_header
from onerec_hf.semantic_ids.balanced_assignment import ROWS
from onerec_hf.semantic_ids.process_group import SINGLE_PROCESS, SingleProcess

if TYPE_CHECKING:
    from typing import Self

_FORMAT, _VERSION = "onerec-quantizer", "1"
# method -> module and class, imported on first use
_CLASSES = {
    "balanced": ("residual_quantizer", "ResidualQuantizer"),
    "kmeans": ("residual_quantizer", "ResidualQuantizer"),
    "rq-vae": ("rq_vae", "RQVAEQuantizer"),
}
METHODS = tuple(_CLASSES)


class Quantizer(ABC):
    """
    Quantises (N, d) embeddings to (N, L) codes, level by level.

    Attributes:
        codebook_sizes: codes per level.
        codes_: (N, L) int64, the codes of the fit. For balanced methods, encoding the same points again gives other codes. A loaded
            quantiser does not have them.
    """

    method: ClassVar[str] | str
    codebook_sizes: list[int]
    codes_: torch.Tensor

    @abstractmethod
    def fit(self, points: torch.Tensor | np.ndarray) -> Self:
        """Fits the codebooks to (N, d) finite points and sets `codes_`."""

    @abstractmethod
    def encode(self, points: torch.Tensor | np.ndarray) -> torch.Tensor:
        """(n, L) int64 codes of (n, d) new points."""

    @abstractmethod
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, d) float32 reconstructions of (n, l) codes, l <= L levels."""

    @abstractmethod
    def last_level(self, points: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Inputs of the last level: (n, e) residuals after the other levels of `codes` (n, L), and the (K, e) last codebook. Their squared
        distances are the costs of assigning unique codes.
        """

    @abstractmethod
    def _state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and JSON settings for `_restore`."""

    @classmethod
    @abstractmethod
    def _restore(cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> Self:
        """Restores a saved quantiser."""

    def reconstruction_error(
        self, points: torch.Tensor | np.ndarray, codes: torch.Tensor, ranks: SingleProcess = SINGLE_PROCESS
    ) -> torch.Tensor:
        """Mean squared distance between (n, d) points and the reconstructions of their (n, l) codes, over all ranks."""
        points = torch.as_tensor(points).float()
        chunks = zip(points.split(ROWS), codes.split(ROWS), strict=True)
        total = sum((chunk - self.decode(part)).square().sum(dtype=torch.double) for chunk, part in chunks)
        return ranks.sum(torch.as_tensor(total)).float() / ranks.span(len(points))[1]

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, under a temporary name that is then renamed."""
        tensors, settings = self._state()
        metadata = {"format": _FORMAT, "version": _VERSION, "method": self.method, "settings": json.dumps(settings)}
        with replacing(path) as temporary:
            save_file({name: part.contiguous().cpu() for name, part in tensors.items()}, temporary, metadata=metadata)
            sort_header(temporary)

    @staticmethod
    def load(path: str | os.PathLike) -> Quantizer:
        """
        Loads a saved quantiser of any method.

        Raises:
            ValueError: damaged or truncated file, not a quantiser, or an unsupported version.
        """
        path = os.fspath(path)
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path} is not a saved quantiser (its tensors: {listed(sorted(tensors)) or 'none'}); pass a codebooks.safetensors file"
            )
        version, method = metadata.get("version"), metadata.get("method")
        if version != _VERSION or method not in _CLASSES:
            raise ValueError(
                f"{path} has quantiser version {version!s:.80} and method {method!r:.80}, but this onerec_hf supports version {_VERSION} and "
                f"{', '.join(METHODS)}; update onerec_hf"
            )
        with refusing(path):
            return _class_of(method)._restore(tensors, json.loads(metadata["settings"]))


def make_quantizer(
    method: str, codebook_sizes: Sequence[int], *, max_iter: int = 20, seed: int = 0, **settings
) -> Quantizer:
    """
    Creates a quantiser by method name.

    Args:
        method: "balanced" (balanced k-means on every level, the paper's), "kmeans" (plain k-means by faiss) or "rq-vae" (TIGER's).
        codebook_sizes: codes per level.
        max_iter: maximum number of k-means iterations per level; RQ-VAE uses `epochs` instead.
        settings: further arguments of the quantiser class.

    Raises:
        ValueError: an unknown method.

    Example:
        >>> make_quantizer("balanced", [4, 4], seed=1).codebook_sizes
        [4, 4]
    """
    if method not in _CLASSES:
        raise ValueError(f"unknown quantiser {method!r}; choose one of {', '.join(METHODS)}")
    if method == "rq-vae":
        return _class_of(method)(codebook_sizes, seed=seed, **settings)
    return _class_of(method)(codebook_sizes, clustering=method, max_iter=max_iter, seed=seed, **settings)


def _class_of(method: str) -> Any:
    module, name = _CLASSES[method]
    return getattr(importlib.import_module(f"onerec_hf.semantic_ids.{module}"), name)
