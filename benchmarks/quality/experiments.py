"""The rows of the contest (benchmarks/quality/run.py): what each model is, as settings over the data set's recipe or of a sequence model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality.search_spaces import FAMILIES, WINNERS, drawn, winner


@dataclass(frozen=True)
class Row:
    """
    Args:
        kind: `ranking` (nothing is trained), `sequence` (runs.SEQUENCE_SETTINGS) or `onerec` (`onerec-hf train`'s options).
        settings: of that kind.
        says: what stands beside the row in the table.
    """

    kind: str
    says: str
    settings: dict[str, Any] = field(default_factory=dict)


# What a row has only where it says so, whatever the recipe has.
PLAIN: dict[str, Any] = {
    "session_length": 1,
    "embedding": "given+behaviour",
    "item_embeddings": "false",
    "item_embedding_dropout": 0,
    "item_loss_weight": 0,
    "item_score_weight": 0,
    "encoder_is_causal": "false",
    "encoder_attention": "softmax",
    "encoder_pools_items": "false",
    "encoder_scales_embeddings": "false",
    "item_scores_with_codes": "false",
    "train_on": "windows",
    "packing": "false",
    "label_smoothing_factor": 0,
}
ALIGNED: dict[str, Any] = {**PLAIN, "embedding": "aligned+behaviour"}
ITEMS: dict[str, Any] = {**ALIGNED, "item_embeddings": "true"}
SCORED: dict[str, Any] = {**ITEMS, "item_loss_weight": 1, "item_score_weight": 1, "item_score_weights": [0, 0.5, 1, 2]}
PREFIXES: dict[str, Any] = {
    **SCORED,
    "encoder_is_causal": "true",
    "train_on": "prefixes",
    "packing": "true",
    "train_sampling_strategy": "random",
    "per_device_train_batch_size": 24,
}
POINTWISE: dict[str, Any] = {**PREFIXES, "encoder_attention": "pointwise"}
POOLED: dict[str, Any] = {**POINTWISE, "encoder_pools_items": "true"}
SCALED: dict[str, Any] = {
    **POOLED,
    "encoder_scales_embeddings": "true",
    "dropout_rate": 0.35,
    "item_score_weight": 4,
    "item_score_weights": [0, 1, 2, 4, 8, 16],
}
DROPOUT: dict[str, Any] = {
    **SCALED,
    "item_scores_with_codes": "true",
    "embedding": "given+behaviour",
    "dropout_rate": 0.45,
    "item_embedding_dropout": 0.3,
    "item_score_weight": 8,
    "item_score_weights": (),
    "per_device_train_batch_size": 8,
    "num_train_epochs": 10,
}
# Residual quantisation of item texts by an autoencoder, a digit against collisions, T5's cross-attention.
TIGER: dict[str, Any] = {
    "embedding": "given",
    "quantizer": "rq-vae",
    "on_collision": "extra-digit",
    "cross_attention_rope": "false",
    "dropout_rate": 0.1,
}
# The generator by itself, small.
CODES: dict[str, Any] = {
    **SCALED,
    "item_embeddings": "false",
    "item_loss_weight": 0,
    "item_score_weight": 0,
    "item_score_weights": (),
    "hidden_size": 64,
    "intermediate_size": 128,
    "dropout_rate": 0.2,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 8,
}

SASREC: dict[str, Any] = {"model": "sasrec", "scaled": True, "width": 256, "layers": 1, "dropout": 0.5, "patience": 8}
GRU4REC: dict[str, Any] = {"model": "gru4rec", "width": 128, "inner": 256, "dropout": 0.5, "patience": 8}
HSTU: dict[str, Any] = {"model": "hstu", "width": 128, "layers": 3, "dropout": 0.5, "lr": 0.0005, "patience": 8}

ROWS = {
    "popularity": Row("ranking", "items by training interactions", {"model": "popularity"}),
    "item_knn": Row("ranking", "cosine of item columns, summed over the history", {"model": "item_knn"}),
    "sasrec_bce": Row(
        "sequence",
        "SASRec as published: one random negative",
        {"model": "sasrec", "loss": "bce", "scaled": True, "width": 64, "dropout": 0.5, "patience": 40},
    ),
    "sasrec_ce": Row("sequence", "SASRec, softmax over all items", SASREC),
    "gru4rec": Row("sequence", "GRU4Rec, softmax over all items", GRU4REC),
    "hstu": Row("sequence", "HSTU (positions only), softmax over all items", HSTU),
    # Tuned further, as OneRec was.
    "sasrec_ce_smoothed": Row(
        "sequence",
        "SASRec, labels smoothed, larger batches and steps",
        {**SASREC, "label_smoothing": 0.2, "batch_size": 256, "lr": 0.002},
    ),
    "sasrec_ce_text": Row(
        "sequence",
        "SASRec that reads items' texts too, labels smoothed",
        {**SASREC, "label_smoothing": 0.1, "features": "given"},
    ),
    "gru4rec_smoothed": Row(
        "sequence",
        "GRU4Rec, labels smoothed, wider, larger batches and steps",
        {**GRU4REC, "width": 256, "inner": 512, "label_smoothing": 0.2, "batch_size": 256, "lr": 0.002},
    ),
    "hstu_smoothed": Row(
        "sequence", "HSTU, labels smoothed, larger batches", {**HSTU, "label_smoothing": 0.1, "batch_size": 256}
    ),
    # TIGER of the same parts, with a dense decoder, one item.
    "tiger": Row(
        "onerec",
        "TIGER of our parts: RQ-VAE codes of texts, extra digit, dense, pointwise",
        {
            **PLAIN,
            **TIGER,
            "num_experts": 1,
            "num_train_epochs": 50,
        },
    ),
    "onerec_pointwise": Row("onerec", "OneRec, one item a session", PLAIN),
    "onerec": Row("onerec", "OneRec, sessions of three", {**PLAIN, "session_length": 3}),
    "onerec_m5": Row("onerec", "OneRec, sessions of five", {**PLAIN, "session_length": 5}),
    "onerec_text_ids": Row("onerec", "OneRec pointwise, IDs of texts alone", {**PLAIN, "embedding": "given"}),
    "onerec_aligned_ids": Row("onerec", "OneRec pointwise, IDs of aligned embeddings beside behaviour", ALIGNED),
    "onerec_items": Row("onerec", "+ item vectors beside the codes of a history", ITEMS),
    "onerec_items_scored": Row("onerec", "+ the item loss, beams guided by it", SCORED),
    "onerec_items_prefixes": Row("onerec", "the same, trained on prefixes with a causal encoder", PREFIXES),
    "onerec_items_pointwise": Row("onerec", "and the encoder's attention without a softmax", POINTWISE),
    "onerec_items_pooled": Row("onerec", "and one place per item in the encoder", POOLED),
    "onerec_items_scaled": Row("onerec", "and its embeddings scaled", SCALED),
    "onerec_items_coded": Row(
        "onerec", "and items named by their codes too", {**SCALED, "item_scores_with_codes": "true"}
    ),
    "onerec_items_dropout": Row(
        "onerec", "and item vectors left out at random, more dropout, IDs of texts beside behaviour", DROPOUT
    ),
    "onerec_items_smoothed": Row(
        "onerec", "and labels smoothed", {**DROPOUT, "label_smoothing_factor": 0.1, "item_score_weight": 32}
    ),
    # One thing altered at a time, of a small generator by itself: codes alone, no item vectors, no guide.
    "codes": Row("onerec", "codes alone: aligned IDs, balanced k-means of 3 x 256, dense, one item", CODES),
    # TIGER at this size, and with twice the epochs: in five it has not learnt its codes.
    "codes_tiger": Row(
        "onerec",
        "TIGER: RQ-VAE codes of texts, an extra digit, an encoder of tokens with a softmax, ten epochs",
        {
            **CODES,
            **TIGER,
            "encoder_attention": "softmax",
            "encoder_pools_items": "false",
            "encoder_scales_embeddings": "false",
            "num_train_epochs": 10,
        },
    ),
    "codes_kmeans": Row("onerec", "IDs by plain residual k-means", {**CODES, "quantizer": "kmeans"}),
    "codes_rq_vae": Row("onerec", "IDs by an RQ-VAE", {**CODES, "quantizer": "rq-vae"}),
    "codes_text": Row("onerec", "IDs of texts", {**CODES, "embedding": "given"}),
    "codes_behaviour": Row("onerec", "IDs of texts beside behaviour", {**CODES, "embedding": "given+behaviour"}),
    "codes_digit": Row("onerec", "collisions kept apart by an extra digit", {**CODES, "on_collision": "extra-digit"}),
    "codes_64": Row("onerec", "codebooks of 3 x 64", {**CODES, "codebook_sizes": [64, 64, 64]}),
    "codes_1024": Row("onerec", "codebooks of 3 x 1024", {**CODES, "codebook_sizes": [1024, 1024, 1024]}),
    "codes_experts": Row(
        "onerec",
        "8 experts, 2 used, of the same active width",
        {**CODES, "num_experts": 8, "moe_intermediate_size": 64},
    ),
    "codes_4_experts": Row(
        "onerec", "4 experts, 2 used, likewise", {**CODES, "num_experts": 4, "moe_intermediate_size": 64}
    ),
    "codes_24_experts": Row(
        "onerec", "24 experts, 2 used, likewise", {**CODES, "num_experts": 24, "moe_intermediate_size": 64}
    ),
    "codes_vectors": Row("onerec", "item vectors beside the codes of a history", {**CODES, "item_embeddings": "true"}),
    "codes_smoothed": Row("onerec", "label smoothing of .1", {**CODES, "label_smoothing_factor": 0.1}),
    "codes_dropout": Row("onerec", "dropout of .1", {**CODES, "dropout_rate": 0.1}),
    "codes_wide": Row("onerec", "twice the width", {**CODES, "hidden_size": 128, "intermediate_size": 256}),
    "codes_deep": Row(
        "onerec", "four encoder layers, two decoder layers", {**CODES, "encoder_layers": 4, "decoder_layers": 2}
    ),
    "codes_windows": Row(
        "onerec",
        "a window per target in place of prefixes, as many targets a step",
        {**CODES, "train_on": "windows", "per_device_train_batch_size": 46},
    ),
    "codes_m5": Row("onerec", "sessions of five", {**CODES, "session_length": 5}),
    "codes_m5_first": Row(
        "onerec",
        "sessions of five, the first item counting four times the others",
        {**CODES, "session_length": 5, "session_loss_weights": [4, 1, 1, 1, 1]},
    ),
    "codes_averaged": Row(
        "onerec",
        "weights averaged over some 200 steps, a third of the learning rate left at the end",
        {**CODES, "averaged": 0.995, "least_learning_rate": 0.3},
    ),
    # Both go on from `codes` for the same steps (_quality_alignment.py).
    "codes_ntp": Row("onerec", "three epochs of 20,000 windows more", {**CODES, "alignment": {"dpo_weight": 0.0}}),
    "codes_ipa": Row(
        "onerec", "the same with preference alignment, a SASRec's scores the reward", {**CODES, "alignment": {}}
    ),
}
ROWS |= {
    winner(family): Row(
        ROWS[about.row].kind,
        f"{about.says}, the best of 16 settings drawn at random (benchmarks/quality/search.py)",
        {**ROWS[about.row].settings, **drawn(family, WINNERS[family])},
    )
    for family, about in FAMILIES.items()
}
