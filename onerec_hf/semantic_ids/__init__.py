"""Item embeddings, quantisers and unique semantic IDs."""

from typing import TYPE_CHECKING

from onerec_hf._lazy import lazy_exports

_PUBLIC = {
    "align_embeddings": "alignment",
    "cooccurring_pairs": "alignment",
    "info_nce": "alignment",
    "attribute_embeddings": "attributes",
    "BalancedKMeans": "balanced_kmeans",
    "behaviour_embeddings": "embeddings",
    "combine_embeddings": "embeddings",
    "embedding_fingerprint": "embeddings",
    "reduce_embeddings": "embeddings",
    "sentence_embeddings": "embeddings",
    "text_embeddings": "embeddings",
    "SemanticIDs": "fit",
    "extend_catalogue": "fit",
    "fit_semantic_ids": "fit",
    "read_grid_tensor": "formats.grid",
    "write_grid_tensor": "formats.grid",
    "ImportResult": "formats.imported",
    "ImportedIDs": "formats.imported",
    "read_index_json": "formats.index_json",
    "read_semantic_id_strings": "formats.index_json",
    "write_index_json": "formats.index_json",
    "graph_embeddings": "graph",
    "Quantizer": "quantizer",
    "make_quantizer": "quantizer",
    "Ranks": "process_group",
    "SemanticIDReport": "report",
    "compare_reports": "report",
    "plot_reports": "report",
    "ResidualQuantizer": "residual_quantizer",
    "RQVAEQuantizer": "rq_vae",
    "CrowdedPrefixError": "unique_codes",
    "UniqueResult": "unique_codes",
    "add_digit": "unique_codes",
    "make_unique": "unique_codes",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from onerec_hf.semantic_ids.alignment import align_embeddings, cooccurring_pairs, info_nce
    from onerec_hf.semantic_ids.attributes import attribute_embeddings
    from onerec_hf.semantic_ids.balanced_kmeans import BalancedKMeans
    from onerec_hf.semantic_ids.embeddings import (
        behaviour_embeddings,
        combine_embeddings,
        embedding_fingerprint,
        reduce_embeddings,
        sentence_embeddings,
        text_embeddings,
    )
    from onerec_hf.semantic_ids.fit import SemanticIDs, extend_catalogue, fit_semantic_ids
    from onerec_hf.semantic_ids.formats.grid import read_grid_tensor, write_grid_tensor
    from onerec_hf.semantic_ids.formats.imported import ImportedIDs, ImportResult
    from onerec_hf.semantic_ids.formats.index_json import read_index_json, read_semantic_id_strings, write_index_json
    from onerec_hf.semantic_ids.graph import graph_embeddings
    from onerec_hf.semantic_ids.process_group import Ranks
    from onerec_hf.semantic_ids.quantizer import Quantizer, make_quantizer
    from onerec_hf.semantic_ids.report import SemanticIDReport, compare_reports, plot_reports
    from onerec_hf.semantic_ids.residual_quantizer import ResidualQuantizer
    from onerec_hf.semantic_ids.rq_vae import RQVAEQuantizer
    from onerec_hf.semantic_ids.unique_codes import CrowdedPrefixError, UniqueResult, add_digit, make_unique
else:
    __getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
