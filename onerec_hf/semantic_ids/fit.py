"""Fits unique semantic IDs to item embeddings, with a report, and extends a catalogue by new items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal

import numpy as np
import torch

from onerec_hf.modeling.catalogue import ItemCatalogue
from onerec_hf.semantic_ids.balanced_assignment import ROWS, nearest
from onerec_hf.semantic_ids.balanced_kmeans import check_enough
from onerec_hf.semantic_ids.crowded_prefixes import spill
from onerec_hf.semantic_ids.embeddings import embedding_fingerprint, fingerprint_of
from onerec_hf.semantic_ids.item_encoder import ItemEncoder
from onerec_hf.semantic_ids.new_codes import numbered
from onerec_hf.semantic_ids.process_group import Ranks
from onerec_hf.semantic_ids.quantizer import Quantizer, make_quantizer
from onerec_hf.semantic_ids.report import SemanticIDReport, describe_ids
from onerec_hf.semantic_ids.residual_quantizer import ResidualQuantizer
from onerec_hf.semantic_ids.unique_codes import add_digit, add_digit_over, make_unique, make_unique_over

#: How items with equal codes get distinct ones.
COLLISION_POLICIES = ("assign", "extra-digit", "popularity-rank")


@dataclass(frozen=True, eq=False)
class SemanticIDs:
    """A fitted catalogue, the quantiser that encodes new items, the report, and where it is known what embeds new items."""

    catalogue: ItemCatalogue
    quantizer: Quantizer
    report: SemanticIDReport
    encoder: ItemEncoder | None = None


def fit_semantic_ids(
    item_ids: Sequence | np.ndarray,
    embeddings: np.ndarray | torch.Tensor,
    codebook_sizes: Sequence[int] = (256, 256, 256),
    *,
    method: str = "balanced",
    on_collision: Literal["assign", "extra-digit", "popularity-rank"] = "assign",
    popularity: np.ndarray | None = None,
    recipe: str = "given",
    max_iter: int = 20,
    seed: int = 0,
    ranks: Ranks | None = None,
    **settings,
) -> SemanticIDs:
    """
    Fits residual codes (balanced: paper, section 3.1) and makes them unique.

    With `ranks` every process passes its share of the items and gets the global catalogue and report; the quantiser's `codes_` cover its
    share. Codebooks and codes equal those of one process with all items, up to the order of summation. In addition to its embeddings and
    residuals, a rank stores the catalogue and 8 bytes per item and level for the global codes.

    Args:
        item_ids: N integers or strings.
        embeddings: (N, d), one row per item; a tensor is quantised on its device.
        codebook_sizes: codes per level, each at most N.
        method: "balanced", "kmeans" or "rq-vae", see `make_quantizer`.
        on_collision: "assign" reassigns the last codes of colliding items at minimum cost ([`make_unique`]), and in one process moves the
            items of a prefix beyond the last level's codes to the nearest prefix with room; "extra-digit" adds a level that numbers them
            (TIGER; [`add_digit`]), "popularity-rank" one that ranks them by popularity (MMGRec).
        popularity: (N,) interaction counts for the catalogue, and for "popularity-rank".
        recipe: name of the embedding method, for the fingerprint.
        max_iter: maximum number of k-means iterations per level.
        ranks: processes that share the items, `Ranks()` for torch.distributed: `item_ids`, `embeddings` and `popularity` are this rank's
            share. Only for method "balanced".
        settings: further arguments of the quantiser class.

    Raises:
        ValueError: "popularity-rank" without popularity, unequal numbers of rows, NaN or infinite embeddings (with the first item), fewer items
            than codes, more items than codes (with several ranks: under one prefix), or another method than "balanced" with several ranks.

    Example:
        >>> vectors = np.random.default_rng(0).normal(size=(50, 8))
        >>> fitted = fit_semantic_ids([f"m{i}" for i in range(50)], vectors, codebook_sizes=[5, 5, 5])
        >>> len(fitted.catalogue), fitted.report.cluster_sizes[0]
        (50, [10, 10])
    """
    if on_collision not in COLLISION_POLICIES:
        raise ValueError(f"on_collision {on_collision!r}: choose one of {', '.join(COLLISION_POLICIES)}")
    if on_collision == "popularity-rank" and popularity is None:
        raise ValueError(
            'on_collision="popularity-rank" needs popularity; pass one count per item, or use "extra-digit"'
        )
    quantizer = make_quantizer(method, codebook_sizes, max_iter=max_iter, seed=seed, **settings)
    if ranks is not None and ranks.size > 1:
        return _fit_over(ranks, quantizer, item_ids, embeddings, on_collision, popularity, recipe, seed)
    item_ids = item_ids if isinstance(item_ids, np.ndarray) else list(item_ids)
    points = _check_embeddings(item_ids, embeddings)
    check_enough(len(item_ids), max(codebook_sizes))
    _check_counts(item_ids, popularity)
    quantizer.fit(points)
    codes, sizes = quantizer.codes_, list(quantizer.codebook_sizes)
    if on_collision == "assign":
        spilt = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
        if len(codes) <= prod(sizes):  # of more items `make_unique` says what is wrong
            apart = partial(_distances, quantizer, points)
            codes, spilt = spill(codes, sizes, lambda prefixes: torch.full((len(prefixes),), sizes[-1]), apart)
        residuals, codebook = quantizer.last_level(points, codes)
        if spilt.any():
            codes[spilt, -1] = nearest(residuals[spilt], codebook)
        unique = make_unique(codes, residuals, codebook)
        report = describe_ids(points, quantizer, unique.codes, int((unique.moved | spilt).sum()), seed=seed)
        codes = unique.codes
    else:
        longer = add_digit(codes, _counts(popularity, on_collision, codes))
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


def _fit_over(ranks, quantizer, item_ids, embeddings, on_collision, popularity, recipe, seed) -> SemanticIDs:
    """`fit_semantic_ids` with the items distributed over ranks."""
    if not isinstance(quantizer, ResidualQuantizer):
        raise ValueError(
            f'quantiser {quantizer.method!r} does not support distributed fitting; use "balanced", or start without torchrun'
        )
    with ranks.together():
        item_ids = item_ids if isinstance(item_ids, np.ndarray) else list(item_ids)
        points = _check_embeddings(item_ids, embeddings)
        _check_counts(item_ids, popularity)
    widths = ranks.gather_objects(points.shape[1])
    if len(set(widths)) > 1:
        raise ValueError(
            f"embeddings have {widths} dimensions on ranks 0 to {ranks.size - 1}; pass the same number on all ranks"
        )
    quantizer.fit(points, ranks)
    codes, sizes, moved = quantizer.codes_, list(quantizer.codebook_sizes), 0
    if on_collision == "assign":
        unique = make_unique_over(ranks, codes, *quantizer.last_level(points, codes))
        moved = int(ranks.sum(unique.moved.sum()))
        gathered = ranks.gather(unique.codes)
    else:
        gathered = ranks.gather(add_digit_over(ranks, codes, _counts(popularity, on_collision, codes)))
        sizes.append(int(gathered[:, -1].max()) + 1)
    levels, digit = len(quantizer.codebook_sizes), sum(sizes[len(quantizer.codebook_sizes) :])
    report = describe_ids(points, quantizer, gathered[:, :levels], moved, digit, seed, ranks)
    parts = (part.cpu().numpy() for part in ranks.in_order(points, ROWS))
    shape = (len(gathered), points.shape[1])
    fingerprint = ranks.gather_objects(fingerprint_of(parts, np.dtype(np.float32), shape, recipe))[0]
    ids = ranks.gather_objects(item_ids)
    counts = None if popularity is None else ranks.gather_objects(np.asarray(popularity))
    catalogue = ItemCatalogue(
        np.concatenate(ids) if isinstance(item_ids, np.ndarray) else [item for part in ids for item in part],
        gathered.cpu().numpy(),
        sizes,
        popularity=None if counts is None else np.concatenate(counts),
        embedding_fingerprint=fingerprint,
    )
    return SemanticIDs(catalogue, quantizer, report)


def _counts(popularity: np.ndarray | None, on_collision: str, codes: torch.Tensor) -> torch.Tensor | None:
    """The counts that rank items of equal codes, where the policy does."""
    if popularity is None or on_collision != "popularity-rank":
        return None
    return torch.as_tensor(np.asarray(popularity), dtype=torch.long, device=codes.device)


def _check_counts(item_ids: Sequence | np.ndarray, popularity: np.ndarray | None) -> None:
    if popularity is not None and len(popularity) != len(item_ids):
        raise ValueError(f"popularity has {len(popularity)} counts for {len(item_ids)} items; pass one count per item")


def extend_catalogue(
    catalogue: ItemCatalogue,
    quantizer: Quantizer,
    item_ids: Sequence | np.ndarray,
    embeddings: np.ndarray | torch.Tensor,
    popularity: np.ndarray | None = None,
) -> ItemCatalogue:
    """
    Adds new items to a catalogue. Each gets its nearest codes; if the last code is taken, a free one is assigned at minimum cost, and where all last
    codes of a prefix are taken, the nearest prefix with a free one. Existing items keep their codes, so trained models remain usable
    (`model.set_catalogue(extended)`).

    Args:
        catalogue: from `fit_semantic_ids`.
        quantizer: the quantiser fitted with it.
        item_ids: n new integers or strings.
        embeddings: (n, d), from the same recipe as those of the fit.
        popularity: (n,) interaction counts.

    Raises:
        ValueError: existing ids, embeddings of a wrong width or not finite, or a quantiser with other codebook sizes.
        CrowdedPrefixError: no free code is left near a new item.

    Example:
        >>> vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
        >>> fitted = fit_semantic_ids(range(50), vectors[:50], codebook_sizes=[5, 5, 8])
        >>> grown = extend_catalogue(fitted.catalogue, fitted.quantizer, range(50, 60), vectors[50:])
        >>> len(grown), len(fitted.catalogue)
        (60, 50)
    """
    item_ids = item_ids if isinstance(item_ids, np.ndarray) else list(item_ids)
    points = _check_embeddings(item_ids, embeddings)
    sizes, levels = list(quantizer.codebook_sizes), len(catalogue.codebook_sizes)
    if sizes not in (catalogue.codebook_sizes, catalogue.codebook_sizes[:-1]):
        raise ValueError(
            f"the quantiser has codebook sizes {sizes}, the catalogue {catalogue.codebook_sizes}; pass the catalogue and the quantiser of one fit"
        )
    codes = quantizer.encode(points)
    codes, moved = spill(
        codes,
        catalogue.codebook_sizes,
        lambda prefixes: torch.from_numpy(catalogue.free_last_codes(prefixes.cpu().numpy()).sum(1)),
        partial(_distances, quantizer, points),
    )
    if len(sizes) < levels:  # the last level numbers items of equal codes
        return catalogue.add(item_ids, numbered(codes, catalogue).numpy(), popularity=popularity)
    residuals, codebook = quantizer.last_level(points, codes)
    if moved.any():
        codes[moved, -1] = nearest(residuals[moved], codebook)
    allowed = catalogue.free_last_codes(codes[:, :-1].cpu().numpy())
    unique = make_unique(codes, residuals, codebook, allowed=allowed)
    return catalogue.add(item_ids, unique.codes.cpu().numpy(), popularity=popularity)


def _distances(quantizer: Quantizer, points: torch.Tensor, rows: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
    """(rows, prefixes) distances of points to the reconstructions of prefixes."""
    return torch.cdist(points[rows], quantizer.decode(prefixes.to(points.device)).to(points.device))


def _check_embeddings(item_ids: Sequence | np.ndarray, embeddings: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Validates embeddings: (N, d) float32, finite, one row per item."""
    points = torch.as_tensor(embeddings).float()
    if points.ndim != 2 or len(points) != len(item_ids):
        raise ValueError(
            f"embeddings: expected one row for each of {len(item_ids)} items, got shape {tuple(points.shape)}; pass one row per item"
        )
    bad = ~torch.isfinite(points).all(1)
    if bad.any():
        first = int(bad.int().argmax())
        item = np.asarray(item_ids[first : first + 1]).tolist()[0]
        raise ValueError(
            f"{int(bad.sum())} of {len(item_ids)} items have NaN or infinite embeddings (first: item {item!r}); "
            "fix them or drop these items"
        )
    return points
