"""Workflows under torchrun: which rank reports and writes, and the ranks as a process group of items."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onerec_hf.semantic_ids import Ranks


def say(text: str) -> None:
    """Progress goes to stderr: stdout belongs to results. Only the first rank prints, above a bar where there is one."""
    if is_first():
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)


def num_ranks() -> int:
    """How many processes run this program, as torchrun and accelerate set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process prints and writes results: rank 0, or the only one."""
    return num_ranks() == 1 or os.environ.get("RANK", "0") == "0"


def joined_on_cpu() -> bool:
    """Whether ranks without an accelerator must be joined: the libraries do so only where `use_cpu` is set."""
    if num_ranks() == 1:
        return False
    import torch

    return not torch.accelerator.is_available()


def all_ranks() -> Ranks | None:
    """The ranks of this program as a process group; None for a single process."""
    if num_ranks() == 1:
        return None
    import torch.distributed as dist
    from accelerate import PartialState

    from onerec_hf.semantic_ids import Ranks

    PartialState(cpu=joined_on_cpu())  # joins the processes as the trainers do
    group: Any = dist.new_group(backend="gloo")  # items are in main memory
    return Ranks(group)


def wait() -> None:
    """Waits for the other ranks: afterwards, everything that the first rank wrote is complete."""
    if num_ranks() == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    """
    Waits for the other ranks before this one ends: a rank that leaves early may abort those that still communicate with it.
    A program that holds a trainer deletes it before: a model under DDP keeps the process group alive.
    """
    if num_ranks() == 1:
        return
    import gc

    import torch.distributed as dist

    wait()
    if dist.is_initialized():
        # gloo's threads end with the last reference to their group. Threads that outlive the interpreter abort the process
        # where they release a tensor of Python's (pytorch#190489).
        gc.collect()
        dist.destroy_process_group()
