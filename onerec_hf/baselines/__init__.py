"""Baselines: popularity, item-kNN, and the sequence models SASRec, HSTU, GRU4Rec and ACVAE. Names are imported on first use."""

from typing import TYPE_CHECKING

from onerec_hf._lazy import lazy_exports

_PUBLIC = {
    "ItemIndex": "item_index",
    "ItemKNNBaseline": "memory",
    "ItemRecommender": "requests",
    "NextItemCollator": "next_items",
    "NextItemDataset": "next_items",
    "PopularityBaseline": "memory",
    "SequentialConfig": "configuration_sequential",
    "SequentialRecommender": "modeling_sequential",
    "add_evidence": "evidence",
    "load_item_recommender": "requests",
    "load_ranking": "saved",
    "save_ranking": "saved",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from onerec_hf.baselines.configuration_sequential import SequentialConfig
    from onerec_hf.baselines.evidence import add_evidence
    from onerec_hf.baselines.item_index import ItemIndex
    from onerec_hf.baselines.memory import ItemKNNBaseline, PopularityBaseline
    from onerec_hf.baselines.modeling_sequential import SequentialRecommender
    from onerec_hf.baselines.next_items import NextItemCollator, NextItemDataset
    from onerec_hf.baselines.requests import ItemRecommender, load_item_recommender
    from onerec_hf.baselines.saved import load_ranking, save_ranking
else:
    __getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
