"""Folders that appear only when they are complete: new ones, and those of runs that go on where an earlier one ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from onerec_hf.data.columns import DataError


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`. It replaces `folder` if the block succeeds and is removed otherwise."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def kept_folder(folder: Path, fingerprint: str) -> Iterator[Path]:
    """
    As `new_folder`, with a name that the fingerprint gives. It stays where the block ends early, for the next run with the same fingerprint, unless
    the data are at fault.

    Raises:
        RuntimeError: another run is at work in it.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}-{fingerprint}"
    path = temporary.with_name(f"{temporary.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(f"{folder}: another run prepares it from the same log; wait for it, or end it") from None
    try:
        temporary.mkdir(exist_ok=True)
        yield temporary
        _put_in_place(temporary, folder)
    except DataError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if temporary.is_dir() and not any(temporary.iterdir()):
            temporary.rmdir()
        lock.release()
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """
    A temporary name for a file, which gets its own when the block succeeds.

    Args:
        folder: of the temporary name, on the same file system; a process that is killed leaves it there. By default that of the file.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with new_file(Path(folder, "counts.json")) as file:
        ...         _ = file.write_text("{}")
        ...     os.listdir(folder)
        ['counts.json']
    """
    # A task that is run again may overlap with its first run on a machine that was cut off.
    temporary = (folder or path.parent) / f".{path.name}-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _put_in_place(temporary: Path, folder: Path) -> None:
    temporary.chmod(0o777 & ~_umask())
    earlier = temporary.with_name(f"{temporary.name}-earlier")
    if folder.exists():
        shutil.rmtree(earlier, ignore_errors=True)  # of a run that was killed while it removed it
        folder.rename(earlier)
    temporary.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
