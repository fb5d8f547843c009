"""`features.safetensors`: the feature schema of a processor and the codes of the catalogue's items, written and read beside the catalogue."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

from .features import FeatureSchema, check_codes
from .files import find_file, read_safetensors, replacing, short, sort_header

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
    metadata = {"format": FORMAT, "version": VERSION, "schema": schema.to_json(), "catalogue_hash": catalogue_hash}
    # A tensor without any value: safetensors keeps its shape.
    tensors = {"item_features": np.ascontiguousarray(item_features, np.int32)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
        sort_header(temporary)


def load_features(path: str | os.PathLike, catalogue: ItemCatalogue) -> tuple[FeatureSchema, np.ndarray]:
    """
    The schema and the (items, item slots) int32 codes of a file that [`save_features`] wrote.

    Raises:
        ValueError: the file is damaged, is of another version, or belongs to another catalogue.
    """
    tensors, metadata = read_safetensors(path, framework="np")
    name = os.fspath(path)
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise ValueError(
            f"{name} is no feature schema of version {VERSION} (format {metadata.get('format')!s:.40}, version {metadata.get('version')!s:.40}); "
            "upgrade onerec-hf, or copy the file again"
        )
    if metadata.get("catalogue_hash") != catalogue.hash:
        raise ValueError(
            f"{name} was saved with the catalogue {short(metadata.get('catalogue_hash'), 12)}, the catalogue beside it is {catalogue.hash[:12]}...; "
            "call processor.set_catalogue() with the new one and save the processor too"
        )
    try:
        schema = FeatureSchema.from_json(metadata.get("schema", ""))
        codes = tensors["item_features"]
        if codes.dtype != np.int32 or codes.shape != (len(catalogue), schema.item_slots):
            raise ValueError(f"item_features are {codes.dtype} of shape {codes.shape}")
        check_codes(codes, schema.item, "item_features")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name} is damaged ({short(error)}); copy or download it again") from error
    return schema, codes


def find_features(
    repo: str | os.PathLike, catalogue: ItemCatalogue, **kwargs
) -> tuple[FeatureSchema, np.ndarray] | None:
    """Schema and items' codes of a local folder or Hub repository, or `None` where it holds none. Takes `from_pretrained`'s hub arguments."""
    path = find_file(repo, FEATURES_NAME, **kwargs)
    return None if path is None else load_features(path, catalogue)


__all__ = ["FEATURES_NAME", "find_features", "load_features", "save_features"]
