"""
Dynamic batching with a fair queue: entries of concurrent requests wait in a bounded queue and are computed in batches of equal keys.

Requests share the computation evenly: each entry is due when a fair share of the computation since its request came would have reached it, and what
is due first is computed first. A small request that comes while a costly batch is computed is computed between two steps of it.

This module is independent of the computation. The queue belongs to an event loop; the computation runs in two threads that take turns.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .turns import Aborted, Turns

# A batch gives way to one of at most this share of its cost.
_SMALL = 1 / 8
# Costly requests put so many entries into a batch that its steps take about this long; a small request waits for one step.
_STEP_SECONDS = 0.025


class QueueFull(Exception):
    """The queue has no room for the entries; retry after `retry_after` seconds."""

    def __init__(self, reason: str, retry_after: float):
        super().__init__(f"{reason}; try again in {retry_after:.1f} s")
        self.reason, self.retry_after = reason, retry_after


@dataclass(order=True)
class _Entry:
    due: float
    number: int
    item: Any = field(compare=False)
    cost: float = field(compare=False)
    costly: bool = field(compare=False)
    future: asyncio.Future = field(compare=False)
    arrived: float = field(compare=False, default_factory=time.monotonic)


@dataclass
class _Batch:
    """A batch in computation."""

    entries: list[_Entry]

    @property
    def cost(self) -> float:
        return sum(entry.cost for entry in self.entries)

    @property
    def due(self) -> float:
        """When its last entry is due."""
        return max(entry.due for entry in self.entries)


class Batcher:
    """
    Computes submitted entries in batches.

    Entries with equal keys may share a batch. The entry that is due first decides which key is next: its batch starts when it is full or when
    that entry is `max_wait` seconds old. Further entries queue up during a computation; those that are due before it and cost far less are
    computed between two of its steps. If a batch fails, its entries are computed one by one, so that only the faulty one fails. Entries with
    cancelled futures are not computed.

    Args:
        compute: takes a key, a list of items and a function to call between steps, and returns a result per item; called in a thread of the
            batcher. Two calls may be open at a time, but only one of them runs: the other one waits in that function.
        max_batch_size: maximum number of entries per batch.
        max_wait: seconds that the first entry of a batch waits for others.
        max_queue: maximum number of waiting entries, without those in computation.
        cost: of an entry, from its key and item.
        max_cost: maximum cost of the waiting entries. A request may take half of what is left, so that there is room for a smaller one.
        costly: cost of a request above which its entries do not fill a batch, if steps of the batch would be long.
        max_seconds: a costly request is refused if the queue is estimated to take longer with it.
        on_batch: callback with size and seconds of every computed batch.

    Example:
        >>> async def main():
        ...     double = lambda key, items, step: [key * item for item in items]
        ...     async with Batcher(double, max_batch_size=8, max_wait=0.01, max_queue=100) as batcher:
        ...         return await asyncio.gather(*batcher.submit([(2, 10), (3, 10), (2, 11)]))
        >>> asyncio.run(main())
        [20, 30, 22]
    """

    def __init__(
        self,
        compute: Callable[[Any, list, Callable[[], None]], Sequence],
        max_batch_size: int,
        max_wait: float,
        max_queue: int,
        cost: Callable[[Any, Any], float] = lambda key, item: 1.0,
        max_cost: float = math.inf,
        costly: float = math.inf,
        max_seconds: float = math.inf,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        self._compute, self._cost, self._on_batch = compute, cost, on_batch
        self.max_batch_size, self.max_wait, self.max_queue = max_batch_size, max_wait, max_queue
        self.max_cost, self.costly, self.max_seconds = max_cost, costly, max_seconds
        self._waiting: dict[Hashable, list[_Entry]] = {}  # a heap per key
        self._numbers = itertools.count()
        self._requests = 0  # that are not answered yet
        self._now = 0.0  # the cost that a request has been given of the computation since the beginning
        self.queue_length = 0
        self.waiting_cost = 0.0
        self._running: list[_Batch] = []
        self._costly_entries = min(
            2, max_batch_size
        )  # of costly requests in a batch: more as the steps turn out short
        self._arrived, self._small = asyncio.Event(), asyncio.Event()
        self._turns = Turns()
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("batcher", "batcher-small")]
        self._tasks: list[asyncio.Task] = []
        self._seconds_per_entry = 0.05  # initial value of a running mean
        self._seconds_per_cost = 0.0  # of costly requests, a running mean

    async def __aenter__(self) -> Batcher:
        self._tasks = [asyncio.create_task(run()) for run in (self._run, self._run_small)]
        return self

    async def __aexit__(self, *exc) -> None:
        """Discards waiting entries, and those in computation at its next step."""
        self.abort()
        self._turns.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for thread in self._threads:
            await asyncio.get_running_loop().run_in_executor(None, thread.shutdown)

    @property
    def alive(self) -> bool:
        """Whether entries are being computed."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    @property
    def computing(self) -> int:
        """Entries in computation."""
        return sum(len(batch.entries) for batch in self._running)

    @property
    def seconds_ahead(self) -> float:
        """Estimated seconds until all current entries are computed."""
        by_cost = self._seconds_per_cost * (self.waiting_cost + sum(batch.cost for batch in self._running))
        return max(by_cost, self._seconds_per_entry * (self.queue_length + self.computing))

    def submit(self, entries: Sequence[tuple[Hashable, Any]]) -> list[asyncio.Future]:
        """
        Adds (key, item) pairs of a request to the queue, all or none, and returns one future each.

        Raises:
            QueueFull: the queue has no room for them.
        """
        costs = [self._cost(key, item) for key, item in entries]
        cost = sum(costs)
        if self.queue_length + len(entries) > self.max_queue:
            raise QueueFull(f"the queue of {self.max_queue} histories is full", self.seconds_ahead)
        if self.waiting_cost:
            late = self._seconds_per_cost * (self.waiting_cost + cost) > self.max_seconds and cost > self.costly
            if late or cost > (self.max_cost - self.waiting_cost) / 2:
                raise QueueFull("the queue has no room for a request of this cost", self.seconds_ahead)
        loop = asyncio.get_running_loop()
        futures = []
        due = self._now
        for (key, item), share in zip(entries, costs, strict=True):
            due += share
            entry = _Entry(due, next(self._numbers), item, share, cost > self.costly, loop.create_future())
            heapq.heappush(self._waiting.setdefault(key, []), entry)
            futures.append(entry.future)
        self.queue_length += len(entries)
        self.waiting_cost += cost
        self._requests += 1
        asyncio.gather(*futures, return_exceptions=True).add_done_callback(self._answered)
        self._arrived.set()
        self._small.set()
        return futures

    def _answered(self, request: asyncio.Future) -> None:
        self._requests -= 1

    def abort(self) -> None:
        """Discards all waiting entries: their futures raise [`Aborted`]."""
        for entries in self._waiting.values():
            for entry in entries:
                if not entry.future.done():
                    entry.future.set_exception(Aborted())
        self._waiting.clear()
        self.queue_length, self.waiting_cost = 0, 0.0

    async def _run(self) -> None:
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            key = self._first_key()
            await self._fill(key)
            batch = _Batch(self._take(key))
            if batch.entries:
                await self._answer(key, batch, small=False)

    async def _run_small(self) -> None:
        """Computes what is due before the batch in computation, and costs far less."""
        while True:
            self._small.clear()
            await self._small.wait()
            while self._running and self._waiting:
                key, running = self._first_key(), self._running[0]
                batch = _Batch(self._take(key, due=running.due, cost=running.cost * _SMALL))
                if not batch.entries:
                    break
                await self._answer(key, batch, small=True)

    def _first_key(self) -> Hashable:
        return min(self._waiting, key=lambda key: self._waiting[key][0])

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

    def _take(self, key: Hashable, due: float = math.inf, cost: float = math.inf) -> list[_Entry]:
        """The entries of a key for a batch: those that are due first, before `due`, and cost no more than `cost` together."""
        waiting = self._waiting.get(key, [])  # entries may have been aborted
        taken, left, costly = [], [], 0
        while waiting and len(taken) < self.max_batch_size and waiting[0].due < due:
            entry = waiting[0]
            if entry.future.done():  # nobody waits for it
                cost += entry.cost
            elif entry.cost > cost:
                break
            heapq.heappop(waiting)
            if entry.costly and costly >= self._costly_entries:
                left.append(entry)
                continue
            self.queue_length -= 1
            self.waiting_cost -= entry.cost
            cost -= entry.cost
            if not entry.future.done():
                costly += entry.costly
                taken.append(entry)
        for entry in left:
            heapq.heappush(waiting, entry)
        if not waiting:
            self._waiting.pop(key, None)
        return taken

    async def _answer(self, key: Hashable, batch: _Batch, small: bool) -> None:
        entries = batch.entries
        futures, items = [entry.future for entry in entries], [entry.item for entry in entries]
        turns = self._turns
        turn = turns.small if small else partial(turns.large, lambda: all(map(asyncio.Future.done, futures)))
        self._running.insert(len(self._running) if small else 0, batch)
        self._small.set()
        started = time.monotonic()
        try:
            results, longest_step = await asyncio.get_running_loop().run_in_executor(
                self._threads[small], turn, self._compute, key, items
            )
        except asyncio.CancelledError:  # the batcher ends
            for future in futures:
                if not future.done():
                    future.set_exception(Aborted())
            raise
        except Exception as error:
            self._running.remove(batch)
            self._now += batch.cost / max(1, self._requests)
            if len(entries) > 1 and not isinstance(error, Aborted):
                for entry in entries:
                    await self._answer(key, _Batch([entry]), small)
                return
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            return
        self._running.remove(batch)
        self._measure(batch, time.monotonic() - started, longest_step)
        for future, result in zip(futures, results, strict=True):
            if not future.done():
                future.set_result(result)

    def _measure(self, batch: _Batch, seconds: float, longest_step: float) -> None:
        self._now += batch.cost / max(1, self._requests)
        size, costly = len(batch.entries), sum(entry.costly for entry in batch.entries)
        self._seconds_per_entry += 0.1 * (seconds / size - self._seconds_per_entry)
        if costly:
            self._seconds_per_cost += 0.1 * (seconds / batch.cost - self._seconds_per_cost)
            if longest_step > _STEP_SECONDS:
                self._costly_entries = max(1, int(costly * _STEP_SECONDS / longest_step))
            elif costly >= self._costly_entries and longest_step < _STEP_SECONDS / 2:
                self._costly_entries = min(self.max_batch_size, 2 * self._costly_entries)
        self._on_batch(size, seconds)
