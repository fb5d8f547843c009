"""`onerec-hf recommend`: histories in (file or stdin, JSON lines), recommended items out (JSON lines)."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TextIO

from onerec_hf.cli.arguments import ShownItemArguments, parse, parse_given
from onerec_hf.modeling.files import short
from onerec_hf.workflows.artefact import load_recommender
from onerec_hf.workflows.data_options import excludes_seen
from onerec_hf.workflows.distributed import all_ranks, is_first, say

if TYPE_CHECKING:
    from onerec_hf.modeling.requests import AnswerCounts, Recommender, ResolvedRequest

_LISTS = ("history", "exclude", "allow")


@dataclass
class RecommendArguments(ShownItemArguments):
    """The model, the histories and the options of a recommendation."""

    model: str | None = field(
        default=None,
        metadata={"help": "A saved OneRec, SASRec, HSTU, GRU4Rec, popularity or item-kNN: folder or Hub id."},
    )
    histories: str = field(
        default="-",
        metadata={
            "help": 'JSON lines: {"user_id": 1, "history": [ids, oldest first]}, optionally with "exclude" and "allow", or a bare list of ids. "-" is stdin.'
        },
    )
    session_length: int = field(default=1, metadata={"help": "Items per session; 1 returns a ranked list of items."})
    top_k: int = field(default=10, metadata={"help": "Sessions (or items) per user, best first."})
    num_beams: int = field(default=50, metadata={"help": "Beam width; raised to top_k if smaller."})
    diversity: float = field(
        default=0.0,
        metadata={"help": "Penalty on items that a user's sessions share; with 1 they share hardly any."},
    )
    exclude_seen: bool = field(
        default=True,
        metadata={"help": "Leave out the items of the history; by default as in the model's training."},
    )
    unknown: str = field(
        default="error",
        metadata={
            "help": "Unknown items in a history: error, or skip (counted; a user without any known item gets an empty answer)."
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Users per batch."})

    def options(self) -> dict[str, Any]:
        """The options of every request, by the names of [`~onerec_hf.modeling.requests.Request`]."""
        names = ("top_k", "session_length", "exclude_seen", "unknown", "diversity")
        return {name: getattr(self, name) for name in names} | {"num_beams": max(self.num_beams, self.top_k)}


def main(argv: list[str]) -> None:
    (args,) = parse((RecommendArguments,), argv, "recommend")
    if args.model is None:
        raise ValueError("pass --model: the folder or Hub id of a saved OneRec")
    for option in ("top_k", "num_beams", "batch_size"):  # of num_beams the request sees the larger one of both
        if getattr(args, option) < 1:
            raise ValueError(f"--{option} must be at least 1; got {getattr(args, option)}")
    if args.histories != "-" and not os.path.isfile(args.histories):
        raise ValueError(f'--histories {args.histories}: no such file; name one, or "-" for stdin')
    from onerec_hf.modeling.requests import AnswerCounts, Request, RequestError

    if "exclude_seen" not in parse_given((RecommendArguments,), argv, "recommend"):
        args.exclude_seen = excludes_seen("--model", args.model)
    try:
        Request([], **args.options())
    except RequestError as error:
        raise ValueError(f"--{error}") from None
    recommender = load_recommender("--model", args.model, args.load)
    if args.session_length > recommender.catalogue.num_active:
        raise ValueError(
            f"--session_length {args.session_length}: the catalogue has only {recommender.catalogue.num_active} items"
        )
    ranks = all_ranks()
    counts = AnswerCounts()
    with recommender.held():
        for numbered in _batches(args, 1 if ranks is None else ranks.size):
            parts = []
            if ranks is None:
                parts = [answer_lines(recommender, numbered, args)]
            elif numbered := ranks.gather_objects(numbered)[0]:  # the first rank reads, every rank answers its share
                mine = numbered[ranks.share(len(numbered))]
                parts = ranks.gather_objects(answer_lines(recommender, mine, args))
            if not numbered:
                break
            for lines, of_part in parts:
                counts += of_part
                for line in lines if is_first() else ():
                    print(line, flush=True)
    if note := str(counts):
        say(note)


def _batches(args: RecommendArguments, batches: int) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Numbered requests, `batches` batches at a time, and an empty list at the end; on other ranks than the first nothing but such lists."""
    while not is_first():
        yield []
    file = contextlib.nullcontext(sys.stdin) if args.histories == "-" else open(args.histories, encoding="utf-8-sig")  # noqa: SIM115 (the with below)
    with file as stream:
        requests = read_requests(stream)
        while numbered := list(islice(requests, batches * args.batch_size)):
            yield numbered
    yield []


def answer_lines(
    recommender: Recommender, numbered: list[tuple[int, dict[str, Any]]], args: RecommendArguments
) -> tuple[list[str], AnswerCounts]:
    """
    The lines that answer a batch of requests, and what was left out of them.

    Args:
        numbered: line numbers and requests, from `read_requests`.

    Raises:
        ValueError: as `resolve_line`.
    """
    from onerec_hf.modeling.requests import AnswerCounts

    resolved = [resolve_line(recommender, number, request, args) for number, request in numbered]
    lines, counts = [], AnswerCounts()
    for (_, request), answer in zip(numbered, recommender.answer(resolved), strict=True):
        counts.add(answer)
        answer.scores = [round(score, 4) for score in answer.scores]
        echoed = {key: value for key, value in request.items() if key not in _LISTS}
        lines.append(json.dumps(echoed | answer.columns(), ensure_ascii=False))
    return lines, counts


def resolve_line(
    recommender: Recommender, number: int, request: dict[str, Any], args: RecommendArguments
) -> ResolvedRequest:
    """
    A line's request against the catalogue.

    Raises:
        ValueError: ids of the wrong type, with `--unknown error` an unknown item or an empty history, or a request that leaves nothing to
            recommend; the message names the line.
    """
    from onerec_hf.modeling.requests import Request, RequestError

    try:
        resolved = recommender.resolve(Request(**{key: request.get(key) for key in _LISTS}, **args.options()))
        problem = recommender.problem(resolved)
        if problem and (not resolved.candidates or (not resolved.history and args.unknown == "error")):
            raise problem
    except RequestError as error:
        raise ValueError(f"line {number}: {error.message(_spell_option)}") from None
    return resolved


def _spell_option(option: str, value: Any) -> str:
    return f"--no_{option}" if value is False else f"--{option} {value}"


@contextlib.contextmanager
def naming_file(path: str) -> Iterator[None]:
    """
    Prefixes errors with the file of the histories, unless that is stdin.

    Raises:
        ValueError: the error with the file's name.
    """
    try:
        yield
    except ValueError as error:
        if path == "-" or path in str(error):
            raise
        raise ValueError(f"--histories {path}: {error}") from error


def read_file(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """Requests of a file, as `read_requests` has them; errors name the file."""
    with naming_file(os.fspath(path)), open(path, encoding="utf-8-sig") as stream:
        yield from read_requests(stream)


def read_requests(stream: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    Requests of a JSON-lines stream: the number of the line and a dictionary with `history`; empty lines are skipped.

    Raises:
        ValueError: a line that is not JSON, or has no history (its number and beginning).

    Example:
        >>> import io
        >>> list(read_requests(io.StringIO('[7, 8]\\n\\n{"user_id": 3, "history": [9]}\\n')))
        [(1, {'history': [7, 8]}), (3, {'user_id': 3, 'history': [9]})]
    """
    number = 0
    try:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                request = json.loads(line)
                if "\\u" in line:
                    json.dumps(
                        request, ensure_ascii=False
                    ).encode()  # half a surrogate pair could not be written again
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON ({error.msg}): {line.strip()[:60]!r}") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is no JSON ({short(error)}): {line.strip()[:60]!r}") from None
            request = {"history": request} if isinstance(request, list) else request
            if not isinstance(request, dict) or not isinstance(request.get("history"), list):
                raise ValueError(
                    f'line {number} holds no history: write a list of item ids, or {{"history": [...]}}; got {line.strip()[:60]!r}'
                )
            yield number, request
    except UnicodeDecodeError as error:
        raise ValueError(
            f"after line {number} the histories are not UTF-8 ({error.reason}); write them as UTF-8"
        ) from None
