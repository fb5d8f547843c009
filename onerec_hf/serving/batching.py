"""
Dynamic batching: entries of concurrent requests wait in a bounded queue and are computed in batches of equal keys.

This module is independent of the computation. The queue belongs to an event loop; the computation runs in a separate thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any


class QueueFull(Exception):
    """The queue has no room for the entries; retry after `retry_after` seconds."""

    def __init__(self, retry_after: float):
        super().__init__(f"the queue is full; try again in {retry_after:.1f} s")
        self.retry_after = retry_after


class Aborted(Exception):
    """The entry was discarded before it was computed."""


@dataclass
class _Entry:
    item: Any
    future: asyncio.Future
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """
    Computes submitted entries in batches.

    Entries with equal keys may share a batch. The key whose first entry has waited longest is next: its batch starts when it is full or when
    that entry is `max_wait` seconds old. Further entries queue up during a computation. If a batch fails, its entries are computed one by
    one, so that only the faulty one fails. Entries with cancelled futures are not computed.

    Args:
        compute: takes a key and a list of items, returns a result per item; called in a separate thread, one call at a time.
        max_batch_size: maximum number of entries per batch.
        max_wait: seconds that the first entry of a batch waits for others.
        max_queue: maximum number of waiting entries, without those in computation.
        on_batch: callback with size and seconds of every computed batch.

    Example:
        >>> async def main():
        ...     batcher = Batcher(lambda key, items: [key * item for item in items], max_batch_size=8, max_wait=0.01, max_queue=100)
        ...     async with batcher:
        ...         return await asyncio.gather(*batcher.submit([(2, 10), (3, 10), (2, 11)]))
        >>> asyncio.run(main())
        [20, 30, 22]
    """

    def __init__(
        self,
        compute: Callable[[Any, list], Sequence],
        max_batch_size: int,
        max_wait: float,
        max_queue: int,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        self._compute, self._on_batch = compute, on_batch
        self.max_batch_size, self.max_wait, self.max_queue = max_batch_size, max_wait, max_queue
        self._waiting: dict[Hashable, deque[_Entry]] = {}
        self.queue_length = 0
        self.computing = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batcher")
        self._task: asyncio.Task | None = None
        self._seconds_per_entry = 0.05  # initial value of a running mean

    async def __aenter__(self) -> Batcher:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exc) -> None:
        """Discards waiting entries after the current batch has finished."""
        self.abort()
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    @property
    def alive(self) -> bool:
        """Whether entries are being computed."""
        return self._task is not None and not self._task.done()

    @property
    def seconds_ahead(self) -> float:
        """Estimated seconds until all current entries are computed."""
        return self._seconds_per_entry * (self.queue_length + self.computing)

    def submit(self, entries: Sequence[tuple[Hashable, Any]]) -> list[asyncio.Future]:
        """
        Adds (key, item) pairs to the queue, all or none, and returns one future each.

        Raises:
            QueueFull: the queue has no room for them.
        """
        if self.queue_length + len(entries) > self.max_queue:
            raise QueueFull(self.seconds_ahead)
        loop = asyncio.get_running_loop()
        futures = []
        for key, item in entries:
            entry = _Entry(item, loop.create_future())
            self._waiting.setdefault(key, deque()).append(entry)
            futures.append(entry.future)
        self.queue_length += len(entries)
        self._arrived.set()
        return futures

    def abort(self) -> None:
        """Discards all waiting entries: their futures raise [`Aborted`]."""
        for entries in self._waiting.values():
            for entry in entries:
                if not entry.future.done():
                    entry.future.set_exception(Aborted())
        self._waiting.clear()
        self.queue_length = 0

    async def _run(self) -> None:
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            key = min(self._waiting, key=lambda key: self._waiting[key][0].arrived)
            await self._fill(key)
            entries = [entry for entry in self._take(key) if not entry.future.done()]
            if entries:
                self.computing = len(entries)
                try:
                    await self._answer(key, entries)
                finally:
                    self.computing = 0

    async def _fill(self, key: Hashable) -> None:
        """Waits until the key's batch is full or its first entry has waited long enough."""
        deadline = self._waiting[key][0].arrived + self.max_wait
        while len(self._waiting.get(key, ())) < self.max_batch_size:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return

    def _take(self, key: Hashable) -> list[_Entry]:
        waiting = self._waiting.get(key, deque())  # entries may have been aborted
        taken = [waiting.popleft() for _ in range(min(len(waiting), self.max_batch_size))]
        if not waiting:
            self._waiting.pop(key, None)
        self.queue_length -= len(taken)
        return taken

    async def _answer(self, key: Hashable, entries: list[_Entry]) -> None:
        started = time.monotonic()
        try:
            results = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._compute, key, [entry.item for entry in entries]
            )
        except Exception as error:
            if len(entries) > 1:
                for entry in entries:
                    await self._answer(key, [entry])
            elif not entries[0].future.done():
                entries[0].future.set_exception(error)
            return
        seconds = time.monotonic() - started
        self._seconds_per_entry += 0.1 * (seconds / len(entries) - self._seconds_per_entry)
        self._on_batch(len(entries), seconds)
        for entry, result in zip(entries, results, strict=True):
            if not entry.future.done():
                entry.future.set_result(result)
