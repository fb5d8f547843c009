"""Serves a model over HTTP: request validation, dynamic batching, and reloading without downtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onerec_hf._lazy import lazy_exports

_PUBLIC = {
    "Batcher": "batching",
    "QueueFull": "batching",
    "RecommendationService": "service",
    "ServedModel": "models",
    "ServingSettings": "settings",
    "create_app": "app",
    "serve": "server",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from .app import create_app
    from .batching import Batcher, QueueFull
    from .models import ServedModel
    from .server import serve
    from .service import RecommendationService
    from .settings import ServingSettings
else:
    __getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
