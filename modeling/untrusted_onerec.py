"""Files that somebody else wrote: read so that whatever is wrong with one becomes a ValueError that names it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from tokenize import TokenError
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

# What readers of others raise on content that they did not expect, as well as their own errors.
UNEXPECTED = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError)


def short(what: Any, most: int = 200) -> str:
    """
    Text for a message: what comes from a file may be of any length.

    Example:
        >>> short("abcdef", 3)
        'abc...'
    """
    text = str(what)
    return text if len(text) <= most else f"{text[:most]}..."


def listed(names: Iterable) -> str:
    """
    Names for a message: the first twenty, none of them long.

    Example:
        >>> listed(range(30))
        '0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19 and 10 more'
    """
    all_of_them = [short(name, 60) for name in names]
    more = f" and {len(all_of_them) - 20:,} more" if len(all_of_them) > 20 else ""
    return ", ".join(all_of_them[:20]) + more


@contextmanager
def refusing(where: str | os.PathLike, cure: str = "copy or download it again") -> Iterator[None]:
    """
    Errors of a library that reads `where` become one that says so.

    Raises:
        ValueError: in place of those.

    Example:
        >>> with refusing("config.json"):
        ...     [][0]
        Traceback (most recent call last):
        ...
        ValueError: config.json is damaged or not what it should be (IndexError: list index out of range); copy or download it again
    """
    try:
        yield
    except UNEXPECTED as error:
        if os.fspath(where) in str(error) and isinstance(error, ValueError) and len(str(error)) < 1000:
            raise
        reason = short(error) if type(error) is ValueError else f"{type(error).__name__}: {short(error)}"
        raise ValueError(f"{os.fspath(where)} is damaged or not what it should be ({reason}); {cure}") from error


def map_npy(path: str | os.PathLike) -> np.memmap:
    """
    Maps a .npy file, read-only: only its header is read, and nothing unpickled.

    Raises:
        ValueError: no such file format, a header that lies, Python objects.
        OSError: no such file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/a.npy", np.arange(3))
        ...     map_npy(f"{folder}/a.npy").tolist()
        [0, 1, 2]
    """
    try:
        with open(path, "rb") as file:
            start = file.read(12)
            # Of its header's length NumPy believes what the file says, and makes room for it.
            if start[6:7] > b"\1" and int.from_bytes(start[8:12], "little") > os.fstat(file.fileno()).st_size:
                raise ValueError("its header would be longer than the file")
        return np.lib.format.open_memmap(path, mode="r")
    except (*UNEXPECTED, SyntaxError, TokenError) as error:  # its header is Python, and read by Python's own parser
        raise ValueError(
            f"{os.fspath(path)} cannot be read as .npy ({short(error)}); copy or save it again"
        ) from error


def read_safetensors(path: str | os.PathLike, framework: str = "pt") -> tuple[dict[str, Any], dict[str, str]]:
    """
    All tensors of a safetensors file, by name, and its metadata.

    Args:
        framework: "pt" for torch tensors, "np" for arrays.

    Raises:
        ValueError: the file is damaged or cut short.
        OSError: no such file.
    """
    path = os.fspath(path)
    try:
        with safe_open(path, framework=framework) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            return tensors, file.metadata() or {}
    except (SafetensorError, *UNEXPECTED) as error:
        raise ValueError(f"{path} is damaged or cut short ({short(error)}); copy or download it again") from error


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """
    The object that a JSON file holds.

    Raises:
        ValueError: no JSON, or something else than an object.
        OSError: no such file.
    """
    with open(path, "rb") as file, refusing(path):
        content = json.loads(file.read())
        if not isinstance(content, dict):
            raise ValueError(f"it holds JSON of type {type(content).__name__}, expected an object")
    return content


__all__ = ["UNEXPECTED", "listed", "map_npy", "read_json_object", "read_safetensors", "refusing", "short"]
