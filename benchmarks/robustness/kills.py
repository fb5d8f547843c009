"""Runs functions in forked processes and kills them (SIGKILL) at a given moment: a fork has the imports already, which take seconds."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_POLL = 0.001  # seconds


class Crashed(RuntimeError):
    """A forked function ended in an error; the message is the end of what it printed."""


def run(work: Callable[..., Any], *args: Any, folder: Path, kill_after: float | None = None) -> tuple[Any, float]:
    """
    Calls `work(started, *args)` in a forked process group.

    Args:
        work: it calls `started()` when that begins which may be killed; what it returns has to be JSON.
        folder: for the process's output and result.
        kill_after: seconds after `started()` at which the process group gets SIGKILL.

    Returns:
        What it returned (None where it was killed), and the seconds from `started()` to its end.

    Raises:
        Crashed: it raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result, log = folder / "result.json", folder / "log.txt"
    result.unlink(missing_ok=True)
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(work, args, result, log, writes)
    os.close(writes)
    began = os.read(reads, 1)  # empty where it ended without starting
    os.close(reads)
    at = time.perf_counter()
    if began and kill_after is not None:
        while time.perf_counter() - at < kill_after:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return _result(result, log), time.perf_counter() - at
            time.sleep(_POLL)
        os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return None, time.perf_counter() - at
    else:
        os.waitpid(pid, 0)
    return _result(result, log), time.perf_counter() - at


def _child(work, args, result: Path, log: Path, writes: int) -> None:
    status = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(file, stream)
        value = work(lambda: os.write(writes, b"."), *args)
        result.write_text(json.dumps(value))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _result(result: Path, log: Path) -> Any:
    if not result.exists():
        raise Crashed(log.read_text(errors="replace")[-3000:])
    return json.loads(result.read_text())
