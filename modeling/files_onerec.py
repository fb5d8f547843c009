"""Files that are there whole or not at all, and those that travel beside a model's weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


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


def sort_header(path: str | os.PathLike) -> None:
    """
    Puts a safetensors file's header in order. The library writes metadata in a random one, so that the same content would be another
    file each time it is saved, and be uploaded again.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        file.seek(8)
        file.write(json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def find_file(repo: str | os.PathLike, name: str, **kwargs) -> str | None:
    """
    Path of a file in a local folder or Hub repository, or `None` where it holds none. Takes `from_pretrained`'s hub arguments.

    Raises:
        OSError: whether it holds one cannot be known: no such repository or revision, no access, no connection.
    """
    from transformers.utils.hub import cached_file  # slow, and those who only write files do without it

    hub = {key: kwargs[key] for key in _HUB_KWARGS if kwargs.get(key) is not None}
    try:
        return cached_file(repo, name, **hub)
    except OSError as error:
        # Asked not to raise, it would keep quiet about a lost connection as well; raised, an absent file is known by its words alone.
        if "does not appear to have a file named" in str(error):
            return None
        raise


def pinned(repo: str | os.PathLike, kwargs: dict) -> dict:
    """`from_pretrained`'s arguments with the commit that the revision stands for now, so that all files come from the same one."""
    from transformers.utils.hub import resolve_revision

    names = ("token", "local_files_only", "cache_dir")
    hub = {key: kwargs[key] for key in names if kwargs.get(key) is not None}
    revision = resolve_revision(repo, kwargs.get("revision"), **hub)
    return kwargs if revision is None else {**kwargs, "revision": revision}


__all__ = ["find_file", "pinned", "replacing", "sort_header"]
