"""Several ranks for tests: a function on processes forked from a server that has torch imported already, or a program under torchrun."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]


def torchrun(*command: Any, ranks: int = 2, input: str = "", timeout: float = 400) -> subprocess.CompletedProcess:
    """
    `torchrun --standalone --nproc_per_node RANKS COMMAND...`, for one rank `python COMMAND...`, in the repository and without accelerators;
    what it printed is text.
    """
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.run(
        [sys.executable, *(several if ranks > 1 else ()), *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        input=input,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def on_ranks(size: int, function: Callable, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """
    What `function(*arguments)` returns on each rank, rank 0 first; a ValueError is returned as it is.

    Args:
        function: of a module, so that the processes find it by name.
        timeout: seconds to wait for a rank.

    Raises:
        AssertionError: a rank failed otherwise (its traceback), or did not answer.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["onerec_hf.semantic_ids.fit", "tests.ranks"])
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ends, processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(meeting, port, rank, size, theirs, function, arguments))
            process.start()
            theirs.close()
            ends.append(mine)
            processes.append(process)
        try:
            answers = [end.recv() if end.poll(timeout) else (False, f"no answer in {timeout} s") for end in ends]
        except EOFError:
            answers = [(False, "a rank died without a word")]
        finally:
            for process in processes:
                process.join(10)
                process.kill()
    for rank, (fine, answer) in enumerate(answers):
        assert fine, f"rank {rank}: {answer}"
    return [answer for _, answer in answers]


def _rank(meeting: Path, port: int, rank: int, size: int, end: Any, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    # What torchrun says, which Trainer asks for.
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=size)
    try:
        answer: tuple[bool, Any] = (True, function(*arguments))
    except ValueError as error:
        answer = (True, error)
    except Exception:
        answer = (False, traceback.format_exc())
    end.send(answer)
    end.close()
    if answer[0]:
        dist.barrier()
        dist.destroy_process_group()
