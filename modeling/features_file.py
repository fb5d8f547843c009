"""`features.safetensors`: the feature schema of a processor and the codes of the catalogue's items, written and read beside the catalogue."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from .features import FeatureSchema, check_codes
from .files import find_file, read_of_catalogue, save_of_catalogue, short

if TYPE_CHECKING:
    from .catalogue import ItemCatalogue

FEATURES_NAME = "features.safetensors"
FORMAT, VERSION = "onerec-features", "1"


def save_features(
    path: str | os.PathLike, schema: FeatureSchema, item_features: np.ndarray, catalogue_hash: str
) -> None:
    """
    Writes a schema and the items' codes: to a temporary name first, then renamed.

    Args:
        item_features: (items, item slots) int32 codes, in the order of item indices.
        catalogue_hash: of the catalogue that has these items.
    """
    # A tensor without any value: safetensors keeps its shape.
    tensors = {"item_features": np.ascontiguousarray(item_features, np.int32)}
    save_of_catalogue(path, tensors, FORMAT, VERSION, catalogue_hash, schema=schema.to_json())


def load_features(path: str | os.PathLike, catalogue: ItemCatalogue) -> tuple[FeatureSchema, np.ndarray]:
    """
    The schema and the (items, item slots) int32 codes of a file that [`save_features`] wrote.

    Raises:
        ValueError: the file is damaged, is of another version, or belongs to another catalogue.
    """
    tensors, metadata = read_of_catalogue(path, "feature schema", FORMAT, VERSION, catalogue.hash)
    try:
        schema = FeatureSchema.from_json(metadata.get("schema", ""))
        codes = tensors["item_features"]
        if codes.dtype != np.int32 or codes.shape != (len(catalogue), schema.item_slots):
            raise ValueError(f"item_features are {codes.dtype} of shape {codes.shape}")
        check_codes(codes, schema.item, "item_features")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged ({short(error)}); copy or download it again") from error
    return schema, codes


def find_features(
    repo: str | os.PathLike, catalogue: ItemCatalogue, **kwargs
) -> tuple[FeatureSchema, np.ndarray] | None:
    """Schema and items' codes of a local folder or Hub repository, or `None` where it holds none. Takes `from_pretrained`'s hub arguments."""
    path = find_file(repo, FEATURES_NAME, **kwargs)
    return None if path is None else load_features(path, catalogue)


__all__ = ["FEATURES_NAME", "find_features", "load_features", "save_features"]
