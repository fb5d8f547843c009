"""A model behind HTTP: requests are checked, batched and answered; models are exchanged while it runs. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .app import create_app
    from .batching import Batcher, QueueFull
    from .models import ServedModel
    from .server import serve
    from .service import RecommendationService
    from .settings import ServingSettings

_MODULE_OF = {
    "Batcher": "batching",
    "QueueFull": "batching",
    "RecommendationService": "service",
    "ServedModel": "models",
    "ServingSettings": "settings",
    "create_app": "app",
    "serve": "server",
}

__all__ = [
    "Batcher",
    "QueueFull",
    "RecommendationService",
    "ServedModel",
    "ServingSettings",
    "create_app",
    "serve",
]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
