"""Commands under torchrun: which rank speaks and writes, and the processes as holders of items."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onerec_hf.semantic_ids import Ranks


def num_ranks() -> int:
    """How many processes run this command, as torchrun and accelerate say."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that prints results and writes them: rank 0, or the only one."""
    return num_ranks() == 1 or os.environ.get("RANK", "0") == "0"


def joined_on_cpu() -> bool:
    """Whether processes are to be joined that have no accelerator: the libraries join these only where they are told to use the CPU."""
    if num_ranks() == 1:
        return False
    import torch

    return not torch.accelerator.is_available()


def all_ranks() -> Ranks | None:
    """The processes that run this command, joined; None where there is one."""
    if num_ranks() == 1:
        return None
    import torch.distributed as dist
    from accelerate import PartialState

    from onerec_hf.semantic_ids import Ranks

    PartialState(cpu=joined_on_cpu())  # joins the processes as the trainers do
    group: Any = dist.new_group(backend="gloo")  # items lie in main memory
    return Ranks(group)


def leave() -> None:
    """Waits for the other ranks before this one ends: who leaves early may abort those that still talk to it."""
    if num_ranks() == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
