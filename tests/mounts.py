"""Disks of the tests' own: a small one that fills up, and one that is mounted read-only (a root process ignores permissions)."""

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str):
    """A file system of `size` (as mount writes it, "1m") at `folder`; the test is skipped where this process may not mount."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def set_read_only(folder: Path, read_only: bool = True) -> None:
    """Of a `small_disk`."""
    subprocess.run(["mount", "-o", f"remount,{'ro' if read_only else 'rw'}", folder], check=True)


def fill(folder: Path, leave: int) -> None:
    """Fills a disk but for `leave` bytes."""
    free = os.statvfs(folder)
    size = free.f_bavail * free.f_frsize - leave
    (folder / "filling").write_bytes(b"\0" * max(0, size))
