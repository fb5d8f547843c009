"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """
    Gives a temporary name beside `path` to write to, which takes the place of `path` when the block ends. Where the block fails, what
    stood at `path` stays, and nothing is left beside it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(f"{folder}/notes.txt") as temporary, open(temporary, "w") as file:
        ...         _ = file.write("whole")
        ...     os.listdir(folder)
        ['notes.txt']
    """
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


__all__ = ["replacing"]
