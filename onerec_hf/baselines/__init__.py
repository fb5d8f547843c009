"""Baselines: popularity, item-kNN, and the sequence models SASRec, HSTU and GRU4Rec. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_sequential import SequentialConfig
    from .item_index import ItemIndex
    from .memory import ItemKNNBaseline, PopularityBaseline
    from .modeling_sequential import SequentialRecommender
    from .next_items import NextItemCollator, NextItemDataset

_MODULE_OF = {
    "ItemIndex": "item_index",
    "ItemKNNBaseline": "memory",
    "NextItemCollator": "next_items",
    "NextItemDataset": "next_items",
    "PopularityBaseline": "memory",
    "SequentialConfig": "configuration_sequential",
    "SequentialRecommender": "modeling_sequential",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
