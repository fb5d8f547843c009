"""The runs of a comparison as processes: one file per finished run, several at a time, ended where they fall behind or time is up."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from onerec_hf.modeling.files import short
from onerec_hf.workflows.artefact import write_bytes
from onerec_hf.workflows.settings import DataSettings

#: Seconds between two looks at the processes.
POLL = 0.1


@dataclass(frozen=True, eq=False)
class Run:
    """
    A run: its name, its family's name, and what run.py is told. The spec's `result` is its file.

    Args:
        number: of the trial, or the seed.
    """

    name: str
    family: str
    number: int
    spec: dict[str, Any]

    @property
    def path(self) -> Path:
        return Path(self.spec["result"])

    def found(self) -> dict[str, Any] | None:
        """
        What the run measured; None where it has not ended.

        Raises:
            ValueError: its file is of a run with other settings, or damaged.
        """
        if not self.path.is_file():
            return None
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            spec = found["spec"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged ({short(error)}). Remove it: the run is repeated") from None
        if differ := [key for key, value in self.spec.items() if as_now(key, spec.get(key)) != as_now(key, value)]:
            raise ValueError(f"{self.path} was measured with another {', '.join(differ)}. Pass another --output_dir")
        lost = self.spec["keep"] and not Path(self.spec["folder"], "config.json").is_file()
        return None if lost and found["state"] == "finished" else found


def as_now(name: str, value: Any) -> Any:
    """
    What a file of a comparison holds under a name, as this version writes it: options of the data that it lacks have their defaults, and the default
    feedback of histories is not named.

    Example:
        >>> as_now("data", {"history_feedback": "positive"}) == as_now("data", {"features": None})
        True
    """
    if name != "data" or value is None:
        return value
    value = {**asdict(DataSettings()), **value}
    if value["features"] != "auto" and value["history_feedback"] == "positive":
        value["history_feedback"] = None
    return value


@dataclass
class _Process:
    run: Run
    began: float
    pid: int | None = None  # None until the starter has said it
    status: int | None = None
    read: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)


class Processes:
    """
    At most `jobs` runs at a time. Use as a context manager: on leaving it, runs that are left are ended.

    Args:
        jobs: runs at a time, each with its share of the cores as threads.

    Raises:
        RuntimeError: from all methods, when the process that starts the runs has ended.
    """

    def __init__(self, jobs: int):
        self.jobs, self._running = jobs, []
        self._threads = max(1, (os.cpu_count() or 1) // jobs)
        self._starter: subprocess.Popen | None = None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc) -> None:
        for running in list(self._running):
            self._end(running)
        if self._starter is not None:
            assert self._starter.stdin is not None
            assert self._starter.stdout is not None
            self._starter.stdin.close()
            self._starter.wait()
            self._reader.join()
            self._starter.stdout.close()

    @property
    def free(self) -> bool:
        return len(self._running) < self.jobs

    @property
    def runs(self) -> list[Run]:
        """What is running."""
        return [running.run for running in self._running]

    def start(self, run: Run) -> None:
        """Starts a run; its messages go to a log beside its file."""
        # Of a comparison that was killed: it would be read as this run's.
        Path(run.spec["progress"]).unlink(missing_ok=True)
        spec = run.path.with_suffix(".spec.json")
        write_bytes(spec, json.dumps(run.spec).encode())
        order = {"spec": str(spec), "log": str(run.path.with_suffix(".log")), "threads": self._threads}
        if self._starter is None:  # a comparison whose runs all have their files needs none
            environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads), "PYTHONUNBUFFERED": "1"}
            command = [sys.executable, "-m", "onerec_hf.workflows.compare.starter"]
            pipe = subprocess.PIPE
            self._starter = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
            self._reader = threading.Thread(target=self._read_answers, args=(self._starter.stdout,), daemon=True)
            self._reader.start()
        assert self._starter.stdin is not None
        self._starter.stdin.write(json.dumps(order) + "\n")
        self._starter.stdin.flush()
        self._running.append(_Process(run, time.monotonic()))

    def _read_answers(self, stdout: IO[str]) -> None:
        for line in stdout:
            self._answers.put(line)

    def _take_answers(self) -> None:
        """What the starter has said since the last call."""
        while not self._answers.empty():
            answer = json.loads(self._answers.get())
            for running in self._running:
                if "started" in answer and answer["spec"] == str(running.run.path.with_suffix(".spec.json")):
                    running.pid = answer["started"]
                elif "ended" in answer and answer["ended"] == running.pid:
                    running.status = answer["status"]
        if self._running and self._starter is not None and self._starter.poll() is not None:
            raise RuntimeError(
                f"the process that starts the runs ended with status {self._starter.returncode}; resume with the same command"
            )

    def ended(self) -> list[tuple[Run, dict[str, Any]]]:
        """Runs that have ended since the last call, and what they measured; a run without a file has failed."""
        self._take_answers()
        done = [running for running in self._running if running.status is not None]
        return [(running.run, self._collect(running)) for running in done]

    def progress(self) -> list[tuple[Run, dict[str, Any]]]:
        """Evaluations during training that are new since the last call: `step`, `value` and `cpu_seconds`."""
        return [(running.run, line) for running in self._running for line in _new_lines(running)]

    def stop(self, run: Run, state: str, reason: str) -> dict[str, Any]:
        """Ends a run. A pruned one gets a file, which holds the evaluations so far; one that the budget ends runs again when the comparison resumes."""
        (running,) = (running for running in self._running if running.run is run)
        self._end(running)
        found = {
            "state": state,
            "reason": reason,
            "evaluations": running.lines,
            "seconds": time.monotonic() - running.began,
            "train_cpu_seconds": running.lines[-1]["cpu_seconds"] if running.lines else 0.0,
        }
        if state == "pruned":
            _write(run, found)
        return found

    def _end(self, running: _Process) -> None:
        assert self._starter is not None
        while running.status is None and self._starter.poll() is None:
            if running.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(running.pid, signal.SIGKILL)
            time.sleep(0.01)
            self._take_answers()
        self._forget(running)

    def _collect(self, running: _Process) -> dict[str, Any]:
        _new_lines(running)
        self._forget(running)
        found = running.run.found()
        if found is None:
            code, log = running.status or 0, running.run.path.with_suffix(".log")
            why = f"signal {-code} (9 is sent where memory is short)" if code < 0 else f"status {code}"
            found = {"state": "failed", "reason": f"its process ended with {why}; see {log.name}"}
        found = {"seconds": time.monotonic() - running.began, **found, "evaluations": running.lines}
        _write(running.run, found)
        return found

    def _forget(self, running: _Process) -> None:
        self._running.remove(running)
        running.run.path.with_suffix(".spec.json").unlink(missing_ok=True)
        Path(running.run.spec["progress"]).unlink(missing_ok=True)
        if not running.run.spec["keep"]:
            shutil.rmtree(running.run.spec["folder"], ignore_errors=True)


def _new_lines(running: _Process) -> list[dict[str, Any]]:
    """Lines of a run's progress that have not been read, whole ones only."""
    path = Path(running.run.spec["progress"])
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")[running.read :]
    whole = text[: text.rfind("\n") + 1]
    running.read += len(whole)
    lines = [json.loads(line) for line in whole.splitlines()]
    running.lines += lines
    return lines


def _write(run: Run, found: dict[str, Any]) -> None:
    write_bytes(run.path, (json.dumps({**found, "spec": run.spec}, indent=1) + "\n").encode())
