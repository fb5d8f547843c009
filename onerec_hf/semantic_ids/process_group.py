"""Several processes that hold the items' rows between them: what the fit of semantic IDs asks of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


class Alone:
    """
    One process that holds every row: each question to the ranks has its own answer.

    Example:
        >>> ALONE.share(5), ALONE.span(5), ALONE.sum(torch.ones(2)).tolist()
        (slice(0, 5, None), (0, 5), [1.0, 1.0])
    """

    rank, size = 0, 1

    def share(self, count: int) -> slice:
        """This rank's part of `count` rows: consecutive, as even as can be, rank 0's first."""
        even, more = divmod(count, self.size)
        first = self.rank * even + min(self.rank, more)
        return slice(first, first + even + (self.rank < more))

    def span(self, count: int) -> tuple[int, int]:
        """Where this rank's `count` rows begin among all ranks' rows, and how many those are."""
        return 0, count

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, on every rank; `values` may be overwritten."""
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """(...) mean over all ranks' rows of (n, ...) floats."""
        return values.mean(0)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """All ranks' rows, in the order of ranks, on every rank."""
        return rows

    def gather_objects(self, mine: Any) -> list[Any]:
        """What each rank gave, on every rank."""
        return [mine]

    def pick(self, rows: torch.Tensor, first: int, wanted: torch.Tensor) -> torch.Tensor:
        """The rows that `wanted` numbers among all ranks' rows, on every rank; this rank's begin at `first`."""
        return rows[wanted]

    @contextmanager
    def together(self) -> Iterator[None]:
        """
        A ValueError in the block on one rank becomes one on every rank, so that none waits for it. The block asks nothing of the ranks.
        """
        yield


class Ranks(Alone):
    """
    The processes of a torch.distributed group. Each holds some of the rows (any number, also none); all rows are those of rank 0, then those of
    rank 1, and so on. Every process calls the same functions in the same order.

    Args:
        group: of `torch.distributed`, whose backend fits the device of the rows (gloo for rows in main memory); the default group when not
            given.

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
                "Ranks needs torch.distributed: start the program by torchrun and call torch.distributed.init_process_group first"
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
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, mine, group=self.group)
        return everyones

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
            owner: (n,) int64, the rank that each of this rank's rows goes to.
            columns: (n, ...) tensors.

        Returns:
            What came here, column by column, in the order of all ranks' rows; and a function that sends an (n', ...) answer, a row for
            each row that came, back to where the rows came from, in their order there.
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
        """On rank 0, all ranks' rows in their order, `at_once` at a time; the others send theirs and get nothing. To be run to its end."""
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
    Those of `wanted` (numbers among all ranks' rows) that lie in the `count` rows from `first` on, as numbers among these, order kept.

    Example:
        >>> those_in(torch.tensor([7, 2, 5]), first=5, count=3).tolist()
        [2, 0]
    """
    return wanted[(wanted >= first) & (wanted < first + count)] - first


ALONE = Alone()
