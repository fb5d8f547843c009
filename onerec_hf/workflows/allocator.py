"""The C library's allocator while a model trains on a CPU."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """
    Keeps freed memory in the process. Each step allocates the same scores of all items again; glibc gives blocks of this size back to the kernel, which
    then clears every page anew: a fifth of the CPU time of a step at 12,000 items. Elsewhere than on Linux with glibc it does nothing.

    Example:
        >>> keep_freed_memory()
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
