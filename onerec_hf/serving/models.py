"""A model as it is served: loaded from safetensors alone, checked before it is let in, and asked for batches."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onerec_hf.modeling.catalogue import CATALOGUE_NAME, ItemCatalogue
from onerec_hf.modeling.files import read_json_object

if TYPE_CHECKING:
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor

    from .schema import Query
    from .settings import ServingSettings

_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "processor_config.json", "tokenizer_config.json")
_DEFAULT_BEAMS = 50


class BadQuery(ValueError):
    """What a request asks for cannot be done; the message says why."""


@dataclass(frozen=True)
class BatchKey:
    """What histories of one batch have in common: all other settings are a row's own."""

    model: ServedModel
    session_length: int
    num_beams: int
    has_allow: bool


@dataclass(frozen=True)
class Row:
    """A history as the model reads it, and the catalogue rows that it must not, or may, get."""

    history: list
    exclude: np.ndarray
    allow: np.ndarray | None
    top_k: int
    unknown_items: int


class ServedModel:
    """
    A generator with its processor, for many calls of [`answer`].

    Args:
        model, processor: with the same catalogue. The model is put into evaluation mode and, until [`close`], keeps its experts packed.
        version: tells models apart.

    Raises:
        ValueError: no catalogue, or two different ones; or the model cannot recommend (its weights are not numbers, say).

    Example:
        >>> from onerec_hf import ItemCatalogue, OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor
        >>> from onerec_hf.serving.schema import Query
        >>> from onerec_hf.serving.settings import ServingSettings
        >>> catalogue = ItemCatalogue(["m4", "m17", "m256"], codes=[[0, 1], [1, 0], [1, 1]], codebook_sizes=[2, 2])
        >>> config = OneRecConfig(codebook_sizes=[2, 2], hidden_size=16, encoder_layers=1, decoder_layers=1, num_experts=2)
        >>> model = OneRecForConditionalGeneration(config)
        >>> model.set_catalogue(catalogue)
        >>> served = ServedModel(model, OneRecProcessor.from_catalogue(catalogue), version="first")
        >>> query = Query(history=["m4"], exclude=["m17", "m9"], top_k=5)
        >>> key, row = served.prepare(query, "history", ServingSettings(), unknown="skip")
        >>> (answer,) = served.answer(key, [row])
        >>> answer["items"], answer["unknown_items"]
        (['m256'], 1)
    """

    def __init__(self, model: OneRecForConditionalGeneration, processor: OneRecProcessor, version: str):
        if model.catalogue is None or processor.catalogue is None:
            raise ValueError("it holds no item catalogue (catalogue.safetensors)")
        if model.catalogue.hash != processor.catalogue.hash:
            raise ValueError(
                f"its model has {model.catalogue}, its processor {processor.catalogue}: they belong to different models"
            )
        self.model, self.processor, self.version = model.eval(), processor, version
        self.catalogue = processor.catalogue
        # What the processor keeps, or what the model's positions were made for.
        self.max_history = processor.max_history or (
            model.config.max_position_embeddings // model.config.tokens_per_item
        )
        self._resources = ExitStack()
        self._resources.enter_context(model.packed_experts())
        try:
            self._try_out()
        except BaseException:
            self.close()
            raise

    @classmethod
    def load(cls, repo: str, unless: str | None = None) -> ServedModel | None:
        """
        Loads a folder or Hub repository. No code of the repository is run, and no pickle is read. Its version is a hash of its files:
        the same on every server that serves the same model.

        Args:
            unless: a version; None is returned where the folder holds that one.

        Raises:
            ValueError, OSError: it is not there, damaged, incomplete, changing, or not a generator.
        """
        import torch

        from onerec_hf.modeling.configuration_onerec import OneRecConfig
        from onerec_hf.modeling.hub import check_complete
        from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
        from onerec_hf.modeling.processing_onerec import OneRecProcessor

        folder = find_folder(repo)
        before = _state(folder)
        kind = _model_type(folder)
        if kind != OneRecConfig.model_type:
            raise ValueError(f"it holds a model of type {kind!r:.40}, not a OneRec generator")
        version = version_of(folder)
        if version == unless:
            return None
        processor = OneRecProcessor.from_pretrained(folder)
        # In float32, torch's default: another type would be made the default for all threads while the weights are loaded.
        try:
            model, loaded = cast(
                Any,
                OneRecForConditionalGeneration.from_pretrained(
                    folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
                ),
            )
        except RuntimeError as error:
            raise ValueError(f"its weights do not fit its config: {str(error)[:300]}") from error
        check_complete(loaded)
        _own_memory(model, processor)
        if torch.accelerator.is_available():
            model.to(device=torch.accelerator.current_accelerator())
        served = cls(model, processor, version)
        if _state(folder) != before:
            served.close()
            raise ValueError("its files changed while they were read; write a model elsewhere and rename its folder")
        return served

    def close(self) -> None:
        """Gives the packed experts back."""
        self._resources.close()

    def _try_out(self) -> None:
        """Raises ValueError where a weight is no number or the model does not recommend items of its catalogue."""
        for name, weight in self.model.named_parameters():
            if not bool(weight.isfinite().all()):
                raise ValueError(f"its weights are damaged: {name} holds values that are not numbers")
        first = self.catalogue.ids(np.flatnonzero(self.catalogue.active)[:1])
        rows = [Row(first, np.empty(0, dtype=np.int64), None, 1, 0)] * 2
        for answer in self.answer(BatchKey(self, 1, 4, False), rows):
            if not answer["items"] or None in answer["items"]:
                raise ValueError("its model does not recommend items of its catalogue")

    def prepare(self, query: Query, name: str, settings: ServingSettings, unknown: str) -> tuple[BatchKey, Row]:
        """
        Checks a query against catalogue and limits.

        Args:
            name: of the query's history in messages.
            unknown: "skip" or "error", where the query does not say.

        Raises:
            BadQuery: it goes beyond a limit, names unknown items where that is an error, or leaves nothing to read or to recommend.
        """
        for key, most in (
            ("top_k", settings.max_top_k),
            ("num_beams", settings.max_beams),
            ("session_length", settings.max_session_length),
        ):
            value = getattr(query, key)
            if value is not None and value > most:
                raise BadQuery(
                    f"{key} is at most {most} on this server; got {value if value < 10**18 else 'far more'}"
                )
        num_beams = (
            max(min(_DEFAULT_BEAMS, settings.max_beams), query.top_k) if query.num_beams is None else query.num_beams
        )
        if query.top_k > num_beams:
            raise BadQuery(f"top_k {query.top_k} exceeds num_beams {num_beams}; raise num_beams")
        unknown = query.unknown or unknown
        lists = {"history": query.history, "exclude": query.exclude, "allow": query.allow}
        rows: dict[str, np.ndarray] = {}
        for key, ids in lists.items():
            if ids is not None:
                most = settings.max_history_items if key == "history" else settings.max_list_items
                rows[key] = self._rows(ids, name if key == "history" else f"{key} of {name}", most, unknown)
        known = {key: found[found >= 0] for key, found in rows.items()}
        if not len(known["history"]):
            reason = "is empty" if not query.history else "holds no item of the catalogue"
            raise BadQuery(f"{name} {reason}: there is nothing to read; show this user the most popular items")
        exclude = np.unique(
            np.concatenate([known["exclude"], known["history"][: len(known["history"]) * query.exclude_seen]])
        )
        allow = None
        if query.allow is None:
            left = self.catalogue.num_active - int(self.catalogue.active[exclude].sum())
        else:
            allow = np.setdiff1d(known["allow"], exclude)
            left, exclude = int(self.catalogue.active[allow].sum()), exclude[:0]
        if left < query.session_length:
            raise BadQuery(
                f"{name}: its exclusions and `allow` leave {left} of {self.catalogue.num_active} items, too few for a session of "
                f"{query.session_length}"
            )
        history = [item for item, row in zip(query.history, rows["history"].tolist(), strict=True) if row >= 0]
        unknown_items = sum(map(len, rows.values())) - sum(map(len, known.values()))
        key = BatchKey(self, query.session_length, num_beams, allow is not None)
        return key, Row(history[-self.max_history :], exclude, allow, query.top_k, unknown_items)

    def _rows(self, ids: list, name: str, most: int, unknown: str) -> np.ndarray:
        if len(ids) > most:
            raise BadQuery(f"{name} has {len(ids)} items, this server takes {most}")
        try:
            rows = self.catalogue.rows(ids, unknown="mask")
        except (TypeError, ValueError) as error:
            raise BadQuery(f"{name}: {str(error)[:200]}") from None
        if unknown == "error" and (rows < 0).any():
            examples = [item for item, row in zip(ids, rows.tolist(), strict=True) if row < 0][:3]
            raise BadQuery(
                f"{name}: {int((rows < 0).sum())} of {len(ids)} items are not in the catalogue of {len(self.catalogue)}, e.g. "
                f"{str(examples)[:100]}"
            )
        return rows

    def answer(self, key: BatchKey, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """
        Answers rows with the settings of `key`, in order: `items` or `sessions`, `scores`, `unknown_items` and `model`.

        Raises:
            ValueError: scores that are not numbers.
        """
        most = max(row.top_k for row in rows)
        allow = [row.allow for row in rows if row.allow is not None]
        output: Any = self.model.recommend(
            **self.processor([row.history for row in rows], max_history=self.max_history),
            session_length=key.session_length,
            num_beams=key.num_beams,
            num_return_sequences=most,
            exclude=_padded([row.exclude for row in rows]),
            allow=_padded(allow) if key.has_allow else None,
            return_dict_in_generate=True,
        )
        sessions, scores = self.processor.batch_decode(output), output.sequences_scores.tolist()
        answers = []
        for place, row in enumerate(rows):
            mine = slice(place * most, place * most + row.top_k)
            # A beam that found no session is empty.
            found = [pair for pair in zip(sessions[mine], scores[mine], strict=True) if pair[0]]
            if not all(math.isfinite(score) for _, score in found):
                raise ValueError("its model's scores are not numbers: its weights are damaged")
            lists = [session for session, _ in found]
            answers.append(
                {
                    **({"items": [item for (item,) in lists]} if key.session_length == 1 else {"sessions": lists}),
                    "scores": [score for _, score in found],
                    "unknown_items": row.unknown_items,
                    "model": self.version,
                }
            )
        return answers


def _own_memory(model: Any, processor: OneRecProcessor) -> None:
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
    """The folder of a model: a local one with its links followed, or the snapshot of a Hub repository, downloaded where it is new."""
    if os.path.isdir(repo):
        # A link may be turned to another model while this one is read.
        return Path(repo).resolve()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, allow_patterns=list(_FILES)))


def _model_type(folder: Path) -> Any:
    """What config.json says."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError("it holds no model (config.json); name what `onerec-hf train` or `quickstart` wrote")
    return read_json_object(path).get("model_type")


def _files(folder: Path) -> list[Path]:
    return sorted({path for pattern in _FILES for path in folder.glob(pattern)})


def _state(folder: Path) -> list[tuple]:
    """Changes when a file of the model does."""
    stats = [(path.name, path.stat()) for path in _files(folder)]
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def version_of(folder: Path) -> str:
    """The first twelve digits of a SHA-256 over the files that make the model, and their names."""
    digest = hashlib.sha256()
    for path in _files(folder):
        with open(path, "rb") as file:
            digest.update(f"{path.name}:{os.fstat(file.fileno()).st_size}:".encode())
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]


def _padded(rows: Sequence[np.ndarray]):
    """(users, longest) int64 catalogue rows, padded with -1."""
    import torch

    return torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(each) for each in rows], batch_first=True, padding_value=-1
    )
