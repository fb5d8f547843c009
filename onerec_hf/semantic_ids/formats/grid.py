"""Semantic IDs as GRID (snap-research/GRID) keeps them: an integer tensor of shape (levels, items)."""

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
_MOST_LEVELS = 26  # more can only be the items of a tensor the other way round


def read_grid_tensor(
    source: str | os.PathLike | np.ndarray | torch.Tensor,
    item_ids: Sequence | np.ndarray | None = None,
    *,
    codebook_sizes: Sequence[int] | None = None,
) -> ImportedIDs:
    """
    Reads GRID's (snap-research/GRID) map from items to semantic IDs: integers of shape (levels, items), column i being item i.

    GRID's inference step appends a level to tell colliding items apart, then transposes, and saves a pickled .pt file, which nothing here
    opens: convert it first.

    Args:
        source: a .npy or .safetensors file (of one tensor), an array or a tensor.
        item_ids: the ids of the columns; 0 to N-1 when None.
        codebook_sizes: codes per level; the smallest that hold the codes when None.

    Raises:
        ValueError: a pickled file, a damaged file or one of another kind, several tensors, another shape, a transposed tensor, numbers that
            are no integers, negative codes, codes beyond their codebook, another number of item_ids.

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
            f"{where} holds {tensor.dtype}, not integers; semantic IDs are codes: convert them first, e.g. with tensor.long()"
        )
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(
            f"{where}: expected shape (levels, items) and at least one of each, got {tuple(tensor.shape)}"
        )
    codes = tensor if isinstance(tensor, np.ndarray) else tensor.detach().cpu().numpy()
    levels, items = codes.shape
    if levels > _MOST_LEVELS:
        raise ValueError(
            f"{where}: shape {(levels, items)} would be {levels:,} levels of {items:,} items; GRID's tensor is (levels, items): "
            "transpose yours, e.g. with tensor.T"
        )
    if item_ids is not None and len(item_ids) != items:
        turned = "; it looks transposed: pass tensor.T" if len(item_ids) == levels else "; give one id per column"
        raise ValueError(f"{where}: shape {(levels, items)} (levels, items), but {len(item_ids):,} item_ids{turned}")
    return ImportedIDs(np.arange(items) if item_ids is None else item_ids, codes.T, codebook_sizes, where)


def write_grid_tensor(catalogue: ItemCatalogue, path: str | os.PathLike) -> None:
    """
    Writes the (levels, items) int64 tensor that GRID reads, column i being the catalogue's row i: to a temporary name first, then renamed.

    GRID numbers its items from 0 in the order of the columns, so keep `catalogue.item_ids` beside it. It opens pickled files only:
    `torch.save(torch.from_numpy(numpy.load("ids.npy")), "ids.pt")`, and its `num_hierarchies` is the number of levels.

    Args:
        path: a .npy or a .safetensors file (one tensor, `semantic_ids`).

    Raises:
        ValueError: another suffix.

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
            f"{os.fspath(path)}: unsupported suffix {suffix!r}; write .npy or .safetensors. For GRID itself, turn that into a .pt with "
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
            f"{path} is a pickled file, and onerec_hf opens none: they can run code. Where you trust it, convert it once with "
            'numpy.save("ids.npy", torch.load(PATH, weights_only=True).numpy()) and pass ids.npy'
        )
    if suffix == ".npy":
        return np.array(map_npy(path))
    if suffix != ".safetensors":
        raise ValueError(f"{path}: unsupported suffix {suffix!r}; pass .npy, .safetensors, an array or a tensor")
    tensors, _ = read_safetensors(path)
    if len(tensors) != 1 and _TENSOR not in tensors:
        raise ValueError(
            f"{path}: expected one tensor, or one called {_TENSOR!r}; it holds {listed(sorted(tensors)) or 'none'}"
        )
    return tensors[_TENSOR] if _TENSOR in tensors else next(iter(tensors.values()))


def _kind(tensor: torch.Tensor) -> str:
    """NumPy's letter for a tensor's kind of numbers, as far as it matters here: "i" for integers."""
    numbers = tensor.dtype != torch.bool and not tensor.dtype.is_floating_point and not tensor.dtype.is_complex
    return "i" if numbers else "f"
