"""Lookups of the catalogue: ids as sortable arrays, orders, and a binary search over rows of codes. No loop over items."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

# Padding to the longest id may take this many bytes, or this many times what the ids hold.
_PADDED_BYTES, _PADDED_TIMES = 1 << 30, 64


def encode_ids(item_ids, longest: int | None = None) -> tuple[np.ndarray, str]:
    """
    Ids as a sortable array, and their type: int64 ("int"), or fixed-width UTF-8 bytes ("str"; a tenth of the memory of Python strings).

    Args:
        longest: for a lookup, the length in bytes of the longest id that can be found: longer ones are cut, and stay longer than it.

    Raises:
        TypeError: neither all integers nor all strings.
        ValueError: an integer beyond 64 bits, a string that ends in a NUL character (the array pads with it), or one so long that padding the
            others to it would take gigabytes.

    Example:
        >>> encode_ids(["é", "b"])
        (array([b'\\xc3\\xa9', b'b'], dtype='|S2'), 'str')
    """
    item_ids = item_ids.cpu().numpy() if isinstance(item_ids, torch.Tensor) else item_ids
    if isinstance(item_ids, np.ndarray) and item_ids.dtype.kind in "iu" and item_ids.ndim == 1:
        if item_ids.dtype == np.uint64 and len(item_ids) and item_ids.max() > np.iinfo(np.int64).max:
            raise ValueError(f"integer item ids must fit in 64 bits with a sign; got {item_ids.max()}")
        return item_ids.astype(np.int64), "int"
    item_ids = item_ids.tolist() if isinstance(item_ids, np.ndarray) else list(item_ids)
    kinds = set(map(type, item_ids))
    if all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
        try:
            return np.asarray(item_ids, dtype=np.int64), "int"
        except OverflowError:
            raise ValueError(
                f"integer item ids must fit in 64 bits with a sign; got {max(item_ids, key=abs)}"
            ) from None
    if not all(issubclass(kind, str) for kind in kinds):
        names = sorted(kind.__name__ for kind in kinds)
        raise TypeError(f"item ids must be all integers or all strings; got {', '.join(names)}")
    # A seventh of the time of np.char.encode, which calls back into Python per element.
    encoded = list(map(str.encode, item_ids))
    lengths = list(map(len, encoded))
    most, total = max(lengths, default=0), sum(lengths)
    if longest is not None and most > longest:
        encoded = [key if len(key) <= longest else _cut(key, longest) for key in encoded]
        total = sum(map(len, encoded))
    elif longest is None and most * len(encoded) > max(_PADDED_BYTES, _PADDED_TIMES * total):
        place = lengths.index(most)
        raise ValueError(
            f"item id {place} has {most:,} bytes ({item_ids[place][:20]!r}...), far more than the other {len(encoded) - 1:,}; shorten it or "
            "leave the item out"
        )
    keys = np.asarray(encoded, dtype=np.bytes_)
    if total != np.char.str_len(keys).sum():
        raise ValueError("item ids must not end in a NUL character")
    return keys, "str"


def _cut(key: bytes, longest: int) -> bytes:
    # Whole characters, at most three bytes less, and then four: longer than any id that it is compared with.
    return key[:longest].decode(errors="ignore").encode() + b"...."


def longest_id(keys: np.ndarray) -> int:
    """The `longest` of a lookup in these keys: at least 64 bytes, so that messages have unknown ids whole."""
    return max(keys.dtype.itemsize, 64)


def decode_ids(keys: np.ndarray) -> list:
    """Item ids as Python integers or strings, from the result of [`encode_ids`]."""
    return keys.tolist() if keys.dtype.kind == "i" else list(map(bytes.decode, keys.tolist()))


def sorted_orders(keys: np.ndarray, codes: np.ndarray, codebook_sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """
    The rows in the order of their ids and in the lexicographic order of their codes, two (N,) int64.

    Raises:
        ValueError: ids or code tuples that repeat.
    """
    id_order = _argsort(keys)
    ordered = keys.take(id_order)
    if (repeated := ordered[1:] == ordered[:-1]).any():
        first = decode_ids(ordered[1:][repeated][:1])[0]
        raise ValueError(f"{int(repeated.sum())} item ids repeat, e.g. {first!r}; give every item one row")
    if prod(codebook_sizes) < 2**63:  # one number per tuple sorts ten times as fast as the columns
        packed = np.zeros(len(codes), dtype=np.int64)
        for level, size in enumerate(codebook_sizes):
            packed = packed * size + codes[:, level]
        code_order = _argsort(packed)
    else:
        code_order = np.lexsort(codes.T[::-1])
    ordered = codes.take(code_order, axis=0)
    if (repeated := (ordered[1:] == ordered[:-1]).all(1)).any():
        pair = np.stack([code_order[:-1], code_order[1:]], axis=1)[repeated][0]
        first, second = decode_ids(keys[np.sort(pair)])
        raise ValueError(
            f"{int(repeated.sum())} items share a semantic ID with another, e.g. {first!r} and {second!r}; "
            "resolve collisions first (onerec_hf.semantic_ids.make_unique)"
        )
    return id_order, code_order


def _argsort(values: np.ndarray) -> np.ndarray:
    # Half the time of numpy's for integers; what repeats is refused, so a stable order is not needed.
    return torch.argsort(torch.from_numpy(values)).numpy() if values.dtype.kind == "i" else np.argsort(values)


def find_keys(keys: np.ndarray, order: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """
    Positions of `wanted` in `keys`, (n,) int64; -1 where absent.

    Args:
        keys: (N,) distinct ids as [`encode_ids`] makes them.
        order: (N,) the positions in the order of their keys.
        wanted: (n,) ids of the same type.
    """
    fitted = wanted.astype(keys.dtype)  # a longer string is cut here; the comparison below finds it
    # Wanted in order, neighbours are read one after the other: with 10 million keys a fifth of the time.
    by_value = np.argsort(fitted)
    position = np.empty(len(wanted), dtype=np.int64)
    position[by_value] = np.searchsorted(keys, fitted[by_value], sorter=order)
    found = order.take(position, mode="clip")
    return np.where(keys.take(found) == wanted, found, -1)


def lower_bound(codes: np.ndarray, order: np.ndarray, wanted: np.ndarray, after: bool = False) -> np.ndarray:
    """
    Positions of prefixes among sorted code tuples, (n,) int64: the number of tuples before them. One binary search for all prefixes, over the
    catalogue's arrays as they are in the file: no index is built, and the code space may have any size.

    Args:
        codes: (N, L) code tuples.
        order: (N,) their rows in lexicographic order.
        wanted: (n, l) prefixes, 0 <= l <= L.
        after: count the tuples that begin with the prefix too.

    Example:
        >>> codes, order = np.array([[1, 0], [0, 2], [1, 3]]), np.array([1, 0, 2])
        >>> prefixes = np.array([[1], [0]])
        >>> lower_bound(codes, order, prefixes).tolist(), lower_bound(codes, order, prefixes, after=True).tolist()
        ([1, 0], [3, 1])
    """
    low = np.zeros(len(wanted), dtype=np.int64)
    high = np.full(len(wanted), len(order))
    for _ in range(len(order).bit_length()):
        middle = (low + high) >> 1
        found = codes.take(order.take(middle, mode="clip"), axis=0)
        below = np.full(len(wanted), after)
        for level in reversed(range(wanted.shape[1])):
            below = (found[:, level] < wanted[:, level]) | ((found[:, level] == wanted[:, level]) & below)
        searching = low < high
        low, high = np.where(searching & below, middle + 1, low), np.where(searching & ~below, middle, high)
    return low


def check_codes(codes, count: int, sizes: Sequence[int]) -> np.ndarray:
    """Codes as (count, levels) int32; refuses another shape and codes outside their codebook."""
    codes = np.asarray(codes)
    if codes.shape != (count, len(sizes)):
        raise ValueError(f"codes: expected shape {(count, len(sizes))} (items x levels), got {codes.shape}")
    if codes.size and codes.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers; got {codes.dtype}")
    for level, size in enumerate(sizes if count else ()):
        low, high = int(codes[:, level].min()), int(codes[:, level].max())
        if low < 0 or high >= size:
            raise ValueError(f"codes of level {level} run from {low} to {high}; its codebook has {size} codes")
    return codes.astype(np.int32)


def check_popularity(popularity, count: int) -> np.ndarray | None:
    popularity = None if popularity is None else np.array(popularity, dtype=np.int64)
    if popularity is not None and popularity.shape != (count,):
        raise ValueError(f"popularity: expected shape {(count,)}, got {popularity.shape}")
    return popularity


def plain_lists(lists):
    """
    Lists of item ids, also where they are tensors or arrays, all at once or one by one.

    Example:
        >>> plain_lists([torch.tensor([7, 8]), [9]])
        [[7, 8], [9]]
    """
    if isinstance(lists, torch.Tensor | np.ndarray):
        return lists.tolist()
    if any(isinstance(each, torch.Tensor | np.ndarray) for each in lists):
        return [each.tolist() if isinstance(each, torch.Tensor | np.ndarray) else each for each in lists]
    if any(isinstance(each, list) and isinstance(next(iter(each), None), torch.Tensor) for each in lists):
        return [[item.item() if isinstance(item, torch.Tensor) else item for item in each] for each in lists]
    return lists


__all__ = [
    "check_codes",
    "check_popularity",
    "decode_ids",
    "encode_ids",
    "find_keys",
    "longest_id",
    "lower_bound",
    "plain_lists",
    "sorted_orders",
]
