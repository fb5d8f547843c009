"""
Runs parsers on damaged files: mutations of valid ones, in a process that may not take much memory or time over one of them.

A parser may return, or raise a ValueError or an OSError with a short message that names the file. Everything else is a failure: another
exception, a hang, more memory than the limit, a process that dies. An input that takes a new way through our code, as far as its outcome shows
(the exception's class and the lines of ours that it went through), joins the inputs that are mutated further.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import mmap
import os
import random
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LONGEST_MESSAGE = 3_000  # characters; a message that repeats the file is none
CHUNK = 500  # inputs per process: what one of them leaves behind does not pile up
_SEEDS_KEPT = 256
_BROKEN = 97  # exit status of a process in which not the parser failed, but what is here
_SLOT = 2**17  # bytes of the largest input


@dataclass(frozen=True)
class Limits:
    """
    What one input may cost: `memory` bytes of address space above what the process starts with, and `seconds` of CPU time (wall time means
    nothing on a busy machine).
    """

    memory: int = 2**31
    seconds: float = 10.0


@dataclass(frozen=True)
class Parser:
    """
    Something that reads a file.

    Args:
        file: name of the file that is damaged, with its suffix.
        parse: reads it, and what stands beside it.
        seeds: valid files to start from.
        mutate: (random, file) -> a damaged file, by someone who knows the format; bytes are damaged anyway.
        prepare: fills the folder with what stands beside the file.
    """

    name: str
    file: str
    parse: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[random.Random, bytes], bytes]
    prepare: Callable[[Path], None] | None = None


@dataclass
class Failure:
    """An input and what went wrong on it."""

    parser: str
    reason: str
    where: str
    content: bytes


@dataclass
class Report:
    """What became of a parser's inputs."""

    parser: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    failed: int = 0  # inputs; `failures` holds one for each way to fail
    ways: int = 0  # outcomes that differ in class or lines
    failures: list[Failure] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.parser}: {self.inputs:,} inputs, {self.accepted:,} read, {self.refused:,} refused in {self.ways} ways"
        return f"{text}, {self.failed:,} failed in {len(self.failures)}"


class Hang(BaseException):
    """Raised in the parser when its time is over; no `except Exception` swallows it."""


def damage(generator: random.Random, content: bytes, other: bytes) -> bytes:
    """One random change of bytes: flipped, overwritten, inserted, cut out, repeated, cut off, or spliced with another file's."""
    data = bytearray(content)
    at, to = sorted(generator.randrange(len(data) + 1) for _ in range(2))
    kind = generator.randrange(9)
    if kind == 0 and data:
        for _ in range(generator.choice((1, 1, 2, 8))):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    elif kind == 1 and data:
        data[generator.randrange(len(data))] = generator.choice(b"\x00\xff\x7f\x80\n\r\t ,\"'0-{}[]")
    elif kind == 2:
        data[at:at] = generator.randbytes(generator.choice((1, 2, 4, 16)))
    elif kind == 3:
        del data[at : min(to, at + generator.choice((1, 4, 64, 4096)))]
    elif kind == 4:
        data[at:at] = data[at : min(to, at + 256)] * generator.choice((1, 2, 64))
    elif kind == 5:
        del data[at:]
    elif kind == 6:
        data[at:] = other[generator.randrange(len(other) + 1) :]
    elif kind == 7:
        data[at:at] = generator.choice(
            (
                b"\x00",
                b"\xef\xbb\xbf",
                b"\xff\xfe",
                b"\r\n",
                b"\n\n",
                b'"',
                b"NaN",
                b"1e999",
                b"9" * 5000,
                b"\xed\xa0\x80",
                "é\u202e".encode(),
            )
        )
    else:
        size = generator.choice((1, 2, 4, 8))
        number = generator.choice((0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1, 1000))
        data[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(data[:_SLOT])


def check(parser: Parser, path: Path, content: bytes, seconds: float) -> tuple[str, str]:
    """
    Gives the parser a file.

    Returns:
        "read", "refused" or what is wrong, and the way the outcome came about.
    """
    with contextlib.suppress(FileNotFoundError):  # not overwritten: an earlier object may still map it
        path.unlink()
    path.write_bytes(content)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            parser.parse(path)
        return "read", "read"
    except (ValueError, OSError) as error:
        message = str(error)
        if path.name not in message and path.parent.name not in message:
            return f"the message does not name the file: {type(error).__name__}: {message[:200]}", way(error)
        if len(message) > LONGEST_MESSAGE:
            return f"a message of {len(message):,} characters: {message[:200]}", way(error)
        return "refused", way(error)
    except Hang:
        return f"took more than {seconds} s", "hang"
    except MemoryError as error:
        return "took more memory than the limit", way(error)
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}", way(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def way(error: BaseException) -> str:
    """The class of the exception that it began with, and the last lines of ours that this came through."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f"{Path(frame.filename).name}:{frame.lineno}"
        for frame in frames
        if frame.filename.startswith(str(ROOT)) and ".venv" not in frame.filename
    ]
    last = frames[-1]
    return f"{type(error).__name__} {' '.join(ours[-3:])} {Path(last.filename).name}:{last.name}"


def fuzz(
    parser: Parser, inputs: int, seed: int = 0, limits: Limits | None = None, deadline: float | None = None
) -> Report:
    """
    Gives a parser `inputs` damaged files, in separate processes.

    Args:
        seed: of the mutations.
        deadline: `time.monotonic()` after which no further process is started; `inputs` of the report says how far it came.
    """
    report, limits, start, ways = Report(parser.name), limits or Limits(), 0, set()
    pool = parser.seeds()
    while start < inputs and (deadline is None or time.monotonic() < deadline):
        count = min(CHUNK, inputs - start)
        part, seen = _in_a_process(parser, pool, f"{parser.name}/{seed}/{start}", count, limits)
        report.inputs += part.inputs
        report.accepted += part.accepted
        report.refused += part.refused
        report.failed += part.failed
        known = {failure.where for failure in report.failures}
        report.failures += [failure for failure in part.failures if failure.where not in known]
        ways |= seen
        start += count
    report.ways = len(ways)
    return report


def _in_a_process(parser: Parser, pool: list[bytes], seed: str, count: int, limits: Limits) -> tuple[Report, set[str]]:
    """One chunk in a forked process; where that dies or hangs, the rest in further ones."""
    report, ways, start = Report(parser.name), set(), 0
    while start < count:
        shared = mmap.mmap(-1, _SLOT + 16)  # number and size of the current input, and the input
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            status = _BROKEN
            try:
                found = _chunk(parser, pool, seed, start, count, limits, shared)
                with os.fdopen(writer, "wb") as stream:
                    stream.write(json.dumps(found).encode())
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writer)
        answer = _wait(child, reader, shared, limits.seconds)
        done, size = int.from_bytes(shared[:8], "little"), int.from_bytes(shared[8:16], "little")
        if isinstance(answer, dict):
            report.inputs += answer["inputs"]
            report.accepted += answer["accepted"]
            report.refused += answer["refused"]
            report.failed += answer["failed"]
            ways |= set(answer["ways"])
            report.failures += [
                Failure(parser.name, reason, where, bytes.fromhex(content))
                for reason, where, content in answer["failures"]
            ]
            start = count
        else:  # the process's own counts are lost with it: what it had done counts as refused
            report.inputs += done - start + 1
            report.refused += done - start
            report.failed += 1
            report.failures.append(Failure(parser.name, answer, answer, shared[16 : 16 + size]))
            start = done + 1
        shared.close()
    return report, ways


def _wait(child: int, reader: int, shared: mmap.mmap, seconds: float) -> dict | str:
    """What the child wrote, or how it ended."""
    chunks, before, since = [], -1, time.monotonic()
    with os.fdopen(reader, "rb") as stream:
        while True:
            ready, _, _ = select.select([stream], [], [], 1.0)
            if ready:
                part = os.read(stream.fileno(), 2**16)
                if not part:
                    break
                chunks.append(part)
            now = int.from_bytes(shared[:8], "little")
            if now != before:
                before, since = now, time.monotonic()
            elif (
                time.monotonic() - since > 12 * seconds + 60 and not chunks
            ):  # in native code, where no timer reaches it
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return f"took more than {12 * seconds + 60:.0f} s in native code, or waited"
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _BROKEN:
        raise RuntimeError("the fuzzer itself failed; its traceback stands above")
    if os.WIFSIGNALED(status):
        return f"the process died of {signal.Signals(os.WTERMSIG(status)).name}"
    return json.loads(b"".join(chunks)) if chunks else f"the process ended with status {os.WEXITSTATUS(status)}"


def _chunk(
    parser: Parser, pool: list[bytes], seed: str, start: int, count: int, limits: Limits, shared: mmap.mmap
) -> dict:
    """Inputs `start` to `count` of a chunk, in this process."""
    signal.signal(signal.SIGPROF, _stop)
    gc.freeze()  # what the parent made is no garbage, and is not looked through again
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limits.memory, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    found: dict[str, Any] = {"inputs": 0, "accepted": 0, "refused": 0, "failed": 0, "failures": []}
    ways: set[str] = set()
    failed: set[str] = set()
    with _folder(parser) as path:
        inputs, kept = _inputs(parser, list(pool), seed, count), None
        for number in range(count):
            content, kept = inputs.send(kept), False
            if number < start:
                continue
            shared[16 : 16 + len(content)] = content
            shared[:16] = number.to_bytes(8, "little") + len(content).to_bytes(8, "little")
            outcome, where = check(parser, path, content, limits.seconds)
            if number % 25 == 0:
                gc.collect()
            kept = where not in ways
            ways.add(where)
            found["inputs"] += 1
            kind = {"read": "accepted", "refused": "refused"}.get(outcome, "failed")
            found[kind] += 1
            if kind == "failed" and where not in failed:
                failed.add(where)
                found["failures"].append((outcome, where, content.hex()))
    return {**found, "ways": sorted(ways)}


def _inputs(parser: Parser, pool: list[bytes], seed: str, count: int) -> Generator[bytes, bool | None, None]:
    """The valid files, then mutations of them and of those inputs after which it was sent True."""
    generator, valid = random.Random(seed), list(pool)
    for number in range(count):
        content = (
            valid[number] if number < len(valid) else generator.choice(valid if generator.random() < 0.6 else pool)
        )
        for _ in range(generator.choice((1, 1, 1, 1, 2, 4)) if number >= len(valid) else 0):
            if generator.random() < 0.6:
                with contextlib.suppress(Exception):  # what is damaged already may not be of the format any more
                    content = parser.mutate(generator, content)[:_SLOT]
            else:
                content = damage(generator, content, generator.choice(pool))
        if (yield content):
            pool.append(content)
            if len(pool) > _SEEDS_KEPT:
                del pool[generator.randrange(len(pool))]


@contextlib.contextmanager
def _folder(parser: Parser) -> Iterator[Path]:
    """The path of the file to damage, in a new folder, in memory if the machine has a file system there."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        if parser.prepare is not None:
            parser.prepare(folder)
        yield folder / parser.file
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stop(number, frame):
    raise Hang
