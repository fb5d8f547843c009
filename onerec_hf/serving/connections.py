"""Connections: as many as the process has file descriptors for, those that send nothing closed, and a log that they cannot fill."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

# File descriptors for what is no connection: a reload's files, mostly.
_RESERVED = 24
_MOST, _BACKLOG = 4096, 128


def capacity() -> tuple[int, int]:
    """
    How many connections may be open, and how many may wait to be accepted, within the process's file descriptors: asyncio accepts as many as
    wait at once.

    Example:
        >>> connections, waiting = capacity()
        >>> 0 < waiting <= 128 and waiting <= connections
        True
    """
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        used = len(os.listdir("/proc/self/fd"))
    except (ImportError, OSError):  # not on this system
        return _MOST, _BACKLOG
    free = _MOST * 2 if limit == resource.RLIM_INFINITY else limit - used - _RESERVED
    backlog = max(1, min(_BACKLOG, free // 4))
    return max(backlog, min(_MOST, free - backlog)), backlog


def protocol(max_connections: int, seconds: float) -> type[H11Protocol]:
    """
    uvicorn's HTTP protocol with limits that it lacks.

    Args:
        max_connections: with more, the one that has sent no request for the longest time is closed.
        seconds: for a request's head to arrive, and for a client to read an answer.
    """

    class Limited(H11Protocol):
        _late: asyncio.TimerHandle | None = None
        _idle_since = 0.0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._idle_since = time.monotonic()
            self._watch()
            if len(self.connections) > max_connections:
                idle: list[Limited] = [
                    each for each in self.connections if isinstance(each, Limited) and each._is_idle()
                ]
                oldest = min(idle, key=lambda each: each._idle_since)  # the new one, if no other
                logger.warning("%d connections are open, the most here: closing the idle one", max_connections)
                self.connections.discard(oldest)  # several may come before it is gone
                oldest.transport.abort()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._idle_since = time.monotonic()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _is_idle(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _watch(self) -> None:
            """Counts the time while a request's head is awaited, or an answer is read."""
            if not self._is_idle():
                self._unwatch()
            elif self._late is None:
                self._late = self.loop.call_later(seconds, self._close_late)

        def _unwatch(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _close_late(self) -> None:
            self._late = None
            if self._is_idle():
                self.transport.abort()

    return Limited


class Seldom(logging.Filter):
    """
    Lets a message pass once in `seconds`; the next one says how many like it were left out, without a traceback. Messages are alike if their
    first lines are.

    Args:
        only: the beginning of the messages that this is for.

    Example:
        >>> record = logging.LogRecord("asyncio", logging.ERROR, "", 0, "no descriptors", None, None)
        >>> seldom = Seldom()
        >>> [seldom.filter(record) for _ in range(3)]
        [True, False, False]
    """

    def __init__(self, seconds: float = 10.0, only: str = ""):
        super().__init__()
        self.seconds, self.only = seconds, only
        self._seen: dict[str, list[float]] = {}  # when it passed, and how many since

    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg).split("\n")[0]
        if not text.startswith(self.only):
            return True
        if len(self._seen) > 1000:
            self._seen.clear()
        now = time.monotonic()
        passed, left_out = self._seen.get(text, [-self.seconds, 0.0])
        if now - passed < self.seconds:
            self._seen[text] = [passed, left_out + 1]
            return False
        self._seen[text] = [now, 0]
        if left_out:
            record.msg = f"{text} ({left_out:.0f} more like it before)"
            record.exc_info = record.exc_text = None
        return True
