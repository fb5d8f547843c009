"""Requests to models that rank single items: sequence models, popularity and item-kNN, through the same path as a generator's."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from onerec_hf.baselines.configuration_sequential import SequentialConfig
from onerec_hf.baselines.item_index import ItemIndex
from onerec_hf.baselines.memory import RankingBaseline
from onerec_hf.baselines.modeling_sequential import SequentialRecommender
from onerec_hf.baselines.next_items import pad_left
from onerec_hf.baselines.read_histories import ReadHistories, of_places
from onerec_hf.baselines.saved import RANKING_TYPES, load_ranking
from onerec_hf.modeling.feature_codes import RequestFeatures
from onerec_hf.modeling.features import FeatureSchema
from onerec_hf.modeling.files import read_json_object
from onerec_hf.modeling.item_evidence import as_times
from onerec_hf.modeling.items_file import saved_items
from onerec_hf.modeling.requests import (
    DEFAULT_BEAMS,
    Answer,
    BatchKind,
    Recommender,
    Request,
    RequestError,
    ResolvedRequest,
)

#: The `model_type` of the artefacts that [`load_item_recommender`] reads.
ITEM_MODEL_TYPES = (SequentialConfig.model_type, *RANKING_TYPES)
# Popularity and item-kNN read whole histories; a longer one than any is still cut.
_ALL = 2**31 - 1
_NO_ITEMS = np.empty(0, dtype=np.int64)


class ItemRecommender(Recommender):
    """
    A [`~onerec_hf.modeling.requests.Recommender`] of a model that ranks single items. Scores are the model's, not log-probabilities; a beam width is
    ignored, and sessions of several items are refused.

    Args:
        model: a `SequentialRecommender` with its item ids, or a fitted `PopularityBaseline` or `ItemKNNBaseline`.
        items: the ids of the model's items in the order of their indices.
        fields: fields by item id, for answers.

    Example:
        >>> model = SequentialRecommender.from_items(["m17", "m4", "m256"], hidden_size=16)
        >>> recommender = ItemRecommender(model, model.items, {"m256": {"title": "Heat"}})
        >>> (answer,) = recommender.recommend([Request(["m4", "m9"], exclude=["m17"], top_k=5)])
        >>> answer.sessions, answer.fields, answer.request.skipped
        ([['m256']], [[{'title': 'Heat'}]], 1)
    """

    def __init__(
        self,
        model: SequentialRecommender | RankingBaseline,
        items: ItemIndex,
        fields: Mapping[Any, Mapping] | None = None,
    ):
        self.model, self.items = model, fields
        self.catalogue: Any = items
        if isinstance(model, SequentialRecommender):
            model.eval()

    @property
    def schema(self) -> FeatureSchema | None:
        return self.model.schema if isinstance(self.model, SequentialRecommender) else None

    @property
    def reads_all(self) -> bool:
        return False

    @property
    def max_history(self) -> int:
        return self.model.config.max_history if isinstance(self.model, SequentialRecommender) else _ALL

    def cost(self, request: ResolvedRequest) -> int:
        return DEFAULT_BEAMS + len(request.history)  # whatever its beam width

    def held(self) -> AbstractContextManager:
        return nullcontext()

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        return self.model.named_parameters() if isinstance(self.model, SequentialRecommender) else ()

    def resolve(
        self,
        request: Request,
        exclude: np.ndarray = _NO_ITEMS,
        allow: np.ndarray | None = None,
        candidates: np.ndarray | None = None,
    ) -> ResolvedRequest:
        if request.session_length > 1:
            raise RequestError(
                f"session_length={request.session_length}: this model ranks single items, sessions need a OneRec",
                ("session_length", 1, "for a ranked list"),
            )
        return super().resolve(request, exclude, allow, candidates)

    def search(self, kind: BatchKind, requests: Sequence[ResolvedRequest]) -> list[Answer]:
        most = max(resolved.count for resolved in requests)
        histories = [self.catalogue.indices(resolved.history) for resolved in requests]
        exclude = [resolved.exclude for resolved in requests]
        allow = [resolved.allow for resolved in requests if resolved.allow is not None] or None
        if isinstance(self.model, SequentialRecommender):
            features = [resolved.features for resolved in requests if resolved.features is not None]
            times = as_times([resolved.request.request_time for resolved in requests])
            read = replace(self._read(histories, features), times=None if times is None else times.numpy())
            best = self._sequential(read, most, exclude, allow)
        else:
            best = self.model.top_items(histories, most, exclude, allow)
        answers = []
        for resolved, indices, scores in zip(requests, *best, strict=True):
            found = np.flatnonzero(indices[: resolved.count] >= 0)
            items = self.catalogue.ids(indices[found])
            answer = Answer(resolved, [[item] for item in items], scores[found].tolist())
            if not all(map(math.isfinite, answer.scores)):
                raise ValueError("the model's scores are not finite numbers: its weights are damaged")
            if self.items is not None:
                answer.fields = [[dict(self.items.get(item, {}))] for item in items]
            answers.append(answer)
        return answers

    def check_vectors(self) -> None:
        if not isinstance(self.model, SequentialRecommender):
            raise RequestError(
                f"similar_to: a {type(self.model).__name__} has no vectors of items; name a OneRec or a sequence model"
            )

    def item_vectors(self) -> torch.Tensor:
        self.check_vectors()
        return cast("SequentialRecommender", self.model).item_vectors()

    def _read(self, histories: list[np.ndarray], features: list[RequestFeatures]) -> ReadHistories:
        """Histories as the model reads them, with their features where it has some."""
        schema = self.schema
        if schema is None:
            return ReadHistories(histories)
        codes = [of_places(each.user, each.history) for each in features]
        # As of examples: flags only where histories hold other interactions too.
        positive = None if schema.not_positive is None else [schema.are_positive(each.history) for each in features]
        return ReadHistories(histories, codes, positive)

    def _sequential(
        self, read: ReadHistories, k: int, exclude: list[np.ndarray], allow: list[np.ndarray] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """[`RankingBaseline.top_items`] of a sequence model."""
        assert isinstance(self.model, SequentialRecommender)
        device, allowed = self.model.device, None
        if allow is not None:
            allowed = torch.zeros(len(read.items), len(self.catalogue), dtype=torch.bool)
            rows = np.repeat(np.arange(len(allow)), [len(items) for items in allow])
            allowed[torch.from_numpy(rows), torch.from_numpy(np.concatenate(allow))] = True
            allowed = allowed.to(device)
        inputs = {name: ids.to(device) for name, ids in read.inputs(self.model.config.max_history).items()}
        exclude_ids = pad_left(exclude).to(device)
        indices, scores = self.model.top_items(k=k, exclude_ids=exclude_ids, allowed=allowed, **inputs)
        return indices.cpu().numpy(), scores.float().cpu().numpy()


def load_item_recommender(
    folder: str | os.PathLike, load_items: Callable[[Any, Any], Mapping[Any, Mapping] | None] = saved_items
) -> ItemRecommender:
    """
    The recommender of a folder with a sequence model, popularity or item-kNN, on the accelerator where there is one.

    Args:
        load_items: takes the folder and the item index and returns the items' fields (default: those saved with the model).

    Raises:
        ValueError: damaged, incomplete, or another kind of model.
        OSError: no such folder.
    """
    kind = read_json_object(Path(folder, "config.json")).get("model_type")
    if kind in RANKING_TYPES:
        model, items = load_ranking(folder)
    elif kind in ITEM_MODEL_TYPES:
        model = cast("SequentialRecommender", SequentialRecommender.from_pretrained(folder, use_safetensors=True))
        # Parted from the file that they are mapped from: a process whose mapped file is cut by `cp` over it dies at the next access.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        if torch.accelerator.is_available():
            model.to(device=torch.accelerator.current_accelerator())  # pyright: ignore[reportCallIssue]
        items = model.items
        if items is None:
            raise ValueError("it holds no item ids; save the model with its items (set_items)")
        model.check_schema()
    else:
        raise ValueError(f"it holds a model of type {kind!r:.40}, not one of {', '.join(ITEM_MODEL_TYPES)}")
    return ItemRecommender(model, items, load_items(folder, items))


__all__ = ["ITEM_MODEL_TYPES", "ItemRecommender", "load_item_recommender"]
