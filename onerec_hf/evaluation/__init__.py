"""Metrics over ranked ids, and the same metrics as `evaluate` modules. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .metric_modules import metric_path
    from .metrics import (
        coverage_at_k,
        hit_rate_at_k,
        invalid_id_rate,
        mrr_at_k,
        ndcg_at_k,
        ranking_metrics,
        recall_at_k,
    )

_MODULE_OF = {
    "coverage_at_k": "metrics",
    "hit_rate_at_k": "metrics",
    "invalid_id_rate": "metrics",
    "metric_path": "metric_modules",
    "mrr_at_k": "metrics",
    "ndcg_at_k": "metrics",
    "ranking_metrics": "metrics",
    "recall_at_k": "metrics",
}

__all__ = [
    "coverage_at_k",
    "hit_rate_at_k",
    "invalid_id_rate",
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
