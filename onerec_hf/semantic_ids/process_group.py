"""Collective operations over items that are distributed across ranks, for fitting semantic IDs with torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


class SingleProcess:
    """
    A single process that holds all rows: every collective operation is the identity.

    Example:
        >>> SINGLE_PROCESS.share(5), SINGLE_PROCESS.span(5), SINGLE_PROCESS.sum(torch.ones(2)).tolist()
        (slice(0, 5, None), (0, 5), [1.0, 1.0])
    """

    rank, size = 0, 1

    def share(self, count: int) -> slice:
        """This rank's contiguous, even share of `count` rows, in rank order."""
        even, more = divmod(count, self.size)
        first = self.rank * even + min(self.rank, more)
        return slice(first, first + even + (self.rank < more))

    def span(self, count: int) -> tuple[int, int]:
        """Offset of this rank's `count` rows among the rows of all ranks, and their total number."""
        return 0, count

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, on every rank; `values` may be overwritten."""
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """(...) mean over all ranks' rows of (n, ...) floats."""
        return values.mean(0)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks in rank order, on every rank."""
        return rows

    def gather_objects(self, mine: Any) -> list[Any]:
        """The objects of all ranks in rank order, on every rank."""
        return [mine]

    def pick(self, rows: torch.Tensor, first: int, wanted: torch.Tensor) -> torch.Tensor:
        """The rows with global indices `wanted`, on every rank; this rank's rows start at index `first`."""
        return rows[wanted]

    @contextmanager
    def together(self) -> Iterator[None]:
        """
        Raises a ValueError of the block on all ranks, so that no rank waits. The block must not contain collective operations.
        """
        yield


class Ranks(SingleProcess):
    """
    The processes of a torch.distributed group. Each holds a part of the rows (possibly empty); rows are ordered by rank. All processes call
    the same functions in the same order.

    Args:
        group: `torch.distributed` process group with a backend for the device of the rows (gloo for CPU). Default: the default group.

    Raises:
        ValueError: torch.distributed has not been initialised.

    Example:
        >>> dist.init_process_group("gloo")  # doctest: +SKIP
        >>> ranks = Ranks()  # doctest: +SKIP
        >>> vectors = np.load("items.npy", mmap_mode="r")  # doctest: +SKIP
        >>> mine = vectors[ranks.share(len(vectors))]  # doctest: +SKIP
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "Ranks needs an initialised torch.distributed: start the program with torchrun and call torch.distributed.init_process_group first"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def span(self, count: int) -> tuple[int, int]:
        counts = self._counts(count)
        return sum(counts[: self.rank]), sum(counts)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values, group=self.group)
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        total = values.sum(0, dtype=torch.double)
        both = self.sum(torch.cat([total.flatten(), total.new_tensor([len(values)])]))
        return (both[:-1] / both[-1]).view(total.shape).to(values.dtype)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        counts = self._counts(len(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def gather_objects(self, mine: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, mine, group=self.group)
        return gathered

    def pick(self, rows: torch.Tensor, first: int, wanted: torch.Tensor) -> torch.Tensor:
        here = (wanted >= first) & (wanted < first + len(rows))
        picked = rows.new_zeros(len(wanted), *rows.shape[1:])
        picked[here] = rows[wanted[here] - first]
        return self.sum(picked)

    @contextmanager
    def together(self) -> Iterator[None]:
        error = None
        try:
            yield
        except ValueError as raised:
            error = raised
        for raised in self.gather_objects(error):
            if raised is not None:
                raise raised

    def exchange(
        self, owner: torch.Tensor, *columns: torch.Tensor
    ) -> tuple[list[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
        """
        Sends every row to its owner.

        Args:
            owner: (n,) int64, the target rank of each of this rank's rows.
            columns: (n, ...) tensors.

        Returns:
            The received columns, ordered by source rank; and a function that sends an (n', ...) answer, one row per received row, back
            to the source ranks in the original order.
        """
        order = owner.argsort(stable=True)
        sends = owner.bincount(minlength=self.size)
        receives = torch.empty_like(sends)
        dist.all_to_all_single(receives, sends, group=self.group)
        leaving, coming = sends.tolist(), receives.tolist()

        def send(rows: torch.Tensor, out: list[int], into: list[int]) -> torch.Tensor:
            received = rows.new_empty(sum(into), *rows.shape[1:])
            dist.all_to_all_single(received, rows.contiguous(), into, out, group=self.group)
            return received

        def answer(rows: torch.Tensor) -> torch.Tensor:
            back = send(rows, coming, leaving)
            sorted_back = torch.empty_like(back)
            sorted_back[order] = back
            return sorted_back

        return [send(column[order], leaving, coming) for column in columns], answer

    def in_order(self, rows: torch.Tensor, at_once: int) -> Iterator[torch.Tensor]:
        """Yields the rows of all ranks in order on rank 0, `at_once` at a time; the other ranks yield nothing. Must be exhausted on all ranks."""
        if self.rank:
            self.span(len(rows))
            for part in rows.split(at_once) if len(rows) else ():
                dist.send(part.contiguous(), group=self.group, group_dst=0)
            return
        for rank, count in enumerate(self._counts(len(rows))):
            for start in range(0, count, at_once):
                if rank == 0:
                    yield rows[start : start + at_once]
                else:
                    part = rows.new_empty(min(at_once, count - start), *rows.shape[1:])
                    dist.recv(part, group=self.group, group_src=rank)
                    yield part

    def _counts(self, count: int) -> list[int]:
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        counts = torch.zeros(self.size, dtype=torch.long, device=device)
        counts[self.rank] = count
        return self.sum(counts).tolist()


def those_in(wanted: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """
    Converts global row indices to local ones: keeps those of `wanted` within the `count` rows from `first` on, in order.

    Example:
        >>> those_in(torch.tensor([7, 2, 5]), first=5, count=3).tolist()
        [2, 0]
    """
    return wanted[(wanted >= first) & (wanted < first + count)] - first


SINGLE_PROCESS = SingleProcess()
