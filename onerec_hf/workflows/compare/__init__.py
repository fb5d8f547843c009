"""The comparison of model families on one table: equal numbers of trials, winners chosen on validation and evaluated on test once, a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onerec_hf._lazy import lazy_exports

_PUBLIC = {
    "CompareSettings": "settings",
    "Comparison": "comparison",
    "Family": "families",
    "compare_models": "comparison",
    "load_families": "families",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from onerec_hf.workflows.compare.comparison import Comparison, compare_models
    from onerec_hf.workflows.compare.families import Family, load_families
    from onerec_hf.workflows.compare.settings import CompareSettings
else:
    __getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
