"""Presets of `onerec-hf train`: sets of options, fixed or chosen from the data, below what the caller gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onerec_hf.workflows.artefact import saved_sizes
from onerec_hf.workflows.auto import Choice, Statistics, choose, codebook_size
from onerec_hf.workflows.dataset import InMemoryDataset, RecommendationDataset

PRESETS = ("auto", "paper", "tiger", "small", "v2")
#: Options of the data that a preset may set after reading it.
CUT = ("max_history", "session_length", "ties")

# TIGER (Rajput et al., arXiv 2305.05065) with this library's parts: RQ-VAE codes of item texts and an extra digit against collisions, a dense
# decoder, one item per session, cross-attention without rotary positions as in T5. Sizes are those of the benchmark.
_TIGER = {
    "session_length": 1,
    "max_history": 20,
    "codebook_sizes": [256, 256, 256],
    "quantizer": "rq-vae",
    "on_collision": "extra-digit",
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_experts": 1,
    "cross_attention_rope": False,
}
_TIGER_TRAINING = {
    "num_train_epochs": 50,
    "per_device_train_batch_size": 256,
    "per_device_eval_batch_size": 256,
    "train_sampling_strategy": "group_by_length",
    "learning_rate": 0.001,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 200,
    "weight_decay": 0.1,
}
# A first model without an item head, in minutes on two CPU cores.
_SMALL = {"max_history": 10, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64}
_SMALL_TRAINING = {
    "max_steps": 1200,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "learning_rate": 0.002,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "logging_steps": 100,
    "save_strategy": "no",
    "eval_num_beams": 30,
}
# OneRec-V2 (arXiv 2508.20900): a lazy dense decoder of eight blocks that reads item vectors beside codes and trains on every prefix of a history.
_V2 = {
    "architecture": "onerec_v2",
    "session_length": 1,
    "max_history": 50,
    "hidden_size": 128,
    "intermediate_size": 256,
    "decoder_layers": 8,
    "num_experts": 1,
    "dropout_rate": 0.2,
    "encoder_is_causal": True,  # no layer reads the history, so no prefix sees what follows it
    "item_head": True,
    "item_head_dropout": 0.2,
    "item_head_loss_weight": 0.0,
    "decoder_scales_embeddings": True,
    "train_on": "prefixes",
}
_V2_TRAINING = {
    "num_train_epochs": 20,
    "packing": True,
    "packing_length": 256,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 128,
    "learning_rate": 0.002,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "weight_decay": 0.05,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "ndcg@10",
    "eval_num_beams": 30,
}


def choices_of(
    preset: str,
    data: RecommendationDataset,
    given: Mapping[str, Any],
    use_cpu: bool = False,
    saved: str | None = None,
) -> list[Choice]:
    """
    The options that a preset sets for a dataset; those that the caller gave keep their values.

    Args:
        preset: one of `PRESETS`. `paper` sets nothing: the defaults of the settings are the paper's.
        given: options that the caller decided.
        use_cpu: as in the training arguments.
        saved: a model or a checkpoint to go on from, folder or Hub id.

    Example:
        >>> choices_of("tiger", dataset, {"hidden_size": 64})[5]  # doctest: +SKIP
        Choice(option='hidden_size', value=64, reason='given')
    """
    given = {**given, **data_given(data)}
    if preset == "auto":
        return choose(Statistics.of(data, use_cpu), given, None if saved is None else saved_sizes(saved))
    fixed: dict[str, Any] = {}
    if preset == "tiger" and saved is None:
        fixed = dict(_TIGER)
        if data.items is not None:
            fixed["embedding"] = "text" if data.items.embeddings is None else "given"
    elif preset in ("small", "v2") and saved is None:
        fixed = {**(_SMALL if preset == "small" else _V2), "codebook_sizes": [codebook_size(len(data.item_ids))] * 3}
    fixed |= {"tiger": _TIGER_TRAINING, "small": _SMALL_TRAINING, "v2": _V2_TRAINING}.get(preset, {})
    if not isinstance(data, InMemoryDataset):  # its examples are cut already, and a stream is not packed
        fixed = {
            name: value for name, value in fixed.items() if name not in (*CUT, "train_on", "packing", "packing_length")
        }
    return [
        Choice(name, given[name], "given") if name in given else Choice(name, value, f"preset {preset}")
        for name, value in fixed.items()
    ]


def data_given(data: RecommendationDataset) -> dict[str, Any]:
    """The options of `CUT` that the caller decided when the dataset was loaded."""
    if not isinstance(data, InMemoryDataset):
        return {}
    return {name: getattr(data.settings, name) for name in CUT if name in data.given}


def cut_as_chosen(data: RecommendationDataset, choices: Sequence[Choice]) -> RecommendationDataset:
    """The dataset with the examples that the choices describe: ties, length of histories and of sessions."""
    wanted = {row.option: row.value for row in choices if row.option in CUT}
    if not isinstance(data, InMemoryDataset):
        return data
    if wanted.pop("ties", "file") != data.settings.ties == "file":
        data = data.with_shuffled_ties()
    return data.cut(**wanted) if any(getattr(data.settings, name) != wanted[name] for name in wanted) else data


def check_preset(preset: str) -> None:
    """
    Raises:
        ValueError: an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
