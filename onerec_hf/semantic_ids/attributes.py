"""Item embeddings from attributes (tags, author, type, duration), for items without text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onerec_hf.semantic_ids.embeddings import combine_embeddings


def attribute_embeddings(
    tags: Sequence[str],
    authors: Sequence[str],
    types: Sequence[str],
    duration_ms: Sequence[float],
    dim: int = 32,
    seed: int = 0,
) -> np.ndarray:
    """
    Embeds attributes. Tags, authors and types are IDF-weighted one-hot vectors, each reduced to `dim` columns by a random projection with
    N(0, 1) entries, which preserves cosines up to about 1 / sqrt(dim). The duration is encoded by Gaussian bumps at powers of two of
    seconds (width: half a power); unknown durations (0) give zeros.

    Args:
        tags: comma-separated values per item; may be empty.
        authors, types: one value per item; may be empty.
        duration_ms: milliseconds per item, 0 if unknown.
        dim: number of columns for each of tags, authors and types.
        seed: seed of the projections.

    Returns:
        (N, 3 * dim + 12) float32; each of the four parts has unit rows, or zeros if the attribute is missing.

    Raises:
        ValueError: unequal lengths, or negative or non-finite durations (with their number and the first).

    Example:
        >>> vectors = attribute_embeddings(["1,2", "1", ""], ["a", "a", "b"], ["x", "x", "x"], [9000, 9500, 0])
        >>> vectors.shape, bool(vectors[0] @ vectors[1] > vectors[0] @ vectors[2])
        ((3, 108), True)
    """
    if not len(tags) == len(authors) == len(types) == len(duration_ms):
        raise ValueError(
            f"attributes have unequal lengths: {len(tags)} tags, {len(authors)} authors, {len(types)} types, {len(duration_ms)} durations; pass one value per item"
        )
    durations = np.asarray(duration_ms, dtype=np.float64)
    bad = ~(np.isfinite(durations) & (durations >= 0))
    if bad.any():
        raise ValueError(
            f"duration_ms: {bad.sum()} of {len(bad)} durations are negative or not finite (first: row {int(bad.argmax())}, "
            f"{durations[bad.argmax()]}); set unknown ones to 0"
        )
    rng = np.random.default_rng(seed)
    named = [[value for value in text.split(",") if value] for text in tags]
    parts = [_projected(named, dim, rng)]
    parts += [_projected([[value] if value else [] for value in values], dim, rng) for values in (authors, types)]
    return combine_embeddings([*parts, _duration(durations)])


def _projected(values: list[list[str]], dim: int, rng: np.random.Generator) -> np.ndarray:
    """(N, dim): the sum of a random vector per value of an item, times the value's inverse document frequency."""
    vocabulary = {value: i for i, value in enumerate(sorted({value for row in values for value in row}))}
    owner = np.repeat(np.arange(len(values)), [len(row) for row in values])
    column = np.array([vocabulary[value] for row in values for value in row], dtype=np.int64)
    weight = np.log1p(len(values) / np.bincount(column, minlength=len(vocabulary)))
    vectors = rng.standard_normal((len(vocabulary), dim)) * weight[:, None]
    summed = np.zeros((len(values), dim))
    np.add.at(summed, owner, vectors[column])
    return summed


def _duration(duration_ms: np.ndarray) -> np.ndarray:
    """(N, 12): bumps at 1, 2, 4, ... 2048 seconds."""
    place = np.log2(np.maximum(duration_ms / 1000, 1.0))[:, None]
    bumps = np.exp(-0.5 * ((place - np.arange(12)) / 0.5) ** 2)
    return np.where(duration_ms[:, None] > 0, bumps, 0.0)
