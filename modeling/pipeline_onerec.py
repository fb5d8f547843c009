"""The pipeline "generative-recommendation": histories of item ids in, ranked items or whole sessions out, with scores and titles."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import Pipeline

from .feature_codes import FEATURE_COLUMNS
from .items_file import read_items
from .requests import Answer, AnswerCounts, Recommender, Request, ResolvedRequest, item_metadata, known_indices


@dataclass
class _Numbered:
    """One input and its number in the caller's list; None for a single input."""

    number: int | None
    history: Any

    @property
    def name(self) -> str:
        return "the history" if self.number is None else f"history number {self.number}"


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
        candidates (list of item ids, *optional*): items to rank, for all histories: answers have all of them, with exact scores, those of the
            history too; `top_k`, `num_beams` and `exclude_seen` do not count then.
        unknown ("skip" or "error", defaults to "skip"): handling of unknown ids and of histories without any
            item. They are skipped, a history without a known item getting an empty answer, and one warning at the end counts them; or
            they raise.
        max_history (`int`, *optional*): the latest items of a history that the model reads, the processor's own when not given.
        diversity (`float`, defaults to 0): penalty on items that the sessions of a history share; 1 leaves hardly any.
        items (*optional*): titles and other fields of items in answers: a mapping from ids to titles or to dictionaries
            of fields, or a table with a column `item_id` (a DataFrame, a `datasets.Dataset`, columns, or rows). When not given, the
            `items.parquet` of the processor's repository, where it holds one and the package onerec_hf is installed.

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
    _preprocess_params: dict[str, Any] = {}  # the constructor's options, once it has run

    def __init__(self, *args, local_files_only: bool | None = None, **kwargs):  # `pipeline()` hands it on
        super().__init__(*args, **kwargs)
        if "items" not in self._forward_params:
            self._forward_params["items"] = read_items(self.processor.items_file, self.processor.catalogue)

    def __call__(self, histories, **kwargs):
        """
        Recommends.

        Args:
            histories: one history, oldest item first; or a list of histories; or a dataset, generator or other iterable of them. A
                history is a list of item ids, or a dictionary with one under "history" and, for it alone, lists of item ids under
                "exclude" (on top of the option's), "allow" and "candidates" (in place of it), and values of the user's features under "user"; other
                keys are ignored, so that a `datasets.Dataset` with a column `history` can be passed directly. For a model with features an entry may
                be an object, `{"item": id, "like": True}`, with values of its interaction; or columns `user_features` and `history_features` hold
                codes, as those of a dataset's held-out examples do.
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

    def similar_items(self, item_ids, top_k: int = 10) -> list[list[dict]]:
        """
        The most similar items of each item: those whose vectors, of the item head or of their codes, have the largest cosine.

        Args:
            item_ids: ids of the catalogue.
            top_k: items per item, best first.

        Returns:
            Per item a list `[{"item": id, "score": cosine, **fields}, ...]`.

        Raises:
            KeyError: an id that the catalogue does not hold.
        """
        items = self._forward_params["items"]
        return Recommender(self.model, self.processor, items).similar_items(item_ids, top_k)

    def _run(self, numbered, **kwargs) -> Any:
        return super().__call__(numbered, **kwargs)

    def _stream(self, answers: Iterable[Answer]) -> Iterator[list[dict]]:
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
        candidates=None,
        unknown=None,
        max_history=None,
        diversity=None,
        items=None,
    ):
        given = {
            "top_k": top_k,
            "num_beams": num_beams,
            "session_length": session_length,
            "exclude_seen": exclude_seen,
            "unknown": unknown,
            "max_history": max_history,
            "diversity": diversity,
        }
        options = self._preprocess_params.get("options", {}) | {
            name: value for name, value in given.items() if value is not None
        }
        checked = Request((), **options)
        catalogue = Recommender(self.model, self.processor).catalogue
        preprocess: dict[str, Any] = {"options": options}
        for name, ids in (("exclude", exclude), ("allow", allow), ("candidates", candidates)):
            if ids is not None:
                rows, skipped = known_indices(catalogue, ids, name, checked.unknown)
                if skipped:
                    warnings.warn(f"left out {skipped} of {len(rows) + skipped} items of {name}: not in the catalogue")
                preprocess[name] = np.unique(rows)
        return preprocess, {} if items is None else {"items": item_metadata(items, catalogue)}, {}

    def preprocess(self, input_: _Numbered, options: Mapping[str, Any], **rows):
        given = input_.history if isinstance(input_.history, Mapping) else {"history": input_.history}
        lists = {
            name: given.get(name) for name in ("history", "exclude", "allow", "candidates", "user", *FEATURE_COLUMNS)
        }
        recommender = Recommender(self.model, self.processor)
        resolved = recommender.resolve(Request(**lists, name=input_.name, **options), **rows)
        if resolved.request.unknown == "error" and not resolved.history:
            problem = recommender.problem(resolved)
            assert problem is not None
            raise problem
        return {"request": resolved}

    def _forward(self, input_tensors, items: Mapping[Any, Mapping] | None = None):
        given = input_tensors["request"]
        requests: list[ResolvedRequest] = given if isinstance(given, list) else [given]
        answers = Recommender(self.model, self.processor, items).answer(requests)
        return {"answer": answers if isinstance(given, list) else answers[0]}

    def postprocess(self, model_outputs) -> Answer:
        return model_outputs["answer"]

    def save_pretrained(self, save_directory, **kwargs):
        """Writes model and processor into one folder; arguments as for both. `push_to_hub` uploads that folder."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def _is_history(value) -> bool:
    """Whether this is one of several histories, and not an entry of one: an item id, or an object with an item."""
    if isinstance(value, Mapping):
        return "history" in value or "item" not in value
    return isinstance(value, list | tuple | np.ndarray | torch.Tensor)


def _told(answers: Iterable[Answer]) -> Iterator[list[dict]]:
    """Yields the answers, and at the end one warning that counts everything left out."""
    counts = AnswerCounts()
    for answer in answers:
        counts.add(answer)
        yield answer.rows()
    if note := str(counts):
        warnings.warn(note)


__all__ = ["GenerativeRecommendationPipeline"]
