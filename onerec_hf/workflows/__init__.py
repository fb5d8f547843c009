"""
From tables to trained, evaluated and saved models, in Python; the commands of `onerec-hf` call these functions.

    >>> from onerec_hf.workflows import train
    >>> result = train(interactions="ratings.csv", items="films.csv", output_dir="runs/films")  # doctest: +SKIP
    >>> result.metrics, result.model, result.processor  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onerec_hf._lazy import lazy_exports

_PUBLIC = {
    "AddItemsSettings": "new_items",
    "AddedItems": "new_items",
    "AlignSettings": "alignment",
    "Choice": "auto",
    "DataSettings": "settings",
    "EvaluateSettings": "evaluation",
    "FitSettings": "semantic_ids",
    "GeneratorResult": "results",
    "InMemoryDataset": "dataset",
    "ModelSettings": "settings",
    "OutputSettings": "settings",
    "RecommendationDataset": "dataset",
    "Result": "results",
    "RewardDataSettings": "reward_data",
    "RewardModelSettings": "reward_training",
    "RewardResult": "results",
    "RunComplete": "errors",
    "SemanticIDSettings": "settings",
    "SessionHeadResult": "session_head",
    "SessionHeadSettings": "session_head",
    "ShardedDataset": "dataset",
    "ShardingSettings": "sharding",
    "TrainSettings": "training",
    "UpdateResult": "updating",
    "UpdateSettings": "updating",
    "add_items": "new_items",
    "align": "alignment",
    "chosen_settings": "training",
    "compare_quantizers": "semantic_ids",
    "evaluate": "evaluation",
    "fit_semantic_ids": "semantic_ids",
    "load_dataset": "loading",
    "load_feedback": "reward_data",
    "load_in_memory": "loading",
    "load_model": "artefact",
    "load_processor": "artefact",
    "ranking_table": "results",
    "train": "training",
    "train_reward": "reward_training",
    "train_session_head": "session_head",
    "update": "updating",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from onerec_hf.workflows.alignment import AlignSettings, align
    from onerec_hf.workflows.artefact import load_model, load_processor
    from onerec_hf.workflows.auto import Choice
    from onerec_hf.workflows.dataset import InMemoryDataset, RecommendationDataset, ShardedDataset
    from onerec_hf.workflows.errors import RunComplete
    from onerec_hf.workflows.evaluation import EvaluateSettings, evaluate
    from onerec_hf.workflows.loading import load_dataset, load_in_memory
    from onerec_hf.workflows.new_items import AddedItems, AddItemsSettings, add_items
    from onerec_hf.workflows.results import GeneratorResult, Result, RewardResult, ranking_table
    from onerec_hf.workflows.reward_data import RewardDataSettings, load_feedback
    from onerec_hf.workflows.reward_training import RewardModelSettings, train_reward
    from onerec_hf.workflows.semantic_ids import FitSettings, compare_quantizers, fit_semantic_ids
    from onerec_hf.workflows.session_head import SessionHeadResult, SessionHeadSettings, train_session_head
    from onerec_hf.workflows.settings import DataSettings, ModelSettings, OutputSettings, SemanticIDSettings
    from onerec_hf.workflows.sharding import ShardingSettings
    from onerec_hf.workflows.training import TrainSettings, chosen_settings, train
    from onerec_hf.workflows.updating import UpdateResult, UpdateSettings, update
else:
    __getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
