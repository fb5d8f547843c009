"""`onerec-hf recommend`: histories in (file, stdin or a table of interactions), recommended, ranked or similar items out."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TextIO

from onerec_hf.cli.arguments import ShownItemArguments, parse, parse_given
from onerec_hf.cli.recommend_inputs import Candidates, check_output, read_ids, table_requests, typed_ids, write_answers
from onerec_hf.modeling.feature_codes import FEATURE_COLUMNS
from onerec_hf.modeling.files import short
from onerec_hf.workflows.artefact import ITEMS_NAME, check_dtype, load_recommender, model_type
from onerec_hf.workflows.data_options import excludes_seen, read_data_options
from onerec_hf.workflows.distributed import all_ranks, is_first, say
from onerec_hf.workflows.new_items import check_choice, with_new_items
from onerec_hf.workflows.settings import DtypeSettings

if TYPE_CHECKING:
    from onerec_hf.modeling.features import FeatureSchema
    from onerec_hf.modeling.requests import AnswerCounts, Recommender, ResolvedRequest

_LISTS = ("history", "exclude", "allow", "candidates")


@dataclass
class RecommendArguments(DtypeSettings, ShownItemArguments):
    """The model, the histories and the options of a recommendation."""

    model: str | None = field(
        default=None,
        metadata={"help": "A saved OneRec, SASRec, HSTU, GRU4Rec, ACVAE, popularity or item-kNN: folder or Hub id."},
    )
    histories: str = field(
        default="-",
        metadata={
            "help": 'JSON lines: {"user_id": 1, "history": [ids, oldest first]}, optionally with "exclude", "allow", "candidates" and "user" ({"age": 31}), or a bare list of ids; an id may be an object ({"item": 7, "like": true}). "-" is stdin.'
        },
    )
    interactions: str | None = field(
        default=None,
        metadata={
            "help": "In place of histories, a table of interactions: recommend for its users, without what they have seen."
        },
    )
    users: list[str] | None = field(
        default=None, metadata={"help": "With --interactions: only these users; all by default."}
    )
    users_file: str | None = field(
        default=None,
        metadata={
            "help": "With --interactions and a model with features of users: the table of users with these columns; users without a row are counted."
        },
    )
    user_column: str | None = field(
        default=None, metadata={"help": "Name of the user column; that of the model's training by default."}
    )
    timestamp_column: str | None = field(
        default=None, metadata={"help": "Name of the time column; that of the model's training by default."}
    )
    column_names: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the columns of --interactions, a text file without a header, in order."},
    )
    positive: list[str] | None = field(
        default=None,
        metadata={
            "help": "With --interactions: rows of the histories, e.g. 'rating>=4'; as in the model's training by default."
        },
    )
    similar_to: list[str] | None = field(
        default=None, metadata={"help": "In place of histories, items: the most similar items of each."}
    )
    candidates: str | None = field(
        default=None,
        metadata={
            "help": "File of items to rank, all of them, with exact scores: an id per line, or a table with an item column (and a user column for candidates by user)."
        },
    )
    allow: list[str] | None = field(
        default=None,
        metadata={"help": "The only items to recommend, for all histories: ids, or one file of them."},
    )
    session_length: int = field(default=1, metadata={"help": "Items per session; 1 returns a ranked list of items."})
    top_k: int = field(default=10, metadata={"help": "Sessions (or items) per user, best first."})
    num_beams: int = field(default=50, metadata={"help": "Beam width; raised to top_k if smaller."})
    session_decoding: str = field(
        default="beam",
        metadata={"help": "beam, or parallel: sessions in one pass, by the session head that `session-head` trained."},
    )
    diversity: float = field(
        default=0.0,
        metadata={"help": "Penalty on items that a user's sessions share; with 1 they share hardly any."},
    )
    exclude_seen: bool = field(
        default=True,
        metadata={"help": "Leave out the items of the history; by default as in the model's training."},
    )
    unknown: str | None = field(
        default=None,
        metadata={
            "help": "Unknown items in a history: error, or skip (counted; a user without any known item, or to whom nothing is left to recommend, gets an empty answer). By default error, and skip with --interactions."
        },
    )
    new_items: str | None = field(
        default=None,
        metadata={
            "help": "Items of --items and --interactions that the model does not hold: add (to a copy of the model, without training), or skip and error as in --unknown."
        },
    )
    output_file: str | None = field(
        default=None,
        metadata={
            "help": "Write a table (.csv, .tsv, .parquet) with a row per item, or .jsonl, in place of printing."
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Users per batch."})

    def options(self) -> dict[str, Any]:
        """The options of every request, by the names of [`~onerec_hf.modeling.requests.Request`]."""
        names = ("top_k", "session_length", "exclude_seen", "diversity", "session_decoding")
        options = {name: getattr(self, name) for name in names} | {"num_beams": max(self.num_beams, self.top_k)}
        return options | {"unknown": self.unknown or "error"}


def main(argv: list[str]) -> None:
    (args,) = parse((RecommendArguments,), argv, "recommend")
    _check(args, parse_given((RecommendArguments,), argv, "recommend"))
    assert args.model is not None
    columns = _columns(args)
    with contextlib.ExitStack() as stack:
        place = args.model
        if args.new_items == "add":
            place = stack.enter_context(
                with_new_items(
                    args.model,
                    args.items,
                    args.interactions,
                    **columns,
                    positive=args.positive,
                    item_column_names=args.item_column_names,
                )
            )
            if os.path.isfile(os.path.join(place, ITEMS_NAME)):  # holds the fields of known items too
                args.items = None
        recommender = load_recommender("--model", place, args.load, args.dtype)
        if args.session_length > recommender.catalogue.num_active:
            raise ValueError(
                f"--session_length {args.session_length}: the catalogue has only {recommender.catalogue.num_active} items"
            )
        stack.enter_context(recommender.held())
        answers: list[str] = []
        write = print if args.output_file is None else lambda line, flush: answers.append(line)
        if args.similar_to is not None:
            for line in _similar_lines(recommender, args) if is_first() else ():
                write(line, flush=True)
        else:
            _recommend(recommender, args, columns, write)
        if args.output_file is not None and is_first():
            write_answers(args.output_file, [json.loads(line) for line in answers])
            say(f"wrote {args.output_file}: {len(answers):,} answers")


def _check(args: RecommendArguments, given: dict[str, Any]) -> None:
    """Checks the options against each other, and fills in the defaults that depend on others or on the model."""
    from onerec_hf.baselines.requests import ITEM_MODEL_TYPES
    from onerec_hf.modeling.requests import Request, RequestError

    if args.model is None:
        raise ValueError("pass --model: the folder or Hub id of a saved OneRec")
    for option in ("top_k", "num_beams", "batch_size"):  # of num_beams the request sees the larger one of both
        if getattr(args, option) < 1:
            raise ValueError(f"--{option} must be at least 1; got {getattr(args, option)}")
    sources = [name for name in ("histories", "interactions", "similar_to") if name in given]
    if len(sources) > 1:
        raise ValueError(f"--{sources[0]} and --{sources[1]} both say what to recommend for: pass one of them")
    if args.users is not None and args.interactions is None:
        raise ValueError("--users goes with --interactions, a table that holds their interactions")
    if args.users_file is not None and args.interactions is None:
        raise ValueError('--users_file goes with --interactions; a line of --histories has "user": {"age": 31}')
    if args.similar_to is not None and (args.candidates or args.allow):
        raise ValueError("--similar_to looks among all items: leave out --candidates and --allow")
    if args.candidates is not None and args.allow is not None:
        raise ValueError("--candidates and --allow both name the items to choose from: pass one of them")
    if args.candidates is not None and args.session_length > 1:
        raise ValueError(f"--candidates ranks single items: leave out --session_length {args.session_length}")
    if args.session_decoding != "beam":
        if args.candidates is not None:
            raise ValueError(f"--candidates ranks single items: leave out --session_decoding {args.session_decoding}")
        if (kind := model_type(args.model)) in ITEM_MODEL_TYPES:
            raise ValueError(
                f"--session_decoding is for OneRec generators, and {args.model} holds a {kind}; leave it out"
            )
    if args.histories != "-" and not os.path.isfile(args.histories):
        raise ValueError(f'--histories {args.histories}: no such file; name one, or "-" for stdin')
    check_choice(args.new_items)
    check_dtype(args.dtype, args.model)
    if args.new_items == "add" and args.items is None and args.interactions is None:
        raise ValueError("--new_items add needs --items, a table of the new items")
    if args.new_items in ("skip", "error"):
        if args.unknown not in (None, args.new_items):
            raise ValueError(
                f"--new_items {args.new_items} and --unknown {args.unknown} contradict each other: pass one of them"
            )
        args.unknown = args.new_items
    if args.unknown is None:
        args.unknown = "error" if args.interactions is None else "skip"
    if args.output_file is not None:
        check_output(args.output_file)
    if "exclude_seen" not in given:
        args.exclude_seen = excludes_seen("--model", args.model)
    try:
        Request([], **args.options())
    except RequestError as error:
        raise ValueError(f"--{error}") from None


def _columns(args: RecommendArguments) -> dict[str, Any]:
    """How the table of interactions is read: names of the columns, by default those of the model's training; with its rules of positive feedback where none are given."""
    assert args.model is not None
    trained = read_data_options("--model", args.model)
    if args.positive is None:
        args.positive = trained.get("positive")
    columns = {"user_column": "user_id", "item_column": "item_id", "timestamp_column": "timestamp"}
    columns = {name: getattr(args, name) or trained.get(name, default) for name, default in columns.items()}
    return {**columns, "column_names": args.column_names}


def _recommend(recommender: Recommender, args: RecommendArguments, columns: dict[str, Any], write: Callable) -> None:
    """Answers histories, or the users of a table."""
    from onerec_hf.modeling.requests import AnswerCounts

    ranks, counts = all_ranks(), AnswerCounts()
    shared = _shared_lists(recommender, args, columns)
    for numbered in _batches(args, columns, 1 if ranks is None else ranks.size, recommender.schema):
        parts = []
        if ranks is None:
            parts = [answer_lines(recommender, numbered, args, shared)]
        elif numbered := ranks.gather_objects(numbered)[0]:  # the first rank reads, every rank answers its share
            mine = numbered[ranks.share(len(numbered))]
            parts = ranks.gather_objects(answer_lines(recommender, mine, args, shared))
        if not numbered:
            break
        for lines, of_part in parts:
            counts += of_part
            for line in lines if is_first() else ():
                write(line, flush=True)
    if note := str(counts):
        say(note)


@dataclass(frozen=True, eq=False)
class SharedLists:
    """
    Lists of items for all histories.

    Args:
        rows: item indices by the arguments of [`~onerec_hf.modeling.requests.Recommender.resolve`].
        candidates: candidates by user.
    """

    rows: dict[str, Any] = field(default_factory=dict)
    candidates: Candidates | None = None


def _shared_lists(recommender: Recommender, args: RecommendArguments, columns: dict[str, Any]) -> SharedLists:
    """The lists of `--allow` and `--candidates`; unknown items in them are counted, or an error."""
    import numpy as np

    from onerec_hf.modeling.requests import RequestError, known_indices

    catalogue, candidates = recommender.catalogue, None
    lists: dict[str, list] = {}
    if args.allow is not None:
        lists["allow"] = read_ids(args.allow, catalogue.id_type, "--allow", columns["item_column"])
    if args.candidates is not None:
        candidates = Candidates.read(
            args.candidates, catalogue.id_type, columns["item_column"], columns["user_column"]
        )
        if candidates.shared is not None:
            lists["candidates"] = candidates.shared
    rows = {}
    for name, ids in lists.items():
        assert args.unknown is not None
        try:
            known, skipped = known_indices(catalogue, ids, f"--{name}", args.unknown)
        except RequestError as error:
            raise ValueError(error.message(_spell_option)) from None
        if not len(known):
            raise ValueError(f"--{name}: none of {len(ids):,} items is in the catalogue of {len(catalogue):,}")
        if skipped:
            say(f"--{name}: left out {skipped:,} of {len(ids):,} items that are not in the catalogue")
        rows[name] = np.unique(known)
    return SharedLists(rows, candidates)


def _similar_lines(recommender: Recommender, args: RecommendArguments) -> Iterator[str]:
    """A line per item of `--similar_to`."""
    from onerec_hf.modeling.requests import RequestError

    assert args.similar_to is not None
    ids = typed_ids(args.similar_to, recommender.catalogue.id_type, "--similar_to")
    try:
        found = recommender.similar_items(ids, args.top_k)
    except RequestError as error:
        raise ValueError(f"--{error.reason}") from None
    for item, similar in zip(ids, found, strict=True):
        columns = {
            "items": [row.pop("item") for row in similar],
            "scores": [round(row.pop("score"), 4) for row in similar],
        }
        if recommender.items is not None:
            columns["fields"] = similar
        yield json.dumps({"similar_to": item, **columns}, ensure_ascii=False)


def _batches(
    args: RecommendArguments, columns: dict[str, Any], batches: int, schema: FeatureSchema | None = None
) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Numbered requests, `batches` batches at a time, and an empty list at the end; on other ranks than the first nothing but such lists."""
    while not is_first():
        yield []
    with contextlib.ExitStack() as stack:
        if args.interactions is not None:
            whole = read_data_options("--model", args.model or "").get("history_feedback") == "all"
            requests = table_requests(
                args.interactions, args.users, columns, args.positive or (), args.exclude_seen, schema, whole,
                args.users_file,
            )  # fmt: skip
        elif args.histories == "-":
            requests = read_requests(sys.stdin)
        else:
            requests = read_requests(stack.enter_context(open(args.histories, encoding="utf-8-sig")))
        while numbered := list(islice(requests, batches * args.batch_size)):
            yield numbered
    yield []


def answer_lines(
    recommender: Recommender,
    numbered: list[tuple[int, dict[str, Any]]],
    args: RecommendArguments,
    shared: SharedLists | None = None,
) -> tuple[list[str], AnswerCounts]:
    """
    The lines that answer a batch of requests, and what was left out of them.

    Args:
        numbered: line numbers and requests, from `read_requests`.
        shared: lists of items for all of them.

    Raises:
        ValueError: as `resolve_line`.
    """
    from onerec_hf.modeling.requests import AnswerCounts

    resolved = [resolve_line(recommender, number, request, args, shared) for number, request in numbered]
    lines, counts = [], AnswerCounts()
    for (_, request), answer in zip(numbered, recommender.answer(resolved), strict=True):
        counts.add(answer)
        answer.scores = [round(score, 4) for score in answer.scores]
        echoed = {key: value for key, value in request.items() if key not in (*_LISTS, *FEATURE_COLUMNS)}
        lines.append(json.dumps(echoed | answer.columns(), ensure_ascii=False))
    return lines, counts


def resolve_line(
    recommender: Recommender,
    number: int,
    request: dict[str, Any],
    args: RecommendArguments,
    shared: SharedLists | None = None,
) -> ResolvedRequest:
    """
    A line's request against the catalogue.

    Raises:
        ValueError: ids of the wrong type; with `--unknown error` an unknown item, an empty history, or a request that leaves nothing to
            recommend. The message names the line.
    """
    from onerec_hf.modeling.requests import Request, RequestError

    shared, lists = shared or SharedLists(), {key: request.get(key) for key in (*_LISTS, "user", *FEATURE_COLUMNS)}
    if shared.candidates is not None and (of_user := shared.candidates.of(request, number)) is not None:
        lists["candidates"] = of_user
    try:
        resolved = recommender.resolve(Request(**lists, **args.options()), **shared.rows)
        problem = recommender.problem(resolved)
        if problem and args.unknown != "skip" and not (resolved.candidates and resolved.history):
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
