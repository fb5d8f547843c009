"""Ranking metrics, also as `evaluate` modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onerec_hf._lazy import lazy_exports

_PUBLIC = {
    "coverage_at_k": "metrics",
    "hit_rate_at_k": "metrics",
    "invalid_id_rate": "metrics",
    "metric_path": "metric_modules",
    "mrr_at_k": "metrics",
    "ndcg_at_k": "metrics",
    "ranking_metrics": "metrics",
    "recall_at_k": "metrics",
    "seen_items": "held_out",
    "SeenItems": "held_out",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from .held_out import SeenItems, seen_items
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
else:
    __getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
