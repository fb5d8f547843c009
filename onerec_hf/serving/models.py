"""A model as it is served: loaded from safetensors only, checked before it takes requests, and called with batches."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onerec_hf.modeling.beam_search import between_steps
from onerec_hf.modeling.catalogue import CATALOGUE_NAME, ItemCatalogue
from onerec_hf.modeling.files import read_json_object
from onerec_hf.modeling.items_file import ITEMS_NAME, saved_items
from onerec_hf.modeling.requests import (
    DEFAULT_BEAMS,
    BatchKind,
    Recommender,
    Request,
    RequestError,
    ResolvedRequest,
    known_indices,
)

if TYPE_CHECKING:
    from .schema import Query, SimilarQuery
    from .settings import ServingSettings

_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "processor_config.json",
    "tokenizer_config.json",
    ITEMS_NAME,
)
#: Takes a model's folder and catalogue, and returns the items' fields by item id.
LoadItems = Callable[[Path, Any], "Mapping[Any, Mapping] | None"]
_ITEMS_PER_POSITION = 1_000
_LIMITS = (("top_k", "max_top_k"), ("num_beams", "max_beams"), ("session_length", "max_session_length"))


@dataclass(frozen=True)
class BatchKey:
    """Histories with equal keys are answered together: the model, and the settings of a search."""

    model: ServedModel
    kind: BatchKind

    def cost(self, request: ResolvedRequest) -> float:
        """In positions that are computed."""
        return self.model.recommender.cost(request)

    def answer(self, requests: Sequence[ResolvedRequest], step: Callable[[], None]) -> list[dict[str, Any]]:
        """See [`ServedModel.answer`]."""
        return self.model.answer(self, requests, step)


@dataclass(frozen=True)
class SimilarKey:
    """The key of items whose similar items are looked for."""

    model: ServedModel

    def cost(self, item: SimilarItem) -> float:
        """About that of so many positions of a small model."""
        return len(self.model.catalogue) / _ITEMS_PER_POSITION

    def answer(self, items: Sequence[SimilarItem], step: Callable[[], None]) -> list[dict[str, Any]]:
        """See [`ServedModel.similar`]."""
        return self.model.similar(items, step)


@dataclass(frozen=True)
class SimilarItem:
    """An item, its row in the catalogue, and how many similar ones are wanted."""

    item: Any
    row: int
    top_k: int
    skipped: int = 0


class ServedModel:
    """
    A model that answers requests, for many calls of [`answer`].

    Args:
        recommender: a [`~onerec_hf.modeling.requests.Recommender`] of a generator in evaluation mode, which keeps its experts packed until
            [`close`]; or an [`~onerec_hf.baselines.ItemRecommender`].
        version: identifies the model.

    Raises:
        ValueError: the model cannot recommend (non-finite weights, for example).

    Example:
        >>> from onerec_hf import ItemCatalogue, OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor
        >>> from onerec_hf.serving.schema import Query
        >>> from onerec_hf.serving.settings import ServingSettings
        >>> catalogue = ItemCatalogue(["m4", "m17", "m256"], codes=[[0, 1], [1, 0], [1, 1]], codebook_sizes=[2, 2])
        >>> config = OneRecConfig(codebook_sizes=[2, 2], hidden_size=16, encoder_layers=1, decoder_layers=1, num_experts=2)
        >>> model = OneRecForConditionalGeneration(config).eval()
        >>> model.set_catalogue(catalogue)
        >>> served = ServedModel(Recommender(model, OneRecProcessor.from_catalogue(catalogue)), version="first")
        >>> query = Query(history=["m4"], exclude=["m17", "m9"], top_k=5)
        >>> key, row = served.prepare(query, "history", ServingSettings(), unknown="skip")
        >>> (answer,) = served.answer(key, [row])
        >>> answer["items"], answer["unknown_items"]
        (['m256'], 1)
    """

    def __init__(self, recommender: Recommender, version: str):
        self.recommender, self.model, self.version = recommender, recommender.model, version
        self.catalogue = recommender.catalogue
        self._vectors: Any = None  # of all items, made for the first request for similar ones
        self._resources = ExitStack()
        self._resources.enter_context(recommender.held())
        try:
            self._try_out()
        except BaseException:
            self.close()
            raise

    @classmethod
    def load(
        cls,
        repo: str,
        unless: str | None = None,
        load_items: LoadItems = saved_items,
        load_recommender: Callable[[Path, LoadItems], Recommender] | None = None,
    ) -> ServedModel | None:
        """
        Loads a folder or Hub repository. No code of the repository is run, and no pickle is read. Its version is a hash of its files:
        the same on every server that serves the same model.

        Args:
            unless: a version; None is returned where the folder holds that one.
            load_items: takes the folder and its catalogue and returns the items' fields (default: those saved with the model).
            load_recommender: takes the folder and `load_items` ([`load_generator`] by default).

        Raises:
            ValueError, OSError: it is not there, damaged, incomplete, changing, or a model that `load_recommender` does not read.
        """
        folder = find_folder(repo)
        before = _state(folder)
        model_type(folder)  # a folder without a model is refused before its files are hashed
        version = version_of(folder)
        if version == unless:
            return None
        served = cls((load_recommender or load_generator)(folder, load_items), version)
        if _changed(folder, before):
            served.close()
            raise ValueError("its files changed while they were read; write a model elsewhere and rename its folder")
        return served

    def close(self) -> None:
        """Releases the packed experts."""
        self._resources.close()

    def _try_out(self) -> None:
        """Raises ValueError where a weight is no number or the model does not recommend items of its catalogue."""
        for name, weight in self.recommender.weights():
            if not bool(weight.isfinite().all()):
                raise ValueError(f"its weights are damaged: {name} holds values that are not numbers")
        first = self.catalogue.ids(np.flatnonzero(self.catalogue.active)[:1])
        request = Request(first, top_k=1, num_beams=4, exclude_seen=False)
        for answer in self.recommender.recommend([request, request]):
            if not answer.sessions or None in answer.sessions[0]:
                raise ValueError("its model does not recommend items of its catalogue")

    def prepare(
        self, query: Query, name: str, settings: ServingSettings, unknown: str
    ) -> tuple[BatchKey, ResolvedRequest]:
        """
        Checks a query against catalogue and limits.

        Args:
            name: of the query's history in messages.
            unknown: "skip" or "error", default of queries without the option.

        Raises:
            RequestError: it goes beyond a limit, names unknown items where that is an error, or leaves nothing to read or to recommend.
        """
        for key, limit in _LIMITS:
            value, most = getattr(query, key), getattr(settings, limit)
            if value is not None and value > most:
                raise RequestError(
                    f"{key} is at most {most} on this server; got {value if value < 10**18 else 'far more'}"
                )
        lists = {
            "history": query.history,
            "exclude": query.exclude or None,
            "allow": query.allow,
            "candidates": query.candidates,
        }
        for key, ids in lists.items():
            most = settings.max_history_items if key == "history" else settings.max_list_items
            if ids is not None and len(ids) > most:
                of = name if key == "history" else f"{key} of {name}"
                raise RequestError(f"{of} has {len(ids)} items, this server takes {most}")
        options = {key: getattr(query, key) for key in ("top_k", "session_length", "exclude_seen", "diversity")}
        num_beams = query.num_beams or max(min(DEFAULT_BEAMS, settings.max_beams), query.top_k)
        request = Request(
            **lists, **options, num_beams=num_beams, unknown=query.unknown or unknown, name=name, user=query.user
        )
        resolved = self.recommender.resolve(request)
        problem = self.recommender.problem(resolved)
        if problem is not None and not resolved.history:
            raise RequestError(f"{problem.reason}; show this user the most popular items")
        if problem is not None:
            raise problem
        return BatchKey(self, resolved.kind), resolved

    def prepare_similar(self, query: SimilarQuery, settings: ServingSettings) -> list[tuple[SimilarKey, SimilarItem]]:
        """
        Checks a query for similar items against catalogue and limits.

        Raises:
            RequestError: it goes beyond a limit, or names items that the catalogue does not hold; or the model has no vectors of items.
        """
        if not 0 < len(query.similar_to) <= settings.max_histories:
            raise RequestError(
                f"this server takes 1 to {settings.max_histories} items of similar_to per request; got {len(query.similar_to)}"
            )
        if query.top_k > settings.max_top_k:
            raise RequestError(f"top_k is at most {settings.max_top_k} on this server; got more")
        rows, _ = known_indices(self.catalogue, query.similar_to, "similar_to", "error")
        self.recommender.check_vectors()
        key = SimilarKey(self)
        pairs = zip(query.similar_to, rows.tolist(), strict=True)
        return [(key, SimilarItem(item, row, query.top_k)) for item, row in pairs]

    def similar(self, items: Sequence[SimilarItem], step: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
        """
        The most similar items of each: `similar_to`, `items`, `scores` (cosines), `fields` where there is an items table, and `model`.

        Args:
            step: called between items.
        """
        if self._vectors is None:
            self._vectors = self.recommender.unit_vectors()
        answers, of = [], self.recommender.items
        for each in items:
            step()
            ids, scores = self.recommender.most_similar(each.row, each.top_k, self._vectors)
            fields = {} if of is None else {"fields": [dict(of.get(item, {})) for item in ids]}
            answers.append({"similar_to": each.item, "items": ids, "scores": scores, **fields, "model": self.version})
        return answers

    def answer(
        self, key: BatchKey, requests: Sequence[ResolvedRequest], step: Callable[[], None] = lambda: None
    ) -> list[dict[str, Any]]:
        """
        Answers requests of one key, in order: `items` or `sessions`, `scores`, `fields` where there is an items table, `unknown_items` and
        `model`.

        Args:
            step: called between the steps of a beam search.

        Raises:
            ValueError: scores that are not finite.
        """
        with between_steps(step):
            found = self.recommender.search(key.kind, requests)
        return [
            {**answer.columns(), "unknown_items": answer.request.skipped, "model": self.version} for answer in found
        ]


def load_generator(folder: Path, load_items: LoadItems = saved_items) -> Recommender:
    """
    The recommender of a generator's folder, on the accelerator where there is one. Its weights and catalogue are copied into memory.

    Raises:
        ValueError, OSError: damaged, incomplete, or not a generator.
    """
    import torch

    from onerec_hf.modeling.hub import check_complete
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.modeling_onerec_v2 import OneRecV2ForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor

    kind = model_type(folder)
    classes = (OneRecForConditionalGeneration, OneRecV2ForConditionalGeneration)
    generators: dict[Any, Any] = {each.config_class.model_type: each for each in classes}  # type: ignore[union-attr]
    if kind not in generators:
        raise ValueError(f"it holds a model of type {kind!r:.40}, not a OneRec generator")
    processor = OneRecProcessor.from_pretrained(folder)
    # In float32, torch's default: another type would be made the default for all threads while the weights are loaded.
    try:
        model, loaded = cast(
            Any,
            generators[kind].from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            ),
        )
    except RuntimeError as error:
        raise ValueError(f"its weights do not fit its config: {str(error)[:300]}") from error
    check_complete(loaded)
    _own_memory(model, processor)
    if processor.catalogue is not None:
        processor.catalogue.verify()
    if torch.accelerator.is_available():
        model.to(device=torch.accelerator.current_accelerator())
    recommender = Recommender(model.eval(), processor)
    recommender.items = load_items(folder, recommender.catalogue)
    return recommender


def spell_key(option: str, value: Any) -> str:
    """An option of a query as JSON spells it: `"unknown": "skip"`."""
    return f'"{option}": {json.dumps(value)}'


def _own_memory(model: Any, processor: Any) -> None:
    """
    Parts weights and catalogue, one for both, from the files that they are mapped from: a process whose mapped file is cut by `cp` over it
    dies at the next access.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    if model.catalogue is None or processor.catalogue is None or model.catalogue.hash != processor.catalogue.hash:
        return  # refused later
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, CATALOGUE_NAME)
        processor.catalogue.save(path)
        catalogue = ItemCatalogue.load(path)  # stays mapped where the name is gone
    model.set_catalogue(catalogue)
    processor.set_catalogue(catalogue)


def find_folder(repo: str) -> Path:
    """
    The folder of a model: a local one with its links followed, or the snapshot of a Hub repository, downloaded where it is new.

    Raises:
        OSError: an absolute path without a folder, or no such repository.
    """
    if os.path.isdir(repo):
        # A link may be turned to another model while this one is read.
        return Path(repo).resolve()
    if os.path.isabs(repo):  # one that was there a moment ago, perhaps: the Hub is not asked for its name
        raise FileNotFoundError(f"there is no such folder: {repo}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, allow_patterns=list(_FILES)))


def model_type(folder: Path) -> Any:
    """
    The `model_type` in the config.json of a folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError("it holds no model (config.json); name what `onerec-hf train` or `quickstart` wrote")
    return read_json_object(path).get("model_type")


def _files(folder: Path) -> list[Path]:
    return sorted({path for pattern in _FILES for path in folder.glob(pattern)})


def _state(folder: Path) -> tuple[os.stat_result, list[tuple]]:
    """
    The folder and the model's files as they are, for [`_changed`].

    Raises:
        ValueError: a file that is no regular one: reading a pipe or a device may never end.
    """
    found = []
    for path in _files(folder):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is not a regular file (a pipe, a device or a folder); remove it")
        found.append((path.name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return folder.stat(), found


def _changed(folder: Path, before: tuple[os.stat_result, list[tuple]]) -> bool:
    """Whether the folder or a file of the model is another one, or was renamed and put back."""
    (was, files), (now, files_now) = before, _state(folder)
    # A file that others write beside the model's sets both times of a folder, a new name for the folder itself only one.
    renamed = now.st_ctime_ns != was.st_ctime_ns and now.st_ctime_ns != now.st_mtime_ns
    return files != files_now or (was.st_dev, was.st_ino) != (now.st_dev, now.st_ino) or renamed


def version_of(folder: Path) -> str:
    """The first twelve digits of a SHA-256 over the files that make the model, and their names."""
    digest = hashlib.sha256()
    for path in _files(folder):
        with open(path, "rb") as file:
            left = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name}:{left}:".encode())
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()[:12]
