"""Paths of the `evaluate` modules, which are loaded from disk without the Hub."""

from __future__ import annotations

from pathlib import Path

_MODULES = Path(__file__).parent / "modules"


def metric_path(name: str) -> str:
    """
    The folder of an `evaluate` module of this package, for `evaluate.load(metric_path("recall_at_k"))`.

    Args:
        name: `"recall_at_k"`, `"ndcg_at_k"`, `"mrr_at_k"` or `"coverage_at_k"`.

    Returns:
        An absolute path; loading it needs no network (works with `HF_HUB_OFFLINE=1`).

    Raises:
        ValueError: unknown name.

    Example:
        >>> metric_path("recall_at_k").endswith("recall_at_k")
        True
    """
    names = sorted(folder.parent.name for folder in _MODULES.glob("*/*_at_k.py"))
    if name not in names:
        raise ValueError(f"no evaluate module {name!r}; choose one of {', '.join(names)}")
    return str(_MODULES / name)
