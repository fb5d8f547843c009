"""From item embeddings to a catalogue of unique semantic IDs, with a report of what was done to get there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from onerec_hf.modeling.catalogue_onerec import ItemCatalogue
from onerec_hf.semantic_ids.embeddings import embedding_fingerprint
from onerec_hf.semantic_ids.residual_quantizer import ResidualQuantizer
from onerec_hf.semantic_ids.unique_codes import make_unique


@dataclass(frozen=True)
class SemanticIDReport:
    """
    What came out of a fit.

    Args:
        num_items, codebook_sizes: of the catalogue.
        residual_energy: per level, the share of the embeddings' variance that the codes up to this level leave over (squared residuals over
            squared distances to the mean), before collisions were resolved.
        cluster_sizes: per level, the smallest and largest number of items on a code, after collisions were resolved; all levels but the
            last differ by at most one.
        collisions: items that shared all codes with an earlier item, before they were resolved.
        moved: items whose last code was changed to resolve them.
    """

    num_items: int
    codebook_sizes: list[int]
    residual_energy: list[float]
    cluster_sizes: list[list[int]]
    collisions: int
    moved: int

    def as_dict(self) -> dict[str, Any]:
        """As plain lists and numbers."""
        return asdict(self)

    def table(self) -> str:
        """As aligned text."""
        lines = ["level  codes  items per code  variance left"]
        for level, (size, (low, high), energy) in enumerate(
            zip(self.codebook_sizes, self.cluster_sizes, self.residual_energy, strict=True), start=1
        ):
            spread = f"{low}" if low == high else f"{low} to {high}"
            lines.append(f"{level:<5}  {size:>5}  {spread:>14}  {energy:>13.1%}")
        share = self.moved / self.num_items
        lines.append(
            f"{self.collisions:,} collisions among {self.num_items:,} items, resolved by moving {self.moved:,} ({share:.1%})"
        )
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class SemanticIDs:
    """A fitted catalogue, the quantiser that encodes new items, and the report."""

    catalogue: ItemCatalogue
    quantizer: ResidualQuantizer
    report: SemanticIDReport


def fit_semantic_ids(
    item_ids: Sequence | np.ndarray,
    embeddings: np.ndarray | torch.Tensor,
    codebook_sizes: Sequence[int] = (256, 256, 256),
    *,
    popularity: np.ndarray | None = None,
    recipe: str = "given",
    max_iter: int = 20,
    seed: int = 0,
) -> SemanticIDs:
    """
    Balanced residual codes (paper, section 3.1), made unique inside each prefix.

    Args:
        item_ids: N integers or strings.
        embeddings: (N, d), a row per item.
        codebook_sizes: codes per level, each at most N.
        popularity: (N,) interaction counts to keep in the catalogue.
        recipe: how the embeddings were made, for the fingerprint.

    Raises:
        ValueError: numbers of rows that differ, NaN or infinite embeddings (the first item), fewer items than codes, or more items under one
            prefix than the last level can tell apart.

    Example:
        >>> vectors = np.random.default_rng(0).normal(size=(50, 8))
        >>> fitted = fit_semantic_ids([f"m{i}" for i in range(50)], vectors, codebook_sizes=[5, 5, 5])
        >>> len(fitted.catalogue), fitted.report.cluster_sizes[0]
        (50, [10, 10])
    """
    embeddings = np.asarray(embeddings, dtype=np.float32)
    item_ids = item_ids if isinstance(item_ids, np.ndarray) else list(item_ids)
    if embeddings.ndim != 2 or len(embeddings) != len(item_ids):
        raise ValueError(f"embeddings: expected a row for each of {len(item_ids)} items, got shape {embeddings.shape}")
    bad = ~np.isfinite(embeddings).all(1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(item_ids)} items have NaN or infinite embeddings (first: item {item_ids[int(bad.argmax())]!r}); "
            "repair them or leave these items out"
        )
    if max(codebook_sizes) > len(item_ids):
        raise ValueError(
            f"fewer items than codes: {len(item_ids)} items cannot fill codebooks of {list(codebook_sizes)}; use codebooks of at most "
            f"{len(item_ids)} codes"
        )
    points = torch.from_numpy(embeddings)
    quantizer = ResidualQuantizer(codebook_sizes, max_iter=max_iter, seed=seed).fit(points)
    codes, residual, energy = quantizer.codes_, points, []
    total = (points - points.mean(0)).square().sum().clamp(min=1e-12)
    before_last = points
    for codebook, column in zip(quantizer.codebooks_, codes.unbind(1), strict=True):
        before_last, residual = residual, residual - codebook[column]
        energy.append(float(residual.square().sum() / total))
    unique = make_unique(codes, before_last, quantizer.codebooks_[-1])
    sizes = [
        column.bincount(minlength=size)
        for column, size in zip(unique.codes.unbind(1), quantizer.codebook_sizes, strict=True)
    ]
    report = SemanticIDReport(
        num_items=len(item_ids),
        codebook_sizes=quantizer.codebook_sizes,
        residual_energy=energy,
        cluster_sizes=[[int(count.min()), int(count.max())] for count in sizes],
        collisions=len(codes) - len(torch.unique(codes, dim=0)),
        moved=int(unique.moved.sum()),
    )
    catalogue = ItemCatalogue(
        item_ids,
        unique.codes.numpy(),
        quantizer.codebook_sizes,
        popularity=popularity,
        embedding_fingerprint=embedding_fingerprint(embeddings, recipe),
    )
    return SemanticIDs(catalogue, quantizer, report)
