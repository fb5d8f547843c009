"""The pipeline "generative-recommendation": histories of item ids in, ranked items or whole sessions out, with scores and titles."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import Pipeline

from .requests import item_metadata, known_rows

if TYPE_CHECKING:
    from .catalogue import ItemCatalogue

_DEFAULT_BEAMS = 50
_NO_ROWS = np.empty(0, dtype=np.int64)


@dataclass
class _Numbered:
    """What the caller gave, and its place among what was given; a lone one has none."""

    number: int | None
    history: Any

    @property
    def name(self) -> str:
        return "the history" if self.number is None else f"history number {self.number}"


@dataclass
class _Request:
    """
    A history as the model reads it. `exclude` and `allow` are distinct catalogue rows; with `allow`, the exclusions are taken from it
    already.
    """

    history: list
    exclude: np.ndarray
    allow: np.ndarray | None
    candidates: int
    skipped: int
    cut: bool


@dataclass
class _Answer:
    """The beams of a request, best first, and then what the caller gets to see of them."""

    request: _Request
    sessions: list[list] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    result: list[dict] = field(default_factory=list)


class _NumberedDataset(Dataset):
    """A map-style dataset of histories, each with its number."""

    def __init__(self, histories):
        self.histories = histories

    def __len__(self):
        return len(self.histories)

    def __getitem__(self, number):
        return _Numbered(number, self.histories[number])


class GenerativeRecommendationPipeline(Pipeline):
    """
    `pipeline("generative-recommendation", model=...)`: beam search over the catalogue by `model.recommend()`, with the repository's
    processor. Every option may be given here, for all calls, or to a call.

    Args:
        top_k (`int`, defaults to 10): items (or sessions) per history, best first.
        num_beams (`int`, *optional*): beams per history; 50, or `top_k` where that is more, when not given.
        session_length (`int`, defaults to 1): with 1, a ranked list of items; with more, sessions of so many items each.
        exclude_seen (`bool`, defaults to `True`): leave out all items of the history, those that are too old to be read as well.
        exclude (list of item ids, *optional*): more items to leave out, for all histories.
        allow (list of item ids, *optional*): the only items to choose from (a category, what is in stock), for all histories.
        unknown ("skip" or "error", defaults to "skip"): what becomes of ids that the catalogue lacks, and of histories without any
            item. They are skipped, a history without a known item getting an empty answer, and one warning at the end counts them; or
            they raise.
        max_history (`int`, *optional*): the latest items of a history that the model reads, the processor's own when not given.
        items (*optional*): what to tell about an item beside its id: a mapping from ids to titles or to dictionaries of fields, or a
            table with a column `item_id` (a DataFrame, a `datasets.Dataset`, columns, or rows).

    Raises:
        ValueError: model and processor have different catalogues, or none; `top_k > num_beams`; `items` that belong to another
            catalogue; ids or histories of the wrong kind (TypeError for ids), and with `unknown="error"` empty histories.
        KeyError: with `unknown="error"`, an unknown item.

    Example:
        >>> import torch
        >>> from transformers import pipeline
        >>> from onerec_hf import ItemCatalogue, OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor
        >>> catalogue = ItemCatalogue(["m4", "m17", "m256"], codes=[[0, 1], [1, 0], [1, 1]], codebook_sizes=[2, 2])
        >>> config = OneRecConfig(codebook_sizes=[2, 2], hidden_size=16, encoder_layers=1, decoder_layers=1, num_experts=2)
        >>> model = OneRecForConditionalGeneration(config)
        >>> model.set_catalogue(catalogue)
        >>> processor = OneRecProcessor.from_catalogue(catalogue, max_history=20)
        >>> recommender = pipeline(
        ...     "generative-recommendation", model=model, processor=processor, items={"m256": "Heat"}, device="cpu"
        ... )
        >>> (best,) = recommender(["m4", "m17"])
        >>> best["item"], best["title"], best["score"] < 0
        ('m256', 'Heat', True)
        >>> [len(items) for items in recommender([["m4"], ["m4", "m256"]], exclude_seen=False, top_k=2)]
        [2, 2]
    """

    model: Any  # a OneRecForConditionalGeneration, or one with a PEFT adapter around it
    processor: Any  # a OneRecProcessor

    _load_processor = True
    _load_tokenizer = False  # the processor's
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _preprocess_params: dict[str, Any] = {}  # what was said when the pipeline was made, once it is

    def __call__(self, histories, **kwargs):
        """
        Recommends.

        Args:
            histories: one history, oldest item first; or a list of histories; or a dataset, generator or other iterable of them. A
                history is a list of item ids, or a dictionary with one under "history" and, for it alone, lists of item ids under
                "exclude" (on top of the option's) and "allow" (in place of it); other keys are ignored, so that a `datasets.Dataset`
                with a column `history` can be given as it is.
            kwargs: the class's options, and `batch_size` (1 by default) and `num_workers` of transformers' pipelines.

        Returns:
            For a history the list `[{"item": id, "score": s, **fields}, ...]`, best first; with `session_length > 1` the list
            `[{"items": [{"item": id, **fields}, ...], "score": s}, ...]`. A list of histories gives a list of such lists; a dataset or
            an iterable gives an iterator that computes as it is read. Scores are log-probabilities of items or sessions. There are
            fewer than `top_k` where fewer are legal.
        """
        if isinstance(histories, np.ndarray | torch.Tensor):
            histories = histories.tolist()
        if isinstance(histories, list | tuple):
            if not histories:
                return []
            if _is_history(histories[0]):
                numbered = [_Numbered(number, history) for number, history in enumerate(histories)]
                with self.model.packed_experts():
                    return list(_told(self._run(numbered, **kwargs)))
        elif isinstance(histories, Dataset) and not isinstance(histories, IterableDataset):
            return self._stream(self._run(_NumberedDataset(histories), **kwargs))
        elif isinstance(histories, Iterable) and not isinstance(histories, str | Mapping):
            numbered = (_Numbered(number, history) for number, history in enumerate(histories))
            return self._stream(self._run(numbered, **kwargs))
        (result,) = _told([self._run(_Numbered(None, histories), **kwargs)])
        return result

    def _run(self, numbered, **kwargs) -> Any:
        return super().__call__(numbered, **kwargs)

    def _stream(self, answers: Iterable[_Answer]) -> Iterator[list[dict]]:
        with self.model.packed_experts():
            yield from _told(answers)

    def _sanitize_parameters(
        self,
        top_k=None,
        num_beams=None,
        session_length=None,
        exclude_seen=None,
        exclude=None,
        allow=None,
        unknown=None,
        max_history=None,
        items=None,
        local_files_only=None,  # `pipeline()` hands it on
    ):
        if unknown not in (None, "skip", "error"):
            raise ValueError(f'unknown must be "skip" or "error"; got {unknown!r}')
        counts = {"top_k": top_k, "num_beams": num_beams, "session_length": session_length, "max_history": max_history}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        catalogue = self._catalogue()
        for_all = {}
        for name, ids in (("exclude", exclude), ("allow", allow)):
            if ids is not None:
                rows, skipped = known_rows(
                    catalogue, ids, name, unknown or self._preprocess_params.get("unknown", "skip")
                )
                if skipped:
                    warnings.warn(f"left out {skipped} of {len(rows) + skipped} items of {name}: not in the catalogue")
                for_all[name] = np.unique(rows)
        preprocess = {"exclude_seen": exclude_seen, "unknown": unknown, "max_history": max_history, **for_all}
        forward = {"top_k": top_k, "num_beams": num_beams, "session_length": session_length}
        postprocess = {
            "session_length": session_length,
            "metadata": None if items is None else item_metadata(items, catalogue),
        }
        return tuple(
            {name: value for name, value in parameters.items() if value is not None}
            for parameters in (preprocess, forward, postprocess)
        )

    def _catalogue(self) -> ItemCatalogue:
        """The catalogue of model and processor."""
        model, processor = self.model.catalogue, self.processor.catalogue
        if model is None or processor is None:
            raise ValueError(
                f"the {'model' if model is None else 'processor'} has no item catalogue; give it one with set_catalogue(...)"
            )
        if model.hash != processor.hash:
            raise ValueError(
                f"the model has {model}, the processor has {processor}: give both the same one, e.g. "
                "model.set_catalogue(processor.catalogue)"
            )
        return processor

    def preprocess(
        self, input_: _Numbered, max_history=None, unknown="skip", exclude_seen=True, exclude=_NO_ROWS, allow=None
    ):
        catalogue = self.processor.catalogue
        given = input_.history if isinstance(input_.history, Mapping) else {"history": input_.history}
        rows, skipped = {}, 0
        for key in ("history", "exclude", "allow"):
            if given.get(key) is None and key != "history":
                continue
            name = input_.name if key == "history" else f"{key} of {input_.name}"
            rows[key], more = known_rows(catalogue, given.get(key), name, unknown)
            skipped += more
        history = rows["history"]
        if unknown == "error" and not len(history):
            raise ValueError(
                f'{input_.name} is empty: there is nothing to read; pass unknown="skip" for an empty answer'
            )
        shut = np.unique(
            np.concatenate([exclude, rows.get("exclude", _NO_ROWS), history if exclude_seen else _NO_ROWS])
        )
        if "allow" in rows:
            allow = np.unique(rows["allow"])
        if allow is None:
            candidates = catalogue.num_active - int(catalogue.active[shut].sum())
        else:
            allow, shut = np.setdiff1d(allow, shut, assume_unique=True), _NO_ROWS
            candidates = int(catalogue.active[allow].sum())
        keep = max_history or self.processor.max_history
        if keep is None:  # what the model's positions were made for
            keep = self.model.config.max_position_embeddings // self.model.config.tokens_per_item
        latest = catalogue.ids(history[-keep:])
        return {"request": _Request(latest, shut, allow, candidates, skipped, len(latest) < len(history))}

    def _forward(self, input_tensors, top_k=10, num_beams=None, session_length=1):
        num_beams = max(_DEFAULT_BEAMS, top_k) if num_beams is None else num_beams
        if top_k > num_beams:
            raise ValueError(f"top_k={top_k} exceeds num_beams={num_beams}; raise num_beams")
        given = input_tensors["request"]
        requests: list[_Request] = given if isinstance(given, list) else [given]
        answers = [_Answer(request) for request in requests]
        asked = [each for each in answers if each.request.history and each.request.candidates >= session_length]
        if asked:
            histories = [each.request.history for each in asked]  # cut already
            output = self.model.recommend(
                **self.processor(histories, max_history=max(map(len, histories))),
                session_length=session_length,
                num_beams=num_beams,
                num_return_sequences=top_k,
                return_dict_in_generate=True,
                **self._choice([each.request for each in asked]),
            )
            sessions, scores = self.processor.batch_decode(output), output.sequences_scores.tolist()
            for place, answer in enumerate(asked):
                mine = slice(place * top_k, (place + 1) * top_k)
                # A beam that found no session is empty.
                found = [pair for pair in zip(sessions[mine], scores[mine], strict=True) if pair[0]]
                answer.sessions, answer.scores = [session for session, _ in found], [score for _, score in found]
        return {"answer": answers if isinstance(given, list) else answers[0]}

    def _choice(self, requests: Sequence[_Request]) -> dict[str, torch.Tensor]:
        """`exclude` and `allow` of `recommend()`: catalogue rows per request, padded with -1."""
        choice = {"exclude": [request.exclude for request in requests]}
        if any(request.allow is not None for request in requests):
            everything = np.arange(len(self.processor.catalogue))
            choice["allow"] = [
                np.setdiff1d(everything, request.exclude) if request.allow is None else request.allow
                for request in requests
            ]
        return {
            name: torch.nn.utils.rnn.pad_sequence(
                list(map(torch.from_numpy, rows)), batch_first=True, padding_value=-1
            )
            for name, rows in choice.items()
            if any(map(len, rows))
        }

    def postprocess(self, model_outputs, session_length=1, metadata: Mapping | None = None):
        metadata = metadata or {}
        answer: _Answer = model_outputs["answer"]
        for session, score in zip(answer.sessions, answer.scores, strict=True):
            if session_length == 1:
                answer.result.append({"item": session[0], "score": score, **metadata.get(session[0], {})})
            else:
                items = [{"item": item, **metadata.get(item, {})} for item in session]
                answer.result.append({"items": items, "score": score})
        return answer

    def save_pretrained(self, save_directory, **kwargs):
        """Writes model and processor into one folder; arguments as for both. `push_to_hub` uploads that folder."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def _is_history(value) -> bool:
    """Whether this can be a history, among others; an item id cannot."""
    return isinstance(value, list | tuple | Mapping | np.ndarray | torch.Tensor)


def _told(answers: Iterable[_Answer]) -> Iterator[list[dict]]:
    """What the caller gets, and at the end one warning of all that was left out."""
    histories = skipped = empty = spent = cut = 0
    for answer in answers:
        request = answer.request
        histories, skipped, cut = histories + 1, skipped + request.skipped, cut + request.cut
        empty += not request.history
        spent += bool(request.history) and not answer.result
        yield answer.result
    notes = {
        f"left out {skipped} items that are not in the catalogue": skipped,
        f"{empty} of {histories} histories hold no known item: an empty answer": empty,
        f"{spent} of {histories} histories leave nothing to recommend: an empty answer": spent,
        f"read only the latest items of {cut} of {histories} histories, which are longer than max_history": cut,
    }
    if any(notes.values()):
        warnings.warn("; ".join(note for note, count in notes.items() if count))


__all__ = ["GenerativeRecommendationPipeline"]
