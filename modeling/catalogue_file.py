"""`catalogue.safetensors`: written through safetensors, read by memory map, so that ten million items load in milliseconds."""

from __future__ import annotations

import json
import mmap
import os
from math import prod
from typing import Any, NoReturn

import numpy as np
from safetensors.numpy import save_file

from .files import replacing, sort_header

FORMAT = "onerec-catalogue"
VERSION = "2"
_MAX_HEADER = 100_000_000  # safetensors' own limit, in bytes
_DTYPES = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "U8": np.dtype("u1"), "BOOL": np.dtype("?")}


def write_catalogue_file(path: str | os.PathLike, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """
    Writes a catalogue file: to a temporary name first, then renamed. Where `path` is mapped, by this process or another, the mapping
    keeps reading the former file.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if (keys := arrays["item_ids"]).dtype.kind == "S":  # safetensors has no bytes
        arrays["item_ids"] = keys.view(np.uint8).reshape(len(keys), -1)
    with replacing(path) as temporary:
        save_file(arrays, temporary, metadata={"format": FORMAT, "version": VERSION, **metadata})
        sort_header(temporary)


def read_catalogue_file(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """
    Maps a catalogue file. Only its header is read and checked: the arrays are read-only views, whose pages the system reads when they
    are used and shares among processes.

    Returns:
        The arrays (`popularity` may be absent) and the metadata.

    Raises:
        ValueError: the file is cut short or damaged, is no catalogue, or is of another version.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > min(size - 8, _MAX_HEADER):
            _refuse(path, f"{size} bytes cannot hold its header")
        try:
            header = json.loads(file.read(header_size))
        except (ValueError, RecursionError):
            _refuse(path, "its header is no JSON")
        if not isinstance(header, dict):
            _refuse(path, "its header holds no tensors")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            found = metadata.get("format") if isinstance(metadata, dict) else metadata
            raise ValueError(f"{path} is no item catalogue (format {found!r:.80})")
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"{path} is of catalogue version {metadata.get('version')!s:.80}, this onerec_hf reads version {VERSION}; "
                "use the onerec_hf that wrote it, or update"
            )
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    return _views(path, header, metadata, mapped, start=8 + header_size), metadata


def _views(path: str, header: dict[str, Any], metadata: dict[str, Any], mapped: mmap.mmap, start: int):
    """The arrays of the file; refuses a header that does not describe a catalogue of exactly the file's length."""
    sizes = str(metadata.get("codebook_sizes")).split(",")
    id_type = metadata.get("id_type")
    texts = ("hash", "lineage", "embedding_fingerprint")
    if (
        not all(size.isdecimal() and len(size) < 11 and int(size) > 0 for size in sizes)
        or id_type not in ("int", "str")
        or not all(isinstance(metadata.get(name), str) for name in texts)
    ):
        _refuse(path, "its metadata is incomplete")
    wanted = {
        "item_ids": ("I64", 1) if id_type == "int" else ("U8", 2),
        "codes": ("I32", 2),
        "id_order": ("I64", 1),
        "code_order": ("I64", 1),
        "active": ("BOOL", 1),
        "popularity": ("I64", 1),
    }
    if set(header) - {"popularity"} != set(wanted) - {"popularity"}:
        _refuse(path, f"it holds the tensors {sorted(map(str, header))}")
    arrays, spans, length = {}, [], None
    for name, entry in header.items():
        dtype, ndim = wanted[name]
        if not isinstance(entry, dict) or entry.get("dtype") != dtype:
            _refuse(path, f"tensor {name!r} is described as {entry}")
        shape, offsets = _sizes(path, entry.get("shape"), ndim), _sizes(path, entry.get("data_offsets"), 2)
        length = shape[0] if length is None else length
        begin, itemsize = start + offsets[0], _DTYPES[dtype].itemsize
        if (
            shape[0] != length
            or min(shape) == 0
            or (name == "codes" and shape[1] != len(sizes))
            or offsets[1] - offsets[0] != prod(shape) * itemsize
            or start + offsets[1] > len(mapped)
            or begin % itemsize
        ):
            _refuse(path, f"tensor {name!r}, {shape} at bytes {offsets}, does not fit in {len(mapped)} bytes")
        view = np.frombuffer(mapped, _DTYPES[dtype], prod(shape), begin).reshape(shape)
        arrays[name] = view.reshape(-1).view(f"S{shape[1]}") if name == "item_ids" and ndim == 2 else view
        spans.append(offsets)
    spans.sort()
    ends = [end for _, end in spans]
    if [begin for begin, _ in spans] != [0, *ends[:-1]] or start + ends[-1] != len(mapped):
        _refuse(path, f"its tensors at bytes {spans} do not fill its {len(mapped) - start} bytes")
    if arrays["active"].view(np.uint8).max() > 1:
        _refuse(path, "tensor 'active' holds other values than true and false")
    return arrays


def _sizes(path: str, values: Any, count: int) -> list[int]:
    if not (isinstance(values, list) and len(values) == count and all(type(v) is int and v >= 0 for v in values)):
        _refuse(path, f"{count} sizes are described as {values}")
    return values


def _refuse(path: str, reason: str) -> NoReturn:
    raise ValueError(f"{path} is damaged or cut short ({reason[:200]}); copy or download it again")


__all__ = ["FORMAT", "VERSION", "read_catalogue_file", "write_catalogue_file"]
