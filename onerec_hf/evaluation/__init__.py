"""Metrics over ranked ids, baselines, and the same metrics as `evaluate` modules. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .baselines import ItemKNNBaseline, PopularityBaseline
    from .metric_modules import metric_path
    from .metrics import (
        coverage_at_k,
        hit_rate_at_k,
        illegal_share,
        mrr_at_k,
        ndcg_at_k,
        ranking_metrics,
        recall_at_k,
    )

_MODULE_OF = {
    "ItemKNNBaseline": "baselines",
    "PopularityBaseline": "baselines",
    "coverage_at_k": "metrics",
    "hit_rate_at_k": "metrics",
    "illegal_share": "metrics",
    "metric_path": "metric_modules",
    "mrr_at_k": "metrics",
    "ndcg_at_k": "metrics",
    "ranking_metrics": "metrics",
    "recall_at_k": "metrics",
}

__all__ = [
    "ItemKNNBaseline",
    "PopularityBaseline",
    "coverage_at_k",
    "hit_rate_at_k",
    "illegal_share",
    "metric_path",
    "mrr_at_k",
    "ndcg_at_k",
    "ranking_metrics",
    "recall_at_k",
]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
