"""From item embeddings to a catalogue of unique semantic IDs, with a report of what was done to get there; and more items later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from onerec_hf.modeling.catalogue_onerec import ItemCatalogue
from onerec_hf.semantic_ids.embeddings import embedding_fingerprint
from onerec_hf.semantic_ids.quantizer import Quantizer, make_quantizer
from onerec_hf.semantic_ids.report import SemanticIDReport, describe_ids
from onerec_hf.semantic_ids.unique_codes import add_digit, make_unique


@dataclass(frozen=True, eq=False)
class SemanticIDs:
    """A fitted catalogue, the quantiser that encodes new items, and the report."""

    catalogue: ItemCatalogue
    quantizer: Quantizer
    report: SemanticIDReport


def fit_semantic_ids(
    item_ids: Sequence | np.ndarray,
    embeddings: np.ndarray | torch.Tensor,
    codebook_sizes: Sequence[int] = (256, 256, 256),
    *,
    method: str = "balanced",
    on_collision: Literal["assign", "extra-digit"] = "assign",
    popularity: np.ndarray | None = None,
    recipe: str = "given",
    max_iter: int = 20,
    seed: int = 0,
    **settings,
) -> SemanticIDs:
    """
    Residual codes (balanced: paper, section 3.1), made unique.

    Args:
        item_ids: N integers or strings.
        embeddings: (N, d), a row per item; a tensor is quantised on its device.
        codebook_sizes: codes per level, each at most N.
        method: "balanced", "kmeans" or "rq-vae", see `make_quantizer`.
        on_collision: "assign" gives colliding items other last codes at the least cost ([`make_unique`]); "extra-digit" adds a level that
            counts them (TIGER; [`add_digit`]).
        popularity: (N,) interaction counts to keep in the catalogue.
        recipe: how the embeddings were made, for the fingerprint.
        max_iter: most iterations of k-means per level.
        settings: further arguments of the method's class.

    Raises:
        ValueError: numbers of rows that differ, NaN or infinite embeddings (the first item), fewer items than codes, or more items under one
            prefix than the last level can tell apart.

    Example:
        >>> vectors = np.random.default_rng(0).normal(size=(50, 8))
        >>> fitted = fit_semantic_ids([f"m{i}" for i in range(50)], vectors, codebook_sizes=[5, 5, 5])
        >>> len(fitted.catalogue), fitted.report.cluster_sizes[0]
        (50, [10, 10])
    """
    item_ids = item_ids if isinstance(item_ids, np.ndarray) else list(item_ids)
    points = _check_embeddings(item_ids, embeddings)
    if on_collision not in ("assign", "extra-digit"):
        raise ValueError(f'on_collision must be "assign" or "extra-digit"; got {on_collision!r}')
    quantizer = make_quantizer(method, codebook_sizes, max_iter=max_iter, seed=seed, **settings)
    if max(codebook_sizes) > len(item_ids):
        raise ValueError(
            f"fewer items than codes: {len(item_ids)} items cannot fill codebooks of {list(codebook_sizes)}; use codebooks of at most "
            f"{len(item_ids)} codes"
        )
    quantizer.fit(points)
    codes, sizes = quantizer.codes_, list(quantizer.codebook_sizes)
    if on_collision == "assign":
        unique = make_unique(codes, *quantizer.last_level(points, codes))
        report = describe_ids(points, quantizer, unique.codes, int(unique.moved.sum()), seed=seed)
        codes = unique.codes
    else:
        longer = add_digit(codes)
        sizes.append(int(longer[:, -1].max()) + 1)
        report = describe_ids(points, quantizer, codes, 0, sizes[-1], seed=seed)
        codes = longer
    catalogue = ItemCatalogue(
        item_ids,
        codes.cpu().numpy(),
        sizes,
        popularity=popularity,
        embedding_fingerprint=embedding_fingerprint(points.cpu().numpy(), recipe),
    )
    return SemanticIDs(catalogue, quantizer, report)


def extend_catalogue(
    catalogue: ItemCatalogue,
    quantizer: Quantizer,
    item_ids: Sequence | np.ndarray,
    embeddings: np.ndarray | torch.Tensor,
    popularity: np.ndarray | None = None,
) -> ItemCatalogue:
    """
    The catalogue with new items: each gets its nearest codes, and where the last one is taken, another free one at the least cost. Codes
    of items that were there stay; a model goes on working (`model.set_catalogue(extended)`).

    Args:
        catalogue: made by `fit_semantic_ids` with the default "assign".
        quantizer: the one that was fitted with it.
        item_ids: n new integers or strings.
        embeddings: (n, d), made by the same recipe as those of the fit.
        popularity: (n,) interaction counts.

    Raises:
        ValueError: ids that exist, embeddings of another width or not finite, a quantiser of other codebooks, or a prefix with fewer free
            codes than new items.

    Example:
        >>> vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
        >>> fitted = fit_semantic_ids(range(50), vectors[:50], codebook_sizes=[5, 5, 8])
        >>> grown = extend_catalogue(fitted.catalogue, fitted.quantizer, range(50, 60), vectors[50:])
        >>> len(grown), len(fitted.catalogue)
        (60, 50)
    """
    item_ids = item_ids if isinstance(item_ids, np.ndarray) else list(item_ids)
    points = _check_embeddings(item_ids, embeddings)
    if list(quantizer.codebook_sizes) != catalogue.codebook_sizes:
        raise ValueError(
            f"the quantiser has codebooks of {list(quantizer.codebook_sizes)}, the catalogue of {catalogue.codebook_sizes}; new items can "
            'be added where both come from one fit with on_collision="assign"'
        )
    codes = quantizer.encode(points)
    allowed = catalogue.free_last_codes(codes[:, :-1].cpu().numpy())
    unique = make_unique(codes, *quantizer.last_level(points, codes), allowed=allowed)
    return catalogue.add(item_ids, unique.codes.cpu().numpy(), popularity=popularity)


def _check_embeddings(item_ids: Sequence | np.ndarray, embeddings: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(N, d) float32 finite rows, one per item."""
    points = torch.as_tensor(embeddings).float()
    if points.ndim != 2 or len(points) != len(item_ids):
        raise ValueError(
            f"embeddings: expected a row for each of {len(item_ids)} items, got shape {tuple(points.shape)}"
        )
    bad = ~torch.isfinite(points).all(1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(item_ids)} items have NaN or infinite embeddings (first: item {item_ids[int(bad.int().argmax())]!r}); "
            "repair them or leave these items out"
        )
    return points
