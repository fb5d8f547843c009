"""The rows of the contest (benchmarks/quality.py): what each model is, as settings over the data set's recipe or of a sequence model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """
    Args:
        kind: `ranking` (nothing is trained), `sequence` (_sequence_models.py) or `onerec` (`onerec-hf train`'s options).
        settings: of that kind.
        says: what stands beside the row in the table.
    """

    kind: str
    says: str
    settings: dict[str, Any] = field(default_factory=dict)


ROWS = {
    "popularity": Row("ranking", "items by training interactions", {"model": "popularity"}),
    "item_knn": Row("ranking", "cosine of item columns, summed over the history", {"model": "item_knn"}),
    "sasrec_bce": Row("sequence", "SASRec as published: one random negative", {"model": "sasrec", "loss": "bce"}),
    "sasrec_ce": Row("sequence", "SASRec, softmax over all items", {"model": "sasrec"}),
    "gru4rec": Row("sequence", "GRU4Rec, softmax over all items", {"model": "gru4rec"}),
    "hstu": Row("sequence", "HSTU (positions only), softmax over all items", {"model": "hstu"}),
    # TIGER of the same parts: residual quantisation of item texts by an autoencoder, a digit against collisions, a dense decoder, one item.
    "tiger": Row(
        "onerec",
        "TIGER of our parts: RQ-VAE codes of texts, extra digit, dense, pointwise",
        {
            "embedding": "given",
            "quantizer": "rq-vae",
            "on_collision": "extra-digit",
            "num_experts": 1,
            "session_length": 1,
            "cross_attention_rope": False,
        },
    ),
    "onerec_pointwise": Row("onerec", "OneRec, one item a session", {"session_length": 1}),
    "onerec": Row("onerec", "OneRec, the recipe's sessions"),
    "onerec_m5": Row("onerec", "OneRec, sessions of five", {"session_length": 5}),
    "onerec_aligned_ids": Row(
        "onerec", "OneRec, IDs of aligned embeddings beside behaviour", {"embedding": "aligned+behaviour"}
    ),
    "onerec_dense": Row("onerec", "OneRec, dense at equal active width", {"num_experts": 1}),
    "onerec_plain_kmeans": Row("onerec", "OneRec, IDs by plain k-means", {"quantizer": "kmeans"}),
    "onerec_rq_vae": Row("onerec", "OneRec, IDs by an RQ-VAE", {"quantizer": "rq-vae"}),
}
