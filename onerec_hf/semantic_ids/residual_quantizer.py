"""Residual k-means: one codebook per level, each clustering the residuals of the previous levels (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from onerec_hf.semantic_ids.balanced_assignment import ROWS, nearest
from onerec_hf.semantic_ids.balanced_kmeans import BalancedKMeans, check_enough, check_points, means
from onerec_hf.semantic_ids.process_group import SINGLE_PROCESS, SingleProcess
from onerec_hf.semantic_ids.quantizer import Quantizer


class ResidualQuantizer(Quantizer):
    """
    `r^1 = e; s^l = cluster of r^l; r^(l+1) = r^l - c^l[s^l]`, with k-means on every level.

    Args:
        codebook_sizes: codes per level.
        clustering: "balanced" ([`BalancedKMeans`], the paper's) or "kmeans" (faiss's plain k-means, the extra `faiss`).
        max_iter: maximum number of iterations per level.
        assignment, max_points_per_cluster: as for [`BalancedKMeans`]; plain k-means supports `max_points_per_cluster` too.
        seed: seed of the first level; level l uses `seed + l`.

    Attributes:
        codebooks_: one (K_l, d) float32 tensor per level. codes_: (N, L) int64, the assignment of the fit; for balanced clusters it differs
        from encoding the same points by nearest centroid.

    Example:
        >>> points = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> quantizer = ResidualQuantizer([5, 4]).fit(points)
        >>> quantizer.codes_[:, 0].bincount().tolist(), quantizer.codes_[:, 1].bincount().tolist()
        ([20, 20, 20, 20, 20], [25, 25, 25, 25])
        >>> quantizer.reconstruction_error(points, quantizer.codes_) < points.square().sum(1).mean()
        tensor(True)
    """

    codebooks_: list[torch.Tensor]

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        *,
        clustering: Literal["balanced", "kmeans"] = "balanced",
        max_iter: int = 20,
        assignment: Literal["optimal", "greedy"] = "optimal",
        max_points_per_cluster: int | None = 256,
        seed: int = 0,
    ):
        self.codebook_sizes = [int(size) for size in codebook_sizes]
        if not self.codebook_sizes:
            raise ValueError("codebook_sizes is empty; pass at least one level")
        if clustering not in ("balanced", "kmeans"):
            raise ValueError(f'clustering must be "balanced" or "kmeans"; got {clustering!r}')
        self.method = clustering
        self.max_iter, self.seed = max_iter, seed
        self.assignment: Literal["optimal", "greedy"] = assignment
        self.max_points_per_cluster = max_points_per_cluster

    def fit(self, points: torch.Tensor | np.ndarray, ranks: SingleProcess = SINGLE_PROCESS) -> ResidualQuantizer:
        """
        Fits all levels to (N, d) points. With `ranks`, as in [`BalancedKMeans`], `codes_` are this rank's.

        Raises:
            ValueError: as in [`BalancedKMeans`], or plain k-means with several ranks.
        """
        if ranks.size > 1 and self.method != "balanced":
            raise ValueError(
                'clustering "kmeans" supports one process only; use clustering "balanced" in distributed runs'
            )
        with ranks.together():
            residual = check_points(points, empty=ranks.size > 1).float().clone()
        check_enough(ranks.span(len(residual))[1], max(self.codebook_sizes))
        cluster = self._balanced if self.method == "balanced" else self._plain
        self.codebooks_, codes = [], []
        for level, size in enumerate(self.codebook_sizes):
            centers, labels = cluster(residual, size, self.seed + level, ranks)
            self.codebooks_.append(centers)
            codes.append(labels)
            _subtract(residual, centers, labels)
        self.codes_ = torch.stack(codes, dim=1)
        return self

    def _balanced(
        self, points: torch.Tensor, size: int, seed: int, ranks: SingleProcess
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kmeans = BalancedKMeans(
            size,
            max_iter=self.max_iter,
            assignment=self.assignment,
            max_points_per_cluster=self.max_points_per_cluster,
            seed=seed,
        ).fit(points, ranks)
        return kmeans.cluster_centers_, kmeans.labels_

    def _plain(
        self, points: torch.Tensor, size: int, seed: int, _: SingleProcess
    ) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            import faiss
        except ImportError:
            raise ValueError(
                'clustering "kmeans" needs faiss, which is not installed. Run: pip install "onerec-hf[faiss]"'
            ) from None
        most = len(points) if self.max_points_per_cluster is None else self.max_points_per_cluster
        kmeans: Any = faiss.Kmeans(
            points.shape[1],
            size,
            niter=self.max_iter,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=most,
        )
        kmeans.train(points.cpu().numpy())
        centers = torch.from_numpy(kmeans.centroids).to(points.device)
        labels = nearest(points, centers)
        return means(points, labels, centers), labels

    def encode(self, points: torch.Tensor | np.ndarray) -> torch.Tensor:
        """(n, L) int64 nearest codes of (n, d) new points, level by level."""
        residual, codes = check_points(points).float().clone(), []
        for codebook in self.codebooks_:
            codes.append(nearest(residual, codebook))
            _subtract(residual, codebook, codes[-1])
        return torch.stack(codes, dim=1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, d) sums of the centroids of (n, l) codes, l <= L levels."""
        levels = zip(self.codebooks_, codes.unbind(1), strict=False)  # fewer levels give a coarser reconstruction
        return torch.stack([codebook[column] for codebook, column in levels]).sum(0)

    def last_level(self, points: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, d) residuals before the last level and the (K, d) last codebook."""
        residual = points.float().clone()
        for codebook, column in zip(self.codebooks_[:-1], codes.unbind(1), strict=False):
            _subtract(residual, codebook, column)
        return residual, self.codebooks_[-1]

    def _state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = {f"codebook.{level}": codebook for level, codebook in enumerate(self.codebooks_)}
        return tensors, {"clustering": self.method}

    @classmethod
    def _restore(cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> ResidualQuantizer:
        codebooks = [tensors[f"codebook.{level}"] for level in range(len(tensors))]
        if any(check_points(codebook).shape[1] != codebooks[0].shape[1] for codebook in codebooks):
            raise ValueError(f"codebooks have different widths: {[tuple(codebook.shape) for codebook in codebooks]}")
        quantizer = cls([len(codebook) for codebook in codebooks], **settings)
        quantizer.codebooks_ = codebooks
        return quantizer


def _subtract(points: torch.Tensor, centers: torch.Tensor, labels: torch.Tensor) -> None:
    """Subtracts each point's centroid in place, to avoid a second copy of large embeddings."""
    for chunk, own in zip(points.split(ROWS), labels.split(ROWS), strict=True):
        chunk -= centers[own]
