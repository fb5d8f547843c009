"""Files: written completely or not at all, found next to a model's weights, and read from untrusted sources with errors that name them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from tokenize import TokenError
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

# What library readers raise on unexpected content, in addition to their own errors.
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
    Turns errors of a library that reads `where` into one that names it.

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
        ValueError: no such file format, a false header, Python objects.
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
            # NumPy trusts the header length in the file and allocates it.
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


def save_of_catalogue(
    path: str | os.PathLike, tensors: dict[str, Any], kind: str, version: str, catalogue_hash: str, **metadata: str
) -> None:
    """
    Writes arrays that belong to the items of a catalogue as safetensors: to a temporary name first, then renamed.

    Args:
        kind, version: of the file's format.
        metadata: more of it.
    """
    about = {"format": kind, "version": version, "catalogue_hash": catalogue_hash, **metadata}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=about)
        sort_header(temporary)


def read_of_catalogue(
    path: str | os.PathLike, what: str, kind: str, version: str, catalogue_hash: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """
    The arrays and the metadata of a file that [`save_of_catalogue`] wrote.

    Args:
        what: of messages, what the file should be.

    Raises:
        ValueError: the file is damaged, is of another format or version, or belongs to another catalogue.
    """
    tensors, metadata = read_safetensors(path, framework="np")
    name, found = os.fspath(path), [metadata.get(each) for each in ("format", "version", "catalogue_hash")]
    if found[:2] != [kind, version]:
        raise ValueError(
            f"{name} is no {what} of version {version} (format {found[0]!s:.40}, version {found[1]!s:.40}); upgrade onerec-hf, or copy the file again"
        )
    if found[2] != catalogue_hash:
        raise ValueError(
            f"{name} was saved with the catalogue {short(found[2], 12)}, the catalogue beside it is {catalogue_hash[:12]}...; "
            "call processor.set_catalogue() with the new one and save the processor too"
        )
    return tensors, metadata


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


#: Subfolder for files until all of them are written.
UNFINISHED_NAME = ".unfinished"
_CURES = {
    errno.ENOSPC: "make room there, or name a folder on another disk",
    errno.EDQUOT: "your quota is used up: make room, or name a folder elsewhere",
    errno.EFBIG: "the file would be larger than this process may write (ulimit -f)",
    errno.EROFS: "it is mounted read-only: name a folder that can be written to",
    errno.EACCES: "name a folder that you may write to",
    errno.EPERM: "name a folder that you may write to",
    errno.EIO: "the disk fails: name a folder on another one",
}
_READING_TOO = (errno.EACCES, errno.EPERM, errno.EIO)
# Parts of torch.save's errors on a full disk.
_TORCH_SAVE_FAILED = ("inline_container.cc", "iostream error", "PytorchStreamWriter")
_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """
    Yields a temporary name in the folder of `path` to write to, and renames it to `path` when the block ends. If the block fails, `path` stays as it was
    and no temporary file is left.

    Raises:
        OSError: the disk is full, read-only or fails; the message says what could not be written, where, and what to do.

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
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield temporary
        os.chmod(temporary, mode)  # safetensors writes for the owner alone, whatever the umask
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        reported = cannot_write(path, error)
        if reported is None:
            raise
        raise reported from error
    finally:
        with suppress(OSError):  # nothing there, or nothing can be written at all
            os.unlink(temporary)


@contextmanager
def replacing_files(folder: str | os.PathLike, last: str, replaces: tuple[str, ...] = ()) -> Iterator[str]:
    """
    Yields a temporary folder to write files to, and moves them into `folder` when the block ends. A former `last` is removed first and the new one
    moved last: a folder that holds `last` holds all files of one save, even after a kill or on a full disk.

    Args:
        folder: made where there is none, with the parents that it lacks.
        last: the file that marks the others as complete.
        replaces: patterns of files to remove, unless the block writes them.

    Raises:
        OSError: as `replacing`; `folder` stays as it was.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing_files(folder, last="index") as temporary:
        ...         for name in ("index", "volume"):
        ...             _ = Path(temporary, name).write_text("whole")
        ...     sorted(os.listdir(folder))
        ['index', 'volume']
    """
    folder = os.fspath(folder)
    temporary, new = os.path.join(folder, UNFINISHED_NAME), not os.path.exists(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        os.makedirs(temporary)
        yield temporary
        give_usual_modes(temporary)
        names = sorted(_files_in(temporary), key=lambda name: name == last)
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, last))
        for name in os.listdir(folder):
            if name not in names and any(fnmatch(name, pattern) for pattern in replaces):
                os.unlink(os.path.join(folder, name))
        for name in names:
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            os.replace(os.path.join(temporary, name), os.path.join(folder, name))
    except (OSError, SafetensorError, RuntimeError) as error:
        reported = cannot_write(folder, error)
        if reported is None:
            raise
        raise reported from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if new:
            with suppress(OSError):  # something was written to it
                os.rmdir(folder)


def give_usual_modes(folder: str | os.PathLike) -> None:
    """
    Gives the files of a new folder the modes that the umask asks for, which are those of the folder: safetensors writes files that only their
    owner can read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     os.makedirs(f"{parent}/new")
        ...     give_usual_modes(f"{parent}/new")
    """
    mode = os.stat(folder).st_mode & 0o666
    for name in _files_in(os.fspath(folder)):
        os.chmod(os.path.join(folder, name), mode)


def _files_in(folder: str) -> Iterator[str]:
    """Paths of the files in a folder and in its folders, relative to it."""
    for parent, _, names in os.walk(folder):
        yield from (os.path.relpath(os.path.join(parent, name), folder) for name in names)


def remove_whole(folder: str | os.PathLike) -> None:
    """Renames a folder, then removes it: a kill in between leaves no half-removed folder under its name."""
    parent, name = os.path.split(os.path.normpath(os.fspath(folder)))
    doomed = os.path.join(parent, f"_removed-{name}")
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def cannot_write(path: str | os.PathLike, error: Exception) -> OSError | None:
    """
    An error that names the file, the reason and the fix; None if `error` is not about writing.

    Example:
        >>> print(cannot_write("out/results.json", OSError(errno.ENOSPC, "No space left on device")))
        cannot write out/results.json: No space left on device; make room there, or name a folder on another disk
    """
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError):  # it has the number only as text
        code = next((code for code in _CURES if f"(os error {code})" in str(error)), None)
    elif isinstance(error, RuntimeError) and any(sign in str(error) for sign in _TORCH_SAVE_FAILED):
        code = errno.ENOSPC
    if code not in _CURES:
        return None
    if code in _READING_TOO and isinstance(error, OSError) and error.filename is not None:
        place = os.path.abspath(os.fspath(path))
        named = [name for name in (error.filename, error.filename2) if name is not None]
        if not any(os.path.abspath(os.fspath(name)).startswith(place) for name in named):
            return None  # another file, which was to be read
    reported = OSError(f"cannot write {os.fspath(path)}: {os.strerror(code)}; {_CURES[code]}")
    reported.errno = code
    return reported


def sort_header(path: str | os.PathLike) -> None:
    """
    Sorts a safetensors file's header. The library writes metadata in random order, so that equal content would be a different
    file after each save, and be uploaded again.
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
    from transformers.utils.hub import cached_file  # slow, and not needed to write files

    hub = {key: kwargs[key] for key in _HUB_KWARGS if kwargs.get(key) is not None}
    try:
        return cached_file(repo, name, **hub)
    except OSError as error:
        # Without exceptions it would also hide a lost connection; with them, only the message identifies an absent file.
        if "does not appear to have a file named" in str(error):
            return None
        raise


def pinned(repo: str | os.PathLike, kwargs: dict) -> dict:
    """`from_pretrained`'s arguments with the revision resolved to a commit, so that all files come from the same one."""
    from transformers.utils.hub import resolve_revision

    names = ("token", "local_files_only", "cache_dir")
    hub = {key: kwargs[key] for key in names if kwargs.get(key) is not None}
    revision = resolve_revision(repo, kwargs.get("revision"), **hub)
    return kwargs if revision is None else {**kwargs, "revision": revision}


__all__ = [
    "UNEXPECTED",
    "UNFINISHED_NAME",
    "cannot_write",
    "find_file",
    "give_usual_modes",
    "listed",
    "map_npy",
    "pinned",
    "read_json_object",
    "read_safetensors",
    "refusing",
    "remove_whole",
    "replacing",
    "replacing_files",
    "short",
    "sort_header",
]
