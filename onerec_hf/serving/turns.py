"""Two threads that take turns: a long computation gives way to short ones between its steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any


class Aborted(Exception):
    """The entry was discarded before it was computed."""


class Turns:
    """
    Runs computations of two threads, one at a time: [`large`] ones call a function between their steps, in which [`small`] ones run.

    Example:
        >>> Turns().large(lambda: False, lambda key, items, step: [2 * item for item in items], "key", [1, 2])[0]
        [2, 4]
    """

    def __init__(self):
        self._free = threading.Condition()
        self._taken = False
        self._small_waiting = 0
        self._stopped = False

    def stop(self) -> None:
        """Ends computations at their next step: they raise [`Aborted`]."""
        self._stopped = True

    def large(
        self,
        is_abandoned: Callable[[], bool],
        compute: Callable[..., Sequence],
        *args: Any,
    ) -> tuple[Sequence, float]:
        """
        The results of `compute(*args, step)`, and the seconds of its longest step.

        Args:
            is_abandoned: whether nobody waits for the results any more; asked between steps.

        Raises:
            Aborted: nobody does, or `stop` was called.
        """
        self._take(behind_small=True)
        longest, since = 0.0, time.monotonic()

        def step() -> None:
            nonlocal longest, since
            longest = max(longest, time.monotonic() - since)
            if self._stopped or is_abandoned():
                raise Aborted
            if self._small_waiting:
                self._give()
                self._take(behind_small=True)
            since = time.monotonic()

        try:
            results = compute(*args, step)
        finally:
            self._give()
        return results, max(longest, time.monotonic() - since)

    def small(self, compute: Callable[..., Sequence], *args: Any) -> tuple[Sequence, float]:
        """As [`large`], at the next step of a large computation, without steps of its own."""
        with self._free:
            self._small_waiting += 1
        self._take(behind_small=False)
        with self._free:
            self._small_waiting -= 1
        started = time.monotonic()
        try:
            return compute(*args, lambda: None), time.monotonic() - started
        finally:
            self._give()

    def _take(self, behind_small: bool) -> None:
        with self._free:
            self._free.wait_for(lambda: not self._taken and not (behind_small and self._small_waiting))
            self._taken = True

    def _give(self) -> None:
        with self._free:
            self._taken = False
            self._free.notify_all()
