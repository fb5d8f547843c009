"""The lock of an output folder: two runs that write to one would mix their files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

#: Locked by the process that writes to the folder; the lock ends with the process. (Trainer does not upload names that start with an underscore.)
LOCK = "_lock"


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """
    Locks a folder for one run, in this process or another. A folder that was made for the lock and stays empty is removed.

    Raises:
        FileExistsError: another run writes to it.
        OSError: the lock cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent, locked(f"{parent}/run"), locked(f"{parent}/run"):
        ...     pass
        Traceback (most recent call last):
        ...
        FileExistsError: ...run holds a run that has not ended: another process or trainer writes to it. Wait until it ends, or name another folder
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(
            f"{folder} holds a run that has not ended: another process or trainer writes to it. Wait until it ends, or name another folder"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()  # while it is held: a process that has opened it by now starts over
        lock.release()
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
