"""
One path for a request. A [`Request`] holds item ids and options; a [`Recommender`] resolves it against the catalogue, searches a batch, and gives
an [`Answer`] with ids, scores and the items' fields. The pipeline, `onerec-hf recommend`, the server and the demo all call it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from .feature_codes import RequestFeatures, check_lifelong, check_schema, split_history
from .item_evidence import as_times
from .session_head import DECODINGS
from .top_candidates import top_candidates

if TYPE_CHECKING:
    from .catalogue import ItemCatalogue
    from .features import FeatureSchema

logger = logging.get_logger(__name__)

DEFAULT_BEAMS = 50
_COUNTS = ("top_k", "num_beams", "session_length", "max_history")
_NO_ITEMS = np.empty(0, dtype=np.int64)


def spell_argument(option: str, value: Any) -> str:
    """An option as Python spells it: `unknown="skip"`."""
    return f'{option}="{value}"' if isinstance(value, str) else f"{option}={value}"


class RequestError(ValueError):
    """
    A request that cannot be answered.

    Args:
        reason: what is wrong, and in which list of the request.
        fix: an option, its value, and what it does, where one helps.

    Example:
        >>> error = RequestError("the history is empty: there is nothing to read", ("unknown", "skip", "for an empty answer"))
        >>> str(error)
        'the history is empty: there is nothing to read; pass unknown="skip" for an empty answer'
        >>> error.message(lambda option, value: f"--{option} {value}")
        'the history is empty: there is nothing to read; pass --unknown skip for an empty answer'
    """

    def __init__(self, reason: str, fix: tuple[str, Any, str] | None = None):
        super().__init__(reason)
        self.reason, self.fix = reason, fix

    def message(self, spell: Callable[[str, Any], str] = spell_argument) -> str:
        """Reason and fix; `spell` writes an option and its value as the caller passes them."""
        if self.fix is None:
            return self.reason
        option, value, purpose = self.fix
        return f"{self.reason}; pass {spell(option, value)} {purpose}"

    def __str__(self) -> str:
        return self.message()


class UnknownItemError(RequestError, KeyError):
    """Items that the catalogue does not hold, where `unknown="error"`."""


class ItemIdTypeError(RequestError, TypeError):
    """Item ids of another type than the catalogue's."""


@dataclass(frozen=True, eq=False)
class Request:
    """
    One history and the options of its recommendation.

    Args:
        history: item ids, oldest first; or objects with an id under "item" and values of the interaction.
        exclude: more items to leave out.
        allow: the only items to choose from (a category, what is in stock); all when not given.
        top_k: items (or sessions) to return, best first.
        session_length: with 1, a ranked list of items; with more, sessions of so many items each.
        num_beams: beam width; 50, or `top_k` where that is more, when not given.
        exclude_seen: leave out all items of the history, those that are too old to be read as well.
        unknown: "skip" leaves out and counts ids that the catalogue does not hold, "error" raises.
        max_history: the latest items of the history that the model reads; the processor's when not given.
        diversity: penalty on items that the sessions share; 1 leaves hardly any.
        session_decoding: "beam", or "parallel" for sessions of a model with a session head in one pass.
        name: of the history in messages.
        candidates: items to rank: the answer has all of them, best first, those of the history too, with the model's exact scores. `top_k`,
            `num_beams` and `exclude_seen` do not count then.
        user: values of the user's features by column. Values that the model does not read, here and in the history, are left out.
        user_features, history_features: in place of values, codes of the model's schema, as datasets hold them in columns of these names.
        request_time: in the unit of the training table, for evidence of what was asked for lately: an answer as of then. Now when not given.

    Raises:
        RequestError: a count below 1, `top_k > num_beams`, a negative `diversity`, another value of `unknown`, or `candidates` beside `allow` or for
            sessions of several items.

    Example:
        >>> Request(["m4"], top_k=80).beams
        80
    """

    history: Any
    exclude: Any = None
    allow: Any = None
    top_k: int = 10
    session_length: int = 1
    num_beams: int | None = None
    exclude_seen: bool = True
    unknown: str = "skip"
    max_history: int | None = None
    diversity: float = 0.0
    session_decoding: str = "beam"
    name: str = "the history"
    candidates: Any = None
    user: Any = None
    user_features: Any = None
    history_features: Any = None
    request_time: float | None = None

    def __post_init__(self):
        for option in _COUNTS:
            value = getattr(self, option)
            if value is not None and value < 1:
                raise RequestError(f"{option} must be at least 1; got {value}")
        if not 0 <= self.diversity < math.inf:
            raise RequestError(f"diversity must be a finite number, at least 0; got {self.diversity}")
        if self.session_decoding not in DECODINGS:
            raise RequestError(f"session_decoding must be beam or parallel; got {self.session_decoding!r:.40}")
        if self.unknown not in ("skip", "error"):
            raise RequestError(f'unknown must be "skip" or "error"; got {self.unknown!r:.40}')
        if self.candidates is not None:
            if self.session_length > 1:
                raise RequestError(f"candidates are single items; got session_length={self.session_length}")
            if self.allow is not None:
                raise RequestError("candidates and allow both name the items to choose from; pass one of them")
        as_times([self.request_time])  # refuses what is no time
        if self.top_k > self.beams:
            raise RequestError(f"top_k={self.top_k} exceeds num_beams={self.num_beams}; raise num_beams")

    @property
    def beams(self) -> int:
        """The beam width."""
        return max(DEFAULT_BEAMS, self.top_k) if self.num_beams is None else self.num_beams


class BatchKind(NamedTuple):
    """The options shared by the requests of one search."""

    session_length: int
    num_beams: int
    has_allow: bool
    diversity: float = 0.0
    diverse_sessions: int = 0
    session_decoding: str = "beam"


@dataclass(frozen=True, eq=False)
class ResolvedRequest:
    """
    A request against a catalogue.

    Args:
        request: as it came.
        history: the ids that the model reads.
        exclude, allow: distinct item indices. With `allow`, the exclusions are taken from it already.
        candidates: active items that are left to choose from.
        ranks: whether `allow` holds candidates, all of which are ranked.
        length: ids of the history as it came.
        skipped: ids of the request that the catalogue does not hold.
        cut: whether the history is longer than what the model reads.
        features: of the user and of the history that the model reads, for a model with features.
    """

    request: Request
    history: list
    exclude: np.ndarray
    allow: np.ndarray | None
    candidates: int
    length: int
    skipped: int
    cut: bool
    ranks: bool = False
    features: RequestFeatures | None = None

    @property
    def count(self) -> int:
        """Items or sessions of the answer, at most."""
        return self.candidates if self.ranks else self.request.top_k

    @property
    def kind(self) -> BatchKind:
        """Requests of one kind are searched together."""
        request = self.request
        if self.ranks:  # a beam for each candidate: none is pruned. Similar numbers share a batch.
            return BatchKind(1, 1 << max(0, self.candidates - 1).bit_length(), has_allow=True)
        kind = BatchKind(
            request.session_length, request.beams, self.allow is not None, session_decoding=request.session_decoding
        )
        if request.diversity and min(request.session_length, request.top_k) > 1:
            # How many sessions are returned decides which.
            return kind._replace(diversity=request.diversity, diverse_sessions=request.top_k)
        return kind

    @property
    def is_answerable(self) -> bool:
        """Whether there is something to read, and enough to choose from."""
        return bool(self.history) and self.candidates >= self.request.session_length


@dataclass
class Answer:
    """
    The sessions of a request, best first; none where the request leaves nothing to read or to recommend.

    Args:
        request: what it answers.
        sessions: lists of item ids, at most `top_k`.
        scores: log-probabilities of the sessions.
        fields: per session, the fields of each item; None where the recommender has no items table.

    Example:
        >>> request = ResolvedRequest(Request(["m4"]), ["m4"], _NO_ITEMS, None, 2, 1, 0, False)
        >>> answer = Answer(request, [["m7"]], [-1.5], [[{"title": "Heat"}]])
        >>> answer.rows()
        [{'item': 'm7', 'score': -1.5, 'title': 'Heat'}]
        >>> answer.columns()
        {'items': ['m7'], 'scores': [-1.5], 'fields': [{'title': 'Heat'}]}
    """

    request: ResolvedRequest
    sessions: list[list] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    fields: list[list[dict]] | None = None

    def rows(self) -> list[dict[str, Any]]:
        """
        A dictionary per item: `item`, `score` and its fields. For longer sessions a dictionary per session: `items`, which holds such
        dictionaries without a score, and `score`.
        """
        fields = self.fields or [[{}] * len(session) for session in self.sessions]
        if self.request.request.session_length == 1:
            return [
                {"item": item, "score": score, **of_item}
                for (item,), score, (of_item,) in zip(self.sessions, self.scores, fields, strict=True)
            ]
        return [
            {
                "items": [{"item": item, **of_item} for item, of_item in zip(session, of_items, strict=True)],
                "score": score,
            }
            for session, score, of_items in zip(self.sessions, self.scores, fields, strict=True)
        ]

    def columns(self) -> dict[str, Any]:
        """Parallel lists: `items` (`sessions` where they are longer than one item), `scores`, and `fields` where there is an items table."""
        single = self.request.request.session_length == 1
        answer: dict[str, Any] = {
            "items" if single else "sessions": [session[0] if single else session for session in self.sessions],
            "scores": self.scores,
        }
        if self.fields is not None:
            answer["fields"] = [of_items[0] if single else of_items for of_items in self.fields]
        return answer


@dataclass
class AnswerCounts:
    """
    What was left out of many answers.

    Example:
        >>> counts = AnswerCounts()
        >>> counts.add(Answer(ResolvedRequest(Request([9]), [], _NO_ITEMS, None, 2, 1, skipped=1, cut=False)))
        >>> str(counts)
        'left out 1 items that are not in the catalogue; 1 of 1 histories hold no known item: an empty answer'
    """

    histories: int = 0
    skipped: int = 0
    empty: int = 0
    exhausted: int = 0
    cut: int = 0

    def add(self, answer: Answer) -> None:
        request = answer.request
        self.histories += 1
        self.skipped += request.skipped
        self.cut += request.cut
        self.empty += not request.history
        self.exhausted += bool(request.history) and not answer.sessions

    def __iadd__(self, other: AnswerCounts) -> AnswerCounts:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)
        return self

    def __str__(self) -> str:
        notes = {
            f"left out {self.skipped} items that are not in the catalogue": self.skipped,
            f"{self.empty} of {self.histories} histories hold no known item: an empty answer": self.empty,
            f"{self.exhausted} of {self.histories} histories leave nothing to recommend: an empty answer": self.exhausted,
            f"read only the latest items of {self.cut} of {self.histories} histories, which are longer than the model reads": self.cut,
        }
        return "; ".join(note for note, count in notes.items() if count)


class Recommender:
    """
    A model with its processor and the items' fields, for many requests.

    Args:
        model: a `OneRecForConditionalGeneration`, or one with a PEFT adapter around it.
        processor: a `OneRecProcessor` with the same catalogue.
        items: fields by item id, from [`item_metadata`] or [`saved_items`].

    Raises:
        ValueError: model and processor have different catalogues, or none.

    Example:
        >>> from onerec_hf import ItemCatalogue, OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor
        >>> catalogue = ItemCatalogue(["m4", "m17", "m256"], codes=[[0, 1], [1, 0], [1, 1]], codebook_sizes=[2, 2])
        >>> config = OneRecConfig(codebook_sizes=[2, 2], hidden_size=16, encoder_layers=1, decoder_layers=1, num_experts=2)
        >>> model = OneRecForConditionalGeneration(config).eval()
        >>> model.set_catalogue(catalogue)
        >>> recommender = Recommender(model, OneRecProcessor.from_catalogue(catalogue), {"m256": {"title": "Heat"}})
        >>> (answer,) = recommender.recommend([Request(["m4", "m9"], exclude=["m17"], top_k=5)])
        >>> answer.sessions, answer.fields, answer.request.skipped
        ([['m256']], [[{'title': 'Heat'}]], 1)
    """

    def __init__(self, model: Any, processor: Any, items: Mapping[Any, Mapping] | None = None):
        if model.catalogue is None or processor.catalogue is None:
            raise ValueError(
                f"the {'model' if model.catalogue is None else 'processor'} has no item catalogue (catalogue.safetensors); set one with "
                "set_catalogue(...)"
            )
        if model.catalogue.hash != processor.catalogue.hash:
            raise ValueError(
                f"the model has {model.catalogue}, the processor has {processor.catalogue}: set the same one on both, e.g. "
                "model.set_catalogue(processor.catalogue)"
            )
        check_schema(model.config, processor.features, processor.pathways)
        check_lifelong(model.config, processor.lifelong)
        self.model, self.processor, self.items = model, processor, items
        self.catalogue: ItemCatalogue = processor.catalogue

    @property
    def schema(self) -> FeatureSchema | None:
        """The features that the model reads."""
        return self.processor.features

    @property
    def max_history(self) -> int:
        """Items of a history that the model reads: as many as the processor keeps, or as the model has positions for."""
        config = self.model.config
        positions = config.max_position_embeddings // config.tokens_per_item - self.processor.static_places
        return self.processor.max_history or positions

    @property
    def reads_all(self) -> bool:
        """Whether the model reads what is older than its latest items too: it has a lifelong pathway."""
        return self.processor.lifelong is not None

    def cost(self, request: ResolvedRequest) -> int:
        """What the answer costs, in positions that are computed: of each beam's items, and of the history."""
        kind = request.kind
        return kind.num_beams * kind.session_length * (2 if kind.diversity else 1) + len(request.history)

    def held(self) -> AbstractContextManager:
        """What makes many calls faster while it is held: the model's experts stay packed."""
        return self.model.packed_experts()

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """The model's weights by name."""
        return self.model.named_parameters()

    def resolve(
        self,
        request: Request,
        exclude: np.ndarray = _NO_ITEMS,
        allow: np.ndarray | None = None,
        candidates: np.ndarray | None = None,
    ) -> ResolvedRequest:
        """
        The request against the catalogue.

        Args:
            exclude: item indices to leave out of all requests, on top of the request's.
            allow: item indices to choose from where the request has no `allow`.
            candidates: item indices to rank where the request has no `candidates`.

        Raises:
            RequestError: a value that is not a list, or invalid item ids. [`ItemIdTypeError`] for ids of another type than the
                catalogue's; with `unknown="error"` [`UnknownItemError`].
        """
        catalogue, name = self.catalogue, request.name
        if self.reads_all and request.max_history:
            raise RequestError("max_history: a model with a lifelong pathway reads its own; leave it out")
        keep = request.max_history or self.max_history
        if self.reads_all:  # what is beyond even this is counted like any other cut
            keep = self.processor.max_history + self.processor.lifelong.longest
        features = None
        try:
            ids, objects = split_history(request.history, name)
            history, skipped = known_indices(catalogue, ids, name, request.unknown)
            if self.schema is not None:
                features = RequestFeatures.of(self.schema, request, ids, objects, catalogue)
        except ValueError as error:
            raise error if isinstance(error, RequestError) else RequestError(f"{name}: {error}") from None
        length = len(history) + skipped
        if request.exclude is not None:
            more, unknown = known_indices(catalogue, request.exclude, f"exclude of {name}", request.unknown)
            exclude, skipped = np.concatenate([exclude, more]), skipped + unknown
        if request.allow is not None:
            allow, unknown = known_indices(catalogue, request.allow, f"allow of {name}", request.unknown)
            skipped += unknown
        if request.candidates is not None:
            candidates, unknown = known_indices(
                catalogue, request.candidates, f"candidates of {name}", request.unknown
            )
            skipped += unknown
        if ranks := candidates is not None:
            allow = candidates
        if request.exclude_seen and not ranks:
            # Interactions that were not positive may be recommended, as in evaluation.
            had = history if features is None else history[self.schema.are_positive(features.history)]
            exclude = np.concatenate([exclude, had])
        exclude = np.unique(exclude)
        if allow is None:
            left = catalogue.num_left(exclude)
        else:
            allow, exclude = np.setdiff1d(allow, exclude), _NO_ITEMS
            left = int(catalogue.active[allow].sum())
        latest = catalogue.ids(history if keep is None else history[-keep:])
        cut = len(latest) < len(history)
        read = None if features is None else features.latest(keep)
        return ResolvedRequest(request, latest, exclude, allow, left, length, skipped, cut, ranks, read)

    def problem(self, resolved: ResolvedRequest) -> RequestError | None:
        """Why the answer is empty; None where it need not be."""
        request, name = resolved.request, resolved.request.name
        if not resolved.history:
            reason = "holds no item of the catalogue" if resolved.length else "is empty"
            return RequestError(
                f"{name} {reason}: there is nothing to read", ("unknown", "skip", "for an empty answer")
            )
        if resolved.ranks and not resolved.candidates:
            return RequestError(
                f"{name}: none of the candidates is left to rank: they are unknown, retired or excluded"
            )
        if resolved.candidates < request.session_length:
            seen = ("exclude_seen", False, "to recommend items of the history again") if request.exclude_seen else None
            return RequestError(
                f"{name}: its exclusions and allow list leave {resolved.candidates} of {self.catalogue.num_active} items, too few for a "
                f"session of {request.session_length}",
                seen,
            )
        return None

    def similar_items(self, item_ids: Sequence, top_k: int = 10) -> list[list[dict[str, Any]]]:
        """
        The most similar active items of each item, by the cosine of their vectors ([`item_vectors`]); the item itself is left out.

        Returns:
            Per item, dictionaries with `item`, `score` and the item's fields, best first.

        Raises:
            RequestError: an id that the catalogue does not hold, ids of the other type, or `top_k` below 1.
        """
        if top_k < 1:
            raise RequestError(f"top_k must be at least 1; got {top_k}")
        rows, _ = known_indices(self.catalogue, item_ids, "similar_to", "error")
        vectors, answers = self.unit_vectors(), []
        for row in rows.tolist():
            ids, scores = self.most_similar(row, top_k, vectors)
            fields = [{} if self.items is None else dict(self.items.get(item, {})) for item in ids]
            answers.append(
                [{"item": item, "score": score, **of} for item, score, of in zip(ids, scores, fields, strict=True)]
            )
        return answers

    def check_vectors(self) -> None:
        """
        Raises:
            RequestError: the model has no vectors of items.
        """

    def unit_vectors(self) -> torch.Tensor:
        """(items, width) float32: [`item_vectors`] of length 1, for [`most_similar`]."""
        return torch.nn.functional.normalize(self.item_vectors().float(), dim=1)

    def most_similar(self, row: int, top_k: int, vectors: torch.Tensor) -> tuple[list, list[float]]:
        """
        Ids and cosines of the active items most similar to the item of a row, best first, without itself.

        Args:
            vectors: from [`unit_vectors`].
        """
        active = torch.from_numpy(np.array(self.catalogue.active)).to(vectors.device)
        scores = (vectors @ vectors[row]).masked_fill_(~active, -math.inf)
        scores[row] = -math.inf
        found, places = top_candidates(scores[None], top_k)
        kept = found[0].isfinite()
        return self.catalogue.ids(places[0][kept].cpu().numpy()), found[0][kept].tolist()

    @torch.no_grad()
    def item_vectors(self) -> torch.Tensor:
        """
        (items, width) vectors of the catalogue's items, in its order, to compare items by: those that the item head scores by (vectors, content and
        codes, as far as it has them); without such a head the sums of the embeddings of their codes, which the encoder reads.
        """
        config, encoder = self.model.config, self.model.get_encoder()
        tokens = torch.tensor(self.catalogue.codes, dtype=torch.long) + torch.tensor(config.level_offsets)
        tokens = tokens.to(self.model.device)
        if config.item_head is not None and config.item_head.loss_weight:
            return encoder.item_head.output_vectors(encoder.embed_tokens, tokens)
        return encoder.embed_tokens(tokens).sum(1)

    def recommend(self, requests: Iterable[Request]) -> list[Answer]:
        """One answer per request, in order; raises as [`resolve`] and [`answer`] do."""
        return self.answer([self.resolve(request) for request in requests])

    def answer(self, requests: Sequence[ResolvedRequest]) -> list[Answer]:
        """
        One answer per request, in order. Requests of one kind are searched as one batch.

        Raises:
            ValueError: scores that are not finite.
        """
        batches: dict[BatchKind, list[int]] = defaultdict(list)
        answers = [Answer(request, fields=None if self.items is None else []) for request in requests]
        for place, request in enumerate(requests):
            if request.is_answerable:
                batches[request.kind].append(place)
        for kind, places in batches.items():
            found = self.search(kind, [requests[place] for place in places])
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
        return answers

    def search(self, kind: BatchKind, requests: Sequence[ResolvedRequest]) -> list[Answer]:
        """As [`answer`], for requests of one kind that are answerable: one batch."""
        most = max(resolved.count for resolved in requests)
        histories = [resolved.history for resolved in requests]  # cut already, but for what a lifelong pathway reads
        features = RequestFeatures.columns([resolved.features for resolved in requests])
        output: Any = self.model.recommend(
            **self.processor(histories, max_history=None if self.reads_all else max(map(len, histories)), **features),
            session_length=kind.session_length,
            num_beams=kind.num_beams,
            num_return_sequences=most,
            session_decoding=kind.session_decoding,
            diversity=kind.diversity,
            request_times=as_times([resolved.request.request_time for resolved in requests]),
            exclude=_padded([resolved.exclude for resolved in requests]),
            allow=_padded([resolved.allow for resolved in requests if resolved.allow is not None]),
            return_dict_in_generate=True,
        )
        sessions, scores = self.processor.batch_decode(output), output.sequences_scores.tolist()
        answers = []
        for place, resolved in enumerate(requests):
            mine = slice(place * most, place * most + resolved.count)
            # A beam that found no session is empty.
            found = [pair for pair in zip(sessions[mine], scores[mine], strict=True) if pair[0]]
            answer = Answer(resolved, [session for session, _ in found], [score for _, score in found])
            if not all(map(math.isfinite, answer.scores)):
                raise ValueError("the model's scores are not finite numbers: its weights are damaged")
            if self.items is not None:
                answer.fields = [[dict(self.items.get(item, {})) for item in session] for session in answer.sessions]
            answers.append(answer)
        return answers


def _padded(lists: list[np.ndarray]) -> torch.Tensor | None:
    """(users, longest) int64 item indices, padded with -1; None without any."""
    if not any(map(len, lists)):
        return None
    return torch.nn.utils.rnn.pad_sequence(list(map(torch.from_numpy, lists)), batch_first=True, padding_value=-1)


def known_indices(catalogue: ItemCatalogue, ids: Any, name: str, unknown: str) -> tuple[np.ndarray, int]:
    """
    Item indices of those of `ids` that the catalogue holds, in order, and how many it does not hold.

    Args:
        name: of the list, which messages begin with.
        unknown: "skip" or "error".

    Raises:
        RequestError: as [`Recommender.resolve`].
    """
    if not isinstance(ids, Iterable) or isinstance(ids, str | bytes | Mapping):
        raise RequestError(f'{name} must be a list of item ids, e.g. ["m17", "m4"]; got {ids!r:.60}')
    ids = ids if isinstance(ids, list | np.ndarray | torch.Tensor) else list(ids)
    try:
        rows = catalogue.indices(ids, unknown="mask")
    except TypeError as error:
        raise ItemIdTypeError(f"{name}: {error!s:.200}") from None
    except ValueError as error:
        raise RequestError(f"{name}: {error!s:.200}") from None
    missing = np.flatnonzero(rows < 0)
    if len(missing) and unknown == "error":
        examples = [_plain(ids[place]) for place in missing[:3].tolist()]
        raise UnknownItemError(
            f"{name}: {len(missing)} of {len(rows)} items are not in the catalogue of {len(catalogue)} items, e.g. {examples!s:.100}",
            ("unknown", "skip", "to leave them out"),
        )
    return (rows[rows >= 0] if len(missing) else rows), len(missing)


def item_metadata(items: Any, catalogue: ItemCatalogue) -> dict[Any, dict]:
    """
    The items' fields by item id.

    Args:
        items: a mapping from ids to titles or to dictionaries of fields, or a table with a column `item_id` (see
            [`GenerativeRecommendationPipeline`]). Empty values (`None`, NaN) are left out.
        catalogue: the one that holds the ids.

    Raises:
        ValueError: no column `item_id`, a field named "item", "items" or "score", or no item of the catalogue.
        TypeError: ids of another type than the catalogue's.

    Example:
        >>> from onerec_hf import ItemCatalogue
        >>> catalogue = ItemCatalogue([7, 8], codes=[[0, 1], [1, 0]], codebook_sizes=[2, 2])
        >>> item_metadata({"item_id": [7, 8], "title": ["Heat", "Alien"], "year": [1995, None]}, catalogue)
        {7: {'title': 'Heat', 'year': 1995}, 8: {'title': 'Alien'}}
    """
    try:
        # By item, of a mapping or a Series; or by column, of a dictionary of columns or a DataFrame.
        table = dict(items.items())
    except AttributeError:
        rows = list(items) if isinstance(items, Iterable) else [items]
        if not all(isinstance(row, Mapping) and "item_id" in row for row in rows):
            raise ValueError(
                f'items must be a mapping, or a table with a column "item_id"; got {items!r:.60}'
            ) from None
        fields_of = {row["item_id"]: {name: row[name] for name in row if name != "item_id"} for row in rows}
    else:
        if "item_id" in table:
            ids = table.pop("item_id")
            columns = zip(*table.values(), strict=True) if table else ((),) * len(ids)
            fields_of = {item: dict(zip(table, row, strict=True)) for item, row in zip(ids, columns, strict=True)}
        else:
            fields_of = {
                item: fields if isinstance(fields, Mapping) else {"title": fields} for item, fields in table.items()
            }
    taken = RESERVED_FIELDS & {name for fields in fields_of.values() for name in fields}
    if taken:
        raise ValueError(f"items has a field {min(taken)!r}, which answers have themselves; rename it")
    rows, _ = known_indices(catalogue, list(fields_of), "items", "skip")
    if not len(rows):
        raise ValueError(
            f"items: none of {len(fields_of)} ids is in the catalogue of {len(catalogue)} items, e.g. {next(iter(fields_of), None)!r}; "
            'a table needs a column "item_id"'
        )
    return {
        item: {name: _plain(value) for name, value in fields.items() if not _is_empty(value)}
        for item, fields in fields_of.items()
    }


#: Keys of answers that fields may not use.
RESERVED_FIELDS = frozenset({"item", "items", "score"})


def _plain(value):
    return value.item() if isinstance(value, np.generic | torch.Tensor) else value


def _is_empty(value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


__all__ = [
    "DEFAULT_BEAMS",
    "RESERVED_FIELDS",
    "Answer",
    "AnswerCounts",
    "BatchKind",
    "ItemIdTypeError",
    "Recommender",
    "Request",
    "RequestError",
    "ResolvedRequest",
    "UnknownItemError",
    "item_metadata",
    "known_indices",
    "spell_argument",
]
