"""
Starts the runs of a comparison: a process that imports the libraries once and forks for each run, so that a run does not begin with five seconds of
imports. With an accelerator, which does not survive a fork, a run is a new Python process instead.

Reads a JSON line per run (`spec`, `log`, `threads`) from stdin, and writes one when a run starts (`started`, `spec`) and when it ends (`ended`,
`status`). It ends, and so do its runs, with the end of stdin.

    python -m onerec_hf.workflows.compare.starter
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import traceback
from typing import IO, Any

#: Seconds between two looks for runs that have ended.
POLL = 0.05


def main() -> None:
    import torch

    from onerec_hf.workflows.compare import progress, run  # noqa: F401 (loaded for the forks)

    forks = hasattr(os, "fork") and not torch.accelerator.is_available()
    # The answers go to a copy of stdout: what a library prints must not come between them.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    waiting, stdin = b"", sys.stdin.fileno()
    while True:
        if select.select([stdin], [], [], POLL)[0]:
            read = os.read(stdin, 1 << 16)
            if not read:
                return
            *lines, waiting = (waiting + read).split(b"\n")
            for line in lines:
                order = json.loads(line)
                pid = (_fork if forks else _spawn)(order, answers)
                _answer(answers, {"started": pid, "spec": order["spec"]})
        while ended := _ended():
            _answer(answers, {"ended": ended[0], "status": ended[1]})


def _fork(order: dict[str, Any], answers: IO) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        answers.close()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        import torch

        from onerec_hf.workflows.compare import run

        torch.set_num_threads(order["threads"])
        run.main(order["spec"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _spawn(order: dict[str, Any], answers: IO) -> int:
    command = [sys.executable, "-m", "onerec_hf.workflows.compare.run", order["spec"]]
    environment = {**os.environ, "OMP_NUM_THREADS": str(order["threads"])}
    with open(order["log"], "w", encoding="utf-8") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment).pid


def _ended() -> tuple[int, int] | None:
    """A run that has ended since the last call, and its status (a signal as a negative number)."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def _answer(answers: IO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
