"""The queue: what shares a batch, what waits, what fails, and where it ends."""

import asyncio
import threading
import time

import pytest

from onerec_hf.serving.batching import Batcher, QueueFull
from onerec_hf.serving.turns import Aborted


class Computer:
    """Doubles numbers, notes the batches, fails at "bad"; `open` lets it go on. A "large" batch takes steps while `stepping`."""

    def __init__(self):
        self.batches, self.open, self.stepping, self.pause = [], threading.Event(), False, 0.0
        self.open.set()

    def __call__(self, key, items, step):
        self.batches.append((key, items))
        while key == "large" and self.stepping:
            step()
            time.sleep(0.001)
        time.sleep(self.pause)
        assert self.open.wait(10)
        if "bad" in items:
            raise ValueError("this one is bad")
        return [2 * item for item in items]


def run(test, **settings):
    """Runs an asynchronous test with a batcher of a fresh computer."""
    computer = Computer()
    settings = {"max_batch_size": 4, "max_wait": 0.02, "max_queue": 100} | settings

    async def main():
        async with Batcher(computer, **settings) as batcher:
            try:
                return await asyncio.wait_for(test(batcher, computer), 20)
            finally:
                computer.open.set()

    return asyncio.run(main())


async def collected(batcher, computer, entries):
    """Results of entries that arrive while another batch is computed."""
    computer.open.clear()
    (first,) = batcher.submit([("first", 0)])
    while not computer.batches:
        await asyncio.sleep(0.001)
    futures = batcher.submit(entries)
    computer.open.set()
    await first
    return await asyncio.gather(*futures)


def test_entries_of_a_key_share_batches_in_their_order():
    async def test(batcher, computer):
        entries = [("a", 1), ("b", 2), ("a", 3), ("a", 4), ("b", 5), ("a", 6), ("a", 7)]
        assert await collected(batcher, computer, entries) == [2, 4, 6, 8, 10, 12, 14]
        assert computer.batches[1:] == [("a", [1, 3, 4, 6]), ("b", [2, 5]), ("a", [7])]
        assert batcher.queue_length == batcher.computing == 0

    run(test)


def test_the_first_waits_for_others_but_not_long():
    async def test(batcher, computer):
        (first,) = batcher.submit([("a", 1)])
        await asyncio.sleep(0.05)
        (second,) = batcher.submit([("a", 2)])
        assert await asyncio.gather(first, second) == [2, 4]
        assert computer.batches == [("a", [1, 2])]

    run(test, max_wait=2)


def test_a_full_batch_waits_for_nobody():
    async def test(batcher, computer):
        full = asyncio.gather(*batcher.submit([("a", n) for n in range(4)]))
        assert await asyncio.wait_for(full, timeout=60) == [0, 2, 4, 6]

    run(test, max_wait=600)


def test_only_the_entry_at_fault_fails():
    async def test(batcher, computer):
        futures = batcher.submit([("a", 1), ("a", "bad"), ("a", 3)])
        assert (await asyncio.gather(*futures, return_exceptions=True))[::2] == [2, 6]
        with pytest.raises(ValueError, match="this one is bad"):
            futures[1].result()
        assert await asyncio.gather(*batcher.submit([("a", 5)])) == [10]

    run(test)


def test_the_queue_takes_all_or_none():
    async def test(batcher, computer):
        computer.open.clear()
        (first,) = batcher.submit([("a", 0)])
        while not computer.batches:
            await asyncio.sleep(0.001)
        batcher.submit([("a", 1), ("b", 2)])
        with pytest.raises(QueueFull) as refused:
            batcher.submit([("a", 3), ("a", 4)])
        assert refused.value.retry_after > 0
        (last,) = batcher.submit([("a", 5)])
        assert batcher.queue_length == 3
        computer.open.set()
        assert await asyncio.gather(first, last) == [0, 10]
        assert [3, 4] not in [items for _, items in computer.batches]

    run(test, max_queue=3)


def test_who_no_longer_waits_is_not_computed():
    async def test(batcher, computer):
        computer.open.clear()
        (first,) = batcher.submit([("a", 0)])
        while not computer.batches:
            await asyncio.sleep(0.001)
        gone, also_gone, stays = batcher.submit([("a", 1), ("b", 2), ("a", 3)])
        gone.cancel()
        also_gone.cancel()
        computer.open.set()
        assert await asyncio.gather(first, stays) == [0, 6]
        assert computer.batches == [("a", [0]), ("a", [3])]

    run(test)


def test_abort_gives_up_what_waits_and_no_more():
    async def test(batcher, computer):
        computer.open.clear()
        (first,) = batcher.submit([("a", 0)])
        while not computer.batches:
            await asyncio.sleep(0.001)
        waiting = batcher.submit([("a", 1), ("b", 2)])
        batcher.abort()
        computer.open.set()
        assert await first == 0
        assert [type(each) for each in await asyncio.gather(*waiting, return_exceptions=True)] == [Aborted, Aborted]
        assert await asyncio.gather(*batcher.submit([("b", 4)])) == [8]

    run(test)


def test_abort_while_a_batch_fills():
    async def test(batcher, computer):
        (waiting,) = batcher.submit([("a", 1)])
        await asyncio.sleep(0.05)
        batcher.abort()
        with pytest.raises(Aborted):
            await waiting
        assert await asyncio.gather(*batcher.submit([("a", 4)])) == [8]
        assert batcher.alive

    run(test, max_wait=0.3)


SIZES = {"small": 1, "large": 100, "other": 100}


async def beside_large(batcher, computer, small, number=40):
    """Submits a large request of many entries, and a small one as soon as a batch of the large one is computed."""
    large = batcher.submit([("large", n) for n in range(number)])
    while not computer.batches:
        await asyncio.sleep(0.001)
    futures = batcher.submit([("small", n) for n in range(small)])
    return large, futures


def cost(key, item):
    return SIZES[key]


def test_a_small_request_is_computed_between_the_steps_of_a_large_batch():
    async def test(batcher, computer):
        computer.stepping = True
        large, small = await beside_large(batcher, computer, 2)
        assert await asyncio.gather(*small) == [0, 2]
        assert not any(future.done() for future in large)
        assert computer.batches[1] == ("small", [0, 1])
        computer.stepping = False
        await asyncio.gather(*large)
        assert batcher.queue_length == batcher.computing == batcher.waiting_cost == 0

    run(test, cost=cost, max_wait=0)


def test_requests_of_equal_cost_do_not_interrupt_one_another():
    async def test(batcher, computer):
        computer.stepping = True
        (first,) = batcher.submit([("large", 0)])
        while not computer.batches:
            await asyncio.sleep(0.001)
        (second,) = batcher.submit([("other", 1)])
        await asyncio.sleep(0.1)
        assert not second.done()
        computer.stepping = False
        assert await asyncio.gather(first, second) == [0, 2]

    run(test, cost=lambda key, item: 1, max_wait=0)


def test_large_requests_share_the_computation():
    """The second one is not behind the first, and small requests without end do not keep them from being computed."""

    async def test(batcher, computer):
        computer.open.clear()
        first = batcher.submit([("large", n) for n in range(8)])
        second = batcher.submit([("large", 100 + n) for n in range(8)])
        computer.open.set()
        stream, stop = [], False

        async def ask():
            while not stop:
                stream.extend(await asyncio.gather(*batcher.submit([("small", 0)])))

        asking = [asyncio.create_task(ask()) for _ in range(3)]
        await asyncio.gather(*first, *second)
        stop = True
        await asyncio.gather(*asking)
        order = [item for key, items in computer.batches if key == "large" for item in items]
        assert order.index(100) < order.index(7)
        assert stream

    run(test, cost=cost, max_wait=0, max_batch_size=2)


def test_costly_requests_leave_room_for_others():
    async def test(batcher, computer):
        computer.open.clear()
        batcher.submit([("large", 0)])  # any size, where nothing waits
        while not computer.batches:
            await asyncio.sleep(0.001)
        batcher.submit([("large", 1)])
        for _ in range(2):
            with pytest.raises(QueueFull, match="cost"):
                batcher.submit([("large", n) for n in range(2)])
        batcher.submit([("large", 2)])
        with pytest.raises(QueueFull, match="cost"):
            batcher.submit([("large", 3)])
        small = [batcher.submit([("small", n)])[0] for n in range(40)]
        computer.open.set()
        assert await asyncio.gather(*small) == [2 * n for n in range(40)]

    run(test, cost=cost, max_cost=399)


def test_costly_requests_fill_a_batch_as_far_as_its_steps_stay_short():
    async def test(batcher, computer):
        computer.pause = 0.06
        await asyncio.gather(*batcher.submit([("large", n) for n in range(8)]))
        sizes = [len(items) for _, items in computer.batches]
        assert sizes[0] == 2
        assert set(sizes[1:]) == {1}
        computer.pause, computer.batches = 0, []
        await asyncio.gather(*batcher.submit([("large", n) for n in range(64)]))
        assert max(len(items) for _, items in computer.batches) == 16
        computer.pause, computer.batches = 0.06, []
        await asyncio.gather(*batcher.submit([("small", n) for n in range(16)]))
        assert [len(items) for _, items in computer.batches] == [16]

    run(test, cost=cost, costly=50, max_batch_size=16, max_wait=0)


def test_a_computation_that_nobody_waits_for_ends_at_its_next_step():
    async def test(batcher, computer):
        computer.stepping = True
        (gone,) = batcher.submit([("large", 0)])
        while not computer.batches:
            await asyncio.sleep(0.001)
        gone.cancel()
        assert await asyncio.gather(*batcher.submit([("other", 4)])) == [8]

    run(test, cost=cost)


def test_the_end_comes_at_the_next_step():
    async def test(batcher, computer):
        computer.stepping = True
        futures = batcher.submit([("large", 0), ("large", 1)])
        while not computer.batches:
            await asyncio.sleep(0.001)
        return futures

    first, second = run(test, cost=cost)  # ends, although the batch does not
    assert isinstance(first.exception(), Aborted)
    assert isinstance(second.exception(), Aborted)
