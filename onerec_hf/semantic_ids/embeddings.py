"""Item embeddings for semantic IDs: text (TF-IDF, language models), behaviour (co-occurrence), combinations, PCA."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onerec_hf.semantic_ids.terms import terms

if TYPE_CHECKING:
    import scipy.sparse
    from sentence_transformers import SentenceTransformer


def text_embeddings(texts: Sequence[str], dim: int = 64, seed: int = 0) -> np.ndarray:
    """
    TF-IDF of words and word pairs, in scripts without spaces of n-grams of characters ([`~onerec_hf.semantic_ids.terms.terms`]), reduced by
    truncated SVD.

    Args:
        texts: one per item; an empty text gives a zero row.
        dim: dimensions (at most the rank of the TF-IDF matrix).
        seed: seed of the SVD.

    Returns:
        (N, at most dim) float32, unit rows.

    Raises:
        ValueError: no text contains a word.

    Example:
        >>> vectors = text_embeddings(["red lipstick", "red nail polish", "garden hose", ""], dim=2)
        >>> vectors.shape, bool(vectors[0] @ vectors[1] > vectors[0] @ vectors[2]), vectors[3].tolist()
        ((4, 2), True, [0.0, 0.0])
    """
    return TextEncoder.fit(texts, dim, seed)[0]


#: Terms of a [`TextEncoder`]: those of most texts. The others hardly reach a new text.
MOST_TERMS = 32_768


class TextEncoder:
    """
    [`text_embeddings`] of new texts: the terms of a fit, their weights and their vectors.

    Args:
        terms: T words and word pairs.
        idf: (T,) float32 inverse document frequencies.
        vectors: (T, d) float32 vectors of the terms.

    Example:
        >>> fitted, encoder = TextEncoder.fit(["red lipstick", "red nail polish", "garden hose"], dim=2)
        >>> bool(np.allclose(encoder.encode(["garden hose"]), fitted[2:], atol=1e-3)), encoder.encode(["blue"]).tolist()
        (True, [[0.0, 0.0]])
    """

    def __init__(self, terms: Sequence[str], idf: np.ndarray, vectors: np.ndarray):
        self.terms, self.idf, self.vectors = list(terms), idf, vectors

    @classmethod
    def fit(cls, texts: Sequence[str], dim: int = 64, seed: int = 0) -> tuple[np.ndarray, TextEncoder]:
        """
        The embeddings of `texts`, and their encoder with at most [`MOST_TERMS`] terms.

        Args:
            texts, dim, seed: as for [`text_embeddings`].

        Raises:
            ValueError: no text contains a word.
        """
        vectorizer = _vectorizer()
        try:
            matrix = vectorizer.fit_transform(texts)
        except ValueError as error:
            raise ValueError(
                f"none of {len(texts)} texts contains a word to embed ({error}); pass other text columns or embeddings"
            ) from None
        reduced, directions = _reduce(matrix, dim, seed)
        kept = np.sort(np.argsort(vectorizer.idf_, kind="stable")[:MOST_TERMS])
        terms = vectorizer.get_feature_names_out()[kept].tolist()
        return unit_rows(reduced), cls(terms, vectorizer.idf_[kept].astype(np.float32), directions[:, kept].T)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32 unit rows; zero rows for texts without a known term."""
        vectorizer = _vectorizer(vocabulary={term: place for place, term in enumerate(self.terms)})
        vectorizer.idf_ = self.idf
        return unit_rows(vectorizer.transform(texts) @ self.vectors)


def _vectorizer(**fitted):
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(sublinear_tf=True, analyzer=cast("Any", terms), **fitted)


def sentence_embeddings(texts: Sequence[str], model: str | SentenceTransformer, batch_size: int = 64) -> np.ndarray:
    """
    Embeds texts with a sentence-transformers model (extra `text`).

    Args:
        texts: one per item; an empty text gives a zero row.
        model: a `SentenceTransformer`, or its folder or Hub id.
        batch_size: texts per batch.

    Returns:
        (N, d) float32, unit rows.

    Raises:
        ValueError: sentence-transformers is not installed.

    Example:
        >>> vectors = sentence_embeddings(["red lipstick"], "sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(
            'sentence embeddings need sentence-transformers, which is not installed. Run: pip install "onerec-hf[text]"'
        ) from None
    model = SentenceTransformer(model) if isinstance(model, str) else model
    vectors = np.asarray(model.encode(list(texts), batch_size=batch_size, show_progress_bar=False), dtype=np.float32)
    vectors[[not text.strip() for text in texts]] = 0
    return unit_rows(vectors)


def reduce_embeddings(embeddings: np.ndarray, dim: int, whiten: bool = False, seed: int = 0) -> np.ndarray:
    """
    PCA: subtracts the mean and keeps the `dim` directions of largest variance.

    Args:
        embeddings: (N, d).
        dim: dimensions (at most N and d).
        whiten: scale every direction to unit variance.
        seed: seed of the randomised solver.

    Returns:
        (N, at most dim) float32.

    Example:
        >>> vectors = np.random.default_rng(0).normal(size=(100, 8)) * np.arange(1, 9)
        >>> reduce_embeddings(vectors, 3, whiten=True).std(0).round(1).tolist()
        [1.0, 1.0, 1.0]
    """
    from sklearn.decomposition import PCA

    embeddings = np.asarray(embeddings, dtype=np.float32)
    pca = PCA(min(dim, *embeddings.shape), whiten=whiten, random_state=seed)
    return pca.fit_transform(embeddings).astype(np.float32)


def behaviour_embeddings(
    sequences: Sequence[np.ndarray], num_items: int, dim: int = 64, window: int = 5, seed: int = 0
) -> np.ndarray:
    """
    Behavioural embeddings: positive pointwise mutual information of co-occurrence, reduced by truncated SVD (rows of `U * sqrt(S)`).
    Items that users consume close together get similar vectors.

    Args:
        sequences: item indices of each user in time order.
        num_items: number of items in the catalogue.
        dim: dimensions (at most the rank of the co-occurrence matrix).
        window: maximum distance of co-occurring items, in steps; a pair d steps apart counts 1/d.
        seed: seed of the SVD.

    Returns:
        (num_items, at most dim) float32, unit rows; zero rows for items that never co-occur with another.

    Example:
        >>> vectors = behaviour_embeddings([np.array([0, 1]), np.array([0, 1]), np.array([2, 3])], num_items=5, dim=3)
        >>> vectors.shape, vectors[4].tolist()
        ((5, 3), [0.0, 0.0, 0.0])
    """
    matrix = positive_pmi(cooccurrence(sequences, num_items, window))
    reduced, _ = _reduce(matrix, dim, seed, scale_power=0.5)
    return unit_rows(reduced)


def cooccurrence(sequences: Sequence[np.ndarray], num_items: int, window: int) -> scipy.sparse.csr_matrix:
    """
    (num_items, num_items) symmetric counts of pairs at most `window` steps apart inside a sequence, 1/d for d steps.

    Example:
        >>> cooccurrence([np.array([0, 1, 2])], 3, window=2).toarray().tolist()
        [[0.0, 1.0, 0.5], [1.0, 0.0, 1.0], [0.5, 1.0, 0.0]]
    """
    import scipy.sparse

    flat = np.concatenate(sequences)
    owner = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    counts = scipy.sparse.csr_matrix((num_items, num_items))
    for distance in range(1, window + 1):
        together = owner[:-distance] == owner[distance:]
        first, second = flat[:-distance][together], flat[distance:][together]
        weight = np.full(len(first), 1 / distance)
        counts = counts + scipy.sparse.csr_matrix((weight, (first, second)), shape=counts.shape)
    return counts + counts.T


def positive_pmi(counts: scipy.sparse.csr_matrix, smoothing: float = 0.75) -> scipy.sparse.csr_matrix:
    """
    max(0, log p(i, j) / (p(i) q(j))) of co-occurrence counts, with q(j) proportional to count(j)^smoothing (Levy et al., 2015).

    Example:
        >>> positive_pmi(cooccurrence([np.array([0, 1])], 2, window=1)).toarray().round(3).tolist()
        [[0.0, 0.693], [0.693, 0.0]]
    """
    import scipy.sparse

    pairs = counts.tocoo()
    by_item = np.asarray(counts.sum(1)).ravel()
    context = by_item**smoothing
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log(pairs.data * context.sum() / (by_item[pairs.row] * context[pairs.col]))
    keep = values > 0
    return scipy.sparse.csr_matrix((values[keep], (pairs.row[keep], pairs.col[keep])), shape=counts.shape)


def combine_embeddings(parts: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """
    Concatenates embeddings; each part is normalised to unit rows and multiplied by its weight.

    Example:
        >>> combine_embeddings([np.array([[3.0, 4.0]]), np.array([[2.0]])], weights=[1, 0.5]).astype(float).round(2).tolist()
        [[0.6, 0.8, 0.5]]
    """
    weights = [1.0] * len(parts) if weights is None else weights
    return np.concatenate(
        [weight * unit_rows(part) for part, weight in zip(parts, weights, strict=True)], axis=1, dtype=np.float32
    )


def embedding_fingerprint(embeddings: np.ndarray, recipe: str) -> str:
    """
    SHA-256 over the recipe's name and the embeddings' dtype, shape and bytes, to identify the vectors behind semantic IDs.

    Example:
        >>> len(embedding_fingerprint(np.zeros((2, 2)), "zeros"))
        64
    """
    return fingerprint_of([embeddings], embeddings.dtype, embeddings.shape, recipe)


def fingerprint_of(parts: Iterable[np.ndarray], dtype: np.dtype, shape: tuple[int, ...], recipe: str) -> str:
    """[`embedding_fingerprint`] of embeddings passed in consecutive parts; `shape` is the total shape."""
    digest = hashlib.sha256(f"{recipe}|{dtype.str}|{shape}".encode())
    for part in parts:
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _reduce(matrix, dim: int, seed: int, scale_power: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(n, d) float32 `U * S^scale_power` of the d = min(dim, rank bound) largest singular values, and the (d, columns) directions."""
    from sklearn.decomposition import TruncatedSVD

    if min(matrix.shape) < 2:  # of one row or column, which TruncatedSVD refuses: the matrix is its own decomposition
        dense = np.asarray(matrix.todense(), dtype=np.float64)
        largest = max(np.linalg.norm(dense), 1e-12)
        first, direction = (
            (dense, np.ones((1, 1))) if dense.shape[1] == 1 else (np.full((1, 1), largest), dense / largest)
        )
        return (first * largest ** (scale_power - 1)).astype(np.float32), direction.astype(np.float32)
    dim = max(1, min(dim, min(matrix.shape) - 1))
    svd = TruncatedSVD(dim, random_state=seed)
    with np.errstate(invalid="ignore", divide="ignore"):  # a single text, or equal ones, have no variance
        reduced = svd.fit_transform(matrix)
    scale = np.maximum(svd.singular_values_, 1e-12) ** (scale_power - 1)
    return np.asarray(reduced * scale, dtype=np.float32), np.asarray(svd.components_, dtype=np.float32)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Normalises rows to length one; (almost) zero rows become zero."""
    rows = np.asarray(rows, dtype=np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(length > 1e-6, rows / np.maximum(length, 1e-6), 0.0).astype(np.float32)
