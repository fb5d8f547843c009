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

import numpy as np

from onerec_hf.cli.arguments import parse
from onerec_hf.modeling.files import short
from onerec_hf.workflows.artefact import load_model, load_processor
from onerec_hf.workflows.distributed import all_ranks, is_first, say

if TYPE_CHECKING:
    from onerec_hf.modeling.catalogue import ItemCatalogue


@dataclass
class RecommendArguments:
    """What is asked of the model."""

    model: str | None = field(default=None, metadata={"help": "A saved OneRec: folder or Hub id."})
    histories: str = field(
        default="-",
        metadata={
            "help": 'JSON lines: {"user_id": 1, "history": [ids, oldest first]} or a bare list of ids. "-" is stdin.'
        },
    )
    session_length: int = field(default=1, metadata={"help": "Items per session; 1 gives a ranked list of items."})
    top_k: int = field(default=10, metadata={"help": "Sessions (or items) per user, best first."})
    num_beams: int = field(default=50, metadata={"help": "Beams per user; top_k where that is more."})
    exclude_seen: bool = field(default=True, metadata={"help": "Leave out the items of the history."})
    unknown: str = field(
        default="error",
        metadata={
            "help": "Unknown items in a history: error, or skip (counted; a user without any known item gets an empty answer)."
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Users per batch."})


def main(argv: list[str]) -> None:
    (args,) = parse((RecommendArguments,), argv, "recommend")
    if args.model is None:
        raise ValueError("give --model: the folder or Hub id of a saved OneRec")
    if args.unknown not in ("error", "skip"):
        raise ValueError(f"--unknown is error or skip, not {args.unknown!r}")
    for option in ("session_length", "top_k", "num_beams", "batch_size"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option} must be at least 1; got {getattr(args, option)}")
    if args.histories != "-" and not os.path.isfile(args.histories):
        raise ValueError(f'--histories {args.histories}: no such file; name one, or "-" for stdin')
    import torch

    processor, model = load_processor("--model", args.model), load_model("--model", args.model).eval()
    if torch.accelerator.is_available():
        model.to(device=torch.accelerator.current_accelerator())  # pyright: ignore[reportCallIssue]
    catalogue = processor.catalogue
    assert catalogue is not None
    if args.session_length > catalogue.num_active:
        raise ValueError(
            f"--session_length {args.session_length}: the catalogue has only {catalogue.num_active} items"
        )
    ranks = all_ranks()
    left_out = np.zeros(2, dtype=np.int64)
    with model.packed_experts():
        for numbered in _batches(args, 1 if ranks is None else ranks.size):
            parts = []
            if ranks is None:
                parts = [_recommended(model, processor, numbered, args)]
            elif numbered := ranks.gather_objects(numbered)[0]:  # the first rank reads, every rank answers its share
                mine = numbered[ranks.share(len(numbered))]
                parts = ranks.gather_objects(_recommended(model, processor, mine, args))
            if not numbered:
                break
            for lines, unknown in parts:
                left_out += unknown
                for line in lines if is_first() else ():
                    print(line, flush=True)
    if left_out.any():
        say(
            f"left out {left_out[0]} items that are not in the catalogue; {left_out[1]} users without a known item got an empty answer"
        )


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


def _recommended(
    model: Any, processor: Any, numbered: list[tuple[int, dict[str, Any]]], args: RecommendArguments
) -> tuple[list[str], tuple[int, int]]:
    """The lines that answer a batch of requests; how many items were unknown, and how many users without a known one."""
    known = [
        known_items(processor.catalogue, number, request["history"], args.unknown, args.exclude_seen)
        for number, request in numbered
    ]
    histories = [items for items in known if items]
    answers: Iterator[dict[str, Any]] = iter(())
    if histories:
        out: Any = model.recommend(
            **processor(histories),
            session_length=args.session_length,
            num_beams=max(args.num_beams, args.top_k),
            num_return_sequences=args.top_k,
            exclude=histories if args.exclude_seen else None,
            return_dict_in_generate=True,
        )
        answers = _answers(processor.batch_decode(out), out.sequences_scores.tolist(), args)
    lines = []
    for (_, request), items in zip(numbered, known, strict=True):
        echoed = {key: value for key, value in request.items() if key != "history"}
        answer = next(answers) if items else next(_answers([[]] * args.top_k, [0.0] * args.top_k, args))
        lines.append(json.dumps(echoed | answer, ensure_ascii=False))
    skipped = sum(len(request["history"]) for _, request in numbered) - sum(map(len, known))
    return lines, (skipped, len(known) - len(histories))


def _answers(sessions: list[list], scores: list[float], args: RecommendArguments) -> Iterator[dict[str, Any]]:
    """Per user, what was found among the user's `top_k` beams; a beam that found no session is empty."""
    for start in range(0, len(sessions), args.top_k):
        mine = slice(start, start + args.top_k)
        found = [(session, score) for session, score in zip(sessions[mine], scores[mine], strict=True) if session]
        if args.session_length == 1:
            answer: dict[str, Any] = {"items": [session[0] for session, _ in found]}
        else:
            answer = {"sessions": [session for session, _ in found]}
        yield answer | {"scores": [round(score, 4) for _, score in found]}


def known_items(catalogue: ItemCatalogue, number: int, history: list, unknown: str, exclude_seen: bool) -> list:
    """
    The items of a history that the catalogue holds.

    Args:
        number: the line that the history stands in.
        unknown: "error" or "skip".
        exclude_seen: whether items of the history are to be left out of the answer.

    Raises:
        ValueError: ids of the wrong type, with "error" an unknown item or an empty history, or a history that leaves nothing to recommend.
    """
    try:
        rows = catalogue.rows(history, unknown="mask")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"line {number}: {short(error, 500)}") from None
    known = [item for item, row in zip(history, rows, strict=True) if row >= 0]
    if unknown == "error" and len(known) < len(history):
        examples = [item for item, row in zip(history, rows, strict=True) if row < 0][:3]
        raise ValueError(
            f"line {number}: {len(history) - len(known)} of {len(history)} items are not in the catalogue of {len(catalogue)} items, e.g. "
            f"{short(examples)}; pass --unknown skip to leave them out"
        )
    if unknown == "error" and not known:
        raise ValueError(
            f"line {number}: the history is empty, there is nothing to read; leave the line out, or pass --unknown skip for an empty answer"
        )
    seen = np.unique(rows[rows >= 0])
    if exclude_seen and catalogue.active[seen].sum() == catalogue.num_active:
        raise ValueError(
            f"line {number}: the history holds every item of the catalogue; pass --no_exclude_seen to recommend them again"
        )
    return known


@contextlib.contextmanager
def naming_file(path: str) -> Iterator[None]:
    """
    Errors inside begin with the file that the histories come from, unless that is stdin.

    Raises:
        ValueError: in place of one that does not name it.
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
    Requests of a JSON-lines stream: the number of the line and a dictionary with `history`; empty lines are passed over.

    Raises:
        ValueError: a line that is no JSON, or holds no history (its number and beginning).

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
