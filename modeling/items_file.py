"""`items.parquet`: titles and other fields of the items, saved beside the catalogue and shown in answers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .files import find_file

if TYPE_CHECKING:
    from .catalogue import ItemCatalogue

logger = logging.get_logger(__name__)

ITEMS_NAME = "items.parquet"


def find_items(repo: str | os.PathLike, **kwargs) -> str | None:
    """
    Path of the `items.parquet` in a local folder or Hub repository; None where it holds none, or the Hub is out of reach.

    Args:
        kwargs: `from_pretrained`'s hub arguments.
    """
    try:
        return find_file(repo, ITEMS_NAME, **kwargs)
    except OSError as error:  # titles are optional: an unreachable Hub does not stop a model that is loaded
        logger.warning_once(
            f"cannot look for {ITEMS_NAME} in {os.fspath(repo)}, answers show no titles: {error!s:.200}"
        )
        return None


def read_items(path: str | os.PathLike | None, catalogue: ItemCatalogue) -> Mapping[Any, Mapping] | None:
    """
    The fields of an `items.parquet` by item id; None for no path. The package onerec_hf reads it: code that was loaded with
    `trust_remote_code=True`, without the package, returns None and logs it.

    Raises:
        ValueError: the file is damaged, or belongs to another catalogue.
    """
    if path is None:
        return None
    # Parquet needs pyarrow, which transformers does not install. The package has it, and its checks of untrusted files.
    if __name__ != "onerec_hf.modeling.items_file":
        logger.warning_once(f"{ITEMS_NAME} is not read: pip install onerec-hf to show titles, or pass items=...")
        return None
    return import_module("onerec_hf.data.item_fields").read_items_file(path, catalogue)


def saved_items(repo: str | os.PathLike, catalogue: ItemCatalogue) -> Mapping[Any, Mapping] | None:
    """The fields of the `items.parquet` in a local folder or Hub repository; see [`find_items`] and [`read_items`]."""
    return read_items(find_items(repo), catalogue)


__all__ = ["ITEMS_NAME", "find_items", "read_items", "saved_items"]
