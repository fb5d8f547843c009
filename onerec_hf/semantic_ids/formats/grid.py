"""Semantic IDs in the format of GRID (snap-research/GRID): an integer tensor of shape (levels, items)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from onerec_hf.modeling.catalogue import ItemCatalogue
from onerec_hf.modeling.files import listed, map_npy, read_safetensors, replacing
from onerec_hf.semantic_ids.formats.imported import ImportedIDs

_TENSOR = "semantic_ids"
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin")
_MAX_LEVELS = 26  # more indicate a transposed tensor


def read_grid_tensor(
    source: str | os.PathLike | np.ndarray | torch.Tensor,
    item_ids: Sequence | np.ndarray | None = None,
    *,
    codebook_sizes: Sequence[int] | None = None,
) -> ImportedIDs:
    """
    Reads the semantic IDs of GRID (snap-research/GRID): integers of shape (levels, items), column i for item i.

    GRID's inference step appends a level that separates colliding items, transposes, and saves a pickled .pt file. Pickled files are not
    supported: convert them first.

    Args:
        source: a .npy or .safetensors file (of one tensor), an array or a tensor.
        item_ids: the ids of the columns (default: 0 to N-1).
        codebook_sizes: codes per level (default: the largest code plus one).

    Raises:
        ValueError: pickled, damaged or unsupported file, several tensors, wrong shape, transposed tensor, non-integer or negative codes,
            codes outside their codebook, wrong number of item_ids.

    Example:
        >>> read_grid_tensor(np.array([[3, 1], [0, 2], [0, 1]]), ["a", "b"]).codes.tolist()
        [[3, 0, 0], [1, 2, 1]]
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        tensor, where = source, "the tensor"
    else:
        tensor, where = _load_tensor(os.fspath(source)), os.fspath(source)
    kind = tensor.dtype.kind if isinstance(tensor, np.ndarray) else _kind(tensor)
    if kind not in "iu":
        raise ValueError(
            f"{where} has dtype {tensor.dtype}, but semantic IDs are integers; convert it, e.g. with tensor.long()"
        )
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(
            f"{where}: expected shape (levels, items) with at least one of each, got {tuple(tensor.shape)}; pass a 2-D tensor"
        )
    codes = tensor if isinstance(tensor, np.ndarray) else tensor.detach().cpu().numpy()
    levels, items = codes.shape
    if levels > _MAX_LEVELS:
        raise ValueError(
            f"{where}: shape {(levels, items)} has {levels:,} levels and {items:,} items, but GRID's tensor is (levels, items); "
            "transpose it, e.g. with tensor.T"
        )
    if item_ids is not None and len(item_ids) != items:
        turned = "; transpose the tensor with tensor.T" if len(item_ids) == levels else "; pass one id per column"
        raise ValueError(f"{where}: shape {(levels, items)} (levels, items), but {len(item_ids):,} item_ids{turned}")
    return ImportedIDs(np.arange(items) if item_ids is None else item_ids, codes.T, codebook_sizes, where)


def write_grid_tensor(catalogue: ItemCatalogue, path: str | os.PathLike) -> None:
    """
    Writes the (levels, items) int64 tensor of GRID, column i for item index i, under a temporary name that is then renamed.

    GRID numbers items from 0 in column order, so store `catalogue.item_ids` too. GRID reads pickled files only:
    `torch.save(torch.from_numpy(numpy.load("ids.npy")), "ids.pt")`, and `num_hierarchies` is the number of levels.

    Args:
        path: a .npy or a .safetensors file (one tensor, `semantic_ids`).

    Raises:
        ValueError: unsupported suffix.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_grid_tensor(ItemCatalogue(["a", "b"], [[3, 0], [1, 2]], [4, 3]), Path(folder, "ids.npy"))
        ...     np.load(Path(folder, "ids.npy")).tolist()
        [[3, 1], [0, 2]]
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".npy", ".safetensors"):
        raise ValueError(
            f"{os.fspath(path)}: unsupported suffix {suffix!r}; use .npy or .safetensors. For GRID, convert the .npy to a .pt with "
            'torch.save(torch.from_numpy(numpy.load("ids.npy")), "ids.pt")'
        )
    codes = np.ascontiguousarray(catalogue.codes.T.astype(np.int64))
    with replacing(path) as temporary:
        if suffix == ".npy":
            with open(temporary, "wb") as file:
                np.save(file, codes)
        else:
            save_file({_TENSOR: codes}, temporary)


def _load_tensor(path: str) -> np.ndarray | torch.Tensor:
    suffix = Path(path).suffix.lower()
    if suffix in _PICKLES:
        raise ValueError(
            f"{path} is a pickled file, which onerec_hf does not open because it can run code. If you trust it, convert it with "
            'numpy.save("ids.npy", torch.load(PATH, weights_only=True).numpy()) and pass ids.npy'
        )
    if suffix == ".npy":
        return np.array(map_npy(path))
    if suffix != ".safetensors":
        raise ValueError(f"{path}: unsupported suffix {suffix!r}; pass .npy, .safetensors, an array or a tensor")
    tensors, _ = read_safetensors(path)
    if len(tensors) != 1 and _TENSOR not in tensors:
        raise ValueError(
            f"{path}: expected a single tensor, or one called {_TENSOR!r}; found {listed(sorted(tensors)) or 'none'}"
        )
    return tensors[_TENSOR] if _TENSOR in tensors else next(iter(tensors.values()))


def _kind(tensor: torch.Tensor) -> str:
    """NumPy's dtype kind of a tensor: "i" for integers, else "f"."""
    numbers = tensor.dtype != torch.bool and not tensor.dtype.is_floating_point and not tensor.dtype.is_complex
    return "i" if numbers else "f"
