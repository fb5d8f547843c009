"""Item embeddings to balanced, unique semantic IDs."""

import importlib
from typing import TYPE_CHECKING

_PUBLIC = {
    "BalancedKMeans": "balanced_kmeans",
    "behaviour_embeddings": "embeddings",
    "combine_embeddings": "embeddings",
    "embedding_fingerprint": "embeddings",
    "text_embeddings": "embeddings",
    "SemanticIDReport": "fit",
    "SemanticIDs": "fit",
    "fit_semantic_ids": "fit",
    "ResidualQuantizer": "residual_quantizer",
    "UniqueResult": "unique_codes",
    "make_unique": "unique_codes",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from onerec_hf.semantic_ids.balanced_kmeans import BalancedKMeans
    from onerec_hf.semantic_ids.embeddings import (
        behaviour_embeddings,
        combine_embeddings,
        embedding_fingerprint,
        text_embeddings,
    )
    from onerec_hf.semantic_ids.fit import SemanticIDReport, SemanticIDs, fit_semantic_ids
    from onerec_hf.semantic_ids.residual_quantizer import ResidualQuantizer
    from onerec_hf.semantic_ids.unique_codes import UniqueResult, make_unique


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
