"""`onerec-hf recommend`: histories in (file or stdin, JSON lines), recommended items out (JSON lines)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TextIO

from onerec_hf.cli.arguments import parse


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
    num_beams: int = field(default=50, metadata={"help": "Beams per user; at least top_k."})
    exclude_seen: bool = field(default=True, metadata={"help": "Leave out the items of the history."})
    unknown: str = field(default="error", metadata={"help": "Unknown items in a history: error, or skip (counted)."})
    batch_size: int = field(default=32, metadata={"help": "Users per batch."})


def main(argv: list[str]) -> None:
    (args,) = parse((RecommendArguments,), argv, "recommend")
    if args.model is None:
        raise ValueError("give --model: the folder or Hub id of a saved OneRec")
    from transformers import AutoModelForSeq2SeqLM

    from onerec_hf.modeling.processing_onerec import OneRecProcessor

    processor = OneRecProcessor.from_pretrained(args.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model).eval()
    stream = sys.stdin if args.histories == "-" else open(args.histories, encoding="utf-8")  # noqa: SIM115 (stdin stays open)
    requests = read_requests(stream)
    while batch := list(islice(requests, args.batch_size)):
        histories = [request["history"] for request in batch]
        seen = [
            [item for item in history if processor.catalogue.rows([item], "mask")[0] >= 0] for history in histories
        ]
        out = model.recommend(
            **processor(histories, unknown=args.unknown),
            session_length=args.session_length,
            num_beams=max(args.num_beams, args.top_k),
            num_return_sequences=args.top_k,
            exclude=seen if args.exclude_seen else None,
            return_dict_in_generate=True,
        )
        sessions, scores = processor.batch_decode(out), out.sequences_scores.tolist()
        for i, request in enumerate(batch):
            mine = slice(i * args.top_k, (i + 1) * args.top_k)
            found = [(s, score) for s, score in zip(sessions[mine], scores[mine], strict=True) if s]
            answer = {key: value for key, value in request.items() if key != "history"}
            if args.session_length == 1:
                answer["items"] = [session[0] for session, _ in found]
            else:
                answer["sessions"] = [session for session, _ in found]
            answer["scores"] = [round(score, 4) for _, score in found]
            print(json.dumps(answer, ensure_ascii=False), flush=True)


def read_requests(stream: TextIO) -> Iterator[dict[str, Any]]:
    """
    Requests of a JSON-lines stream, as dictionaries with `history`; empty lines are passed over.

    Raises:
        ValueError: a line that is no JSON, or holds no history (its number and beginning).

    Example:
        >>> import io
        >>> list(read_requests(io.StringIO('[7, 8]\\n{"user_id": 3, "history": [9]}\\n')))
        [{'history': [7, 8]}, {'user_id': 3, 'history': [9]}]
    """
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is no JSON ({error.msg}): {line.strip()[:60]!r}") from None
        request = {"history": request} if isinstance(request, list) else request
        if not isinstance(request, dict) or not isinstance(request.get("history"), list):
            raise ValueError(
                f'line {number} holds no history: write a list of item ids, or {{"history": [...]}}; got {line.strip()[:60]!r}'
            )
        yield request
