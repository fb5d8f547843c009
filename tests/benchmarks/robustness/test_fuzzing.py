"""Every parser reads or refuses damaged files (up to 200 each here, 100,000 in benchmarks/robustness/fuzz.py), and the fuzzer finds planted faults."""

import os
import time
from random import Random

import pytest

from benchmarks.robustness import fuzz as command
from benchmarks.robustness.fuzzing import Limits, Parser, damage, fuzz
from benchmarks.robustness.parsers import PARSERS

TABLES = ("interactions", "items", "impressions", "preferences")  # some ms each
WHOLE_MODELS = {
    "model-config",
    "weights",
    "reward-model-config",
    "yaml-options",
}  # tens of ms each


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    command.prepare()


@pytest.mark.parametrize("name", PARSERS)
def test_a_damaged_file_is_read_or_refused(name):
    report = fuzz(PARSERS[name], 20 if name in WHOLE_MODELS else 50 if name.startswith(TABLES) else 200, seed=1)
    assert not report.failures, report.failures[0]
    assert report.accepted  # the valid files, at least
    assert report.refused


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_many_damaged_files_are_read_or_refused(name):
    started = time.monotonic()
    report = fuzz(PARSERS[name], 100 if name in WHOLE_MODELS else 100_000, seed=2, deadline=started + 1)
    assert not report.failures, report.failures[0]
    print(f"fuzz/{name}: {report.inputs} inputs")


def reader(parse) -> Parser:
    """A parser of a text file; every fourth damaged one says "bad"."""

    def mutate(generator: Random, content: bytes) -> bytes:
        return b"bad" if generator.random() < 0.5 else damage(generator, content, content)

    return Parser("planted", "notes.txt", parse, lambda: [b"good"], mutate)


def crash(path):
    if path.read_bytes() == b"bad":
        raise KeyError("no such thing")


def anonymous(path):
    if path.read_bytes() == b"bad":
        raise ValueError("something is wrong")


def endless(path):
    while path.read_bytes() == b"bad":
        pass


def hungry(path):
    if path.read_bytes() == b"bad":
        bytearray(2**31)


def deadly(path):
    if path.read_bytes() == b"bad":
        os.abort()


def talkative(path):
    if path.read_bytes() == b"bad":
        raise ValueError(f"{path}: {'x' * 100_000}")


@pytest.mark.parametrize(
    ("parse", "reason"),
    [
        (crash, "KeyError: 'no such thing'"),
        (anonymous, "the message does not name the file"),
        (endless, "took more than 0.2 s"),
        (hungry, "took more memory than the limit"),
        (deadly, "the process died of SIGABRT"),
        (talkative, "a message of 100,0"),
    ],
)
def test_what_is_planted_is_found(parse, reason):
    report = fuzz(reader(parse), 12, limits=Limits(memory=2**30, seconds=0.2))
    assert report.inputs == 12
    assert report.failures
    assert all(failure.content == b"bad" for failure in report.failures)
    assert report.failures[0].reason.startswith(reason), report.failures[0].reason


def test_an_error_that_names_the_file_is_none():
    def parse(path):
        raise ValueError(f"{path} is damaged")

    report = fuzz(reader(parse), 12)
    assert (report.inputs, report.refused, report.failures) == (12, 12, [])
