"""What a model keeps to embed items that come later as its own were: terms of texts, the alignment, and the order of the parts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file

from onerec_hf.modeling.files import listed, read_safetensors, refusing, replacing, sort_header
from onerec_hf.semantic_ids.alignment import AlignmentMap
from onerec_hf.semantic_ids.embeddings import TextEncoder, unit_rows

if TYPE_CHECKING:
    import scipy.sparse

_FORMAT, _VERSION = "onerec-item-encoder", "1"
_KINDS = ("text", "given", "behaviour", "aligned text", "aligned given")
#: Known items whose behaviour stands for that of a new item without any.
NEIGHBOURS = 10
# Similarities that exist at once: 128 MiB of float32.
_AT_ONCE = 1 << 25


@dataclass(frozen=True, eq=False)
class ItemEncoder:
    """
    Embeds new items as [`~onerec_hf.workflows.semantic_ids.embed_items`] embedded those of the fit.

    Args:
        parts: kind, width and weight of each part, in order. Kinds are "text", "given" (embeddings of the caller), "behaviour", and "aligned text" and
            "aligned given", which the alignment maps.
        text: the encoder of texts, where a part needs one.
        alignment: the map, where a part is aligned.
        axes: (d, width) float32, where given embeddings are turned to fewer dimensions.

    Example:
        >>> fitted, text = TextEncoder.fit(["red lipstick", "red nail polish", "garden hose"], dim=2)
        >>> encoder = ItemEncoder([("text", 2, 1.0), ("behaviour", 3, 0.5)], text)
        >>> encoder.needs, encoder.encode(["garden hose", "blue"]).shape, encoder.behaviour
        ('text', (2, 5), slice(2, 5, None))
    """

    parts: list[tuple[str, int, float]]
    text: TextEncoder | None = None
    alignment: AlignmentMap | None = None
    axes: np.ndarray | None = None

    @property
    def needs(self) -> str | None:
        """What the parts are made of beside behaviour: "text", "given" or nothing."""
        kinds = {kind.removeprefix("aligned ") for kind, _, _ in self.parts} - {"behaviour"}
        return min(kinds) if kinds else None

    @property
    def width(self) -> int:
        """Dimensions of all parts."""
        return sum(width for _, width, _ in self.parts)

    @property
    def behaviour(self) -> slice | None:
        """The columns of behaviour."""
        start = 0
        for kind, width, _ in self.parts:
            if kind == "behaviour":
                return slice(start, start + width)
            start += width
        return None

    def encode(self, texts: Sequence[str] | None = None, given: np.ndarray | None = None) -> np.ndarray:
        """
        (n, width) float32 embeddings, zeros in the columns of behaviour and for texts without a known term.

        Raises:
            ValueError: no texts or embeddings where a part needs them, or embeddings of another width.
        """
        of: dict[str, np.ndarray] = {}
        if self.needs == "text":
            if texts is None or self.text is None:
                raise ValueError("the new items need texts; pass the text columns that the model was trained with")
            of["text"] = self.text.encode(texts)
        if self.needs == "given":
            of["given"] = self._checked(given)
        items = len(of[self.needs]) if self.needs else len(texts if texts is not None else given)  # pyright: ignore[reportArgumentType]
        columns = []
        for kind, width, weight in self.parts:
            part = np.zeros((items, width), dtype=np.float32)
            if kind != "behaviour":
                source = of[kind.removeprefix("aligned ")]
                known = source.any(1)
                if known.any():
                    aligned = self.alignment if kind.startswith("aligned") else None
                    part[known] = source[known] if aligned is None else aligned(source[known])
            columns.append(weight * unit_rows(part))
        return np.concatenate(columns, axis=1, dtype=np.float32)

    def _checked(self, given: np.ndarray | None) -> np.ndarray:
        if given is None:
            raise ValueError("the new items need embeddings, made as those that the model was trained with")
        given = np.asarray(given, dtype=np.float32)
        expected = len(self.axes) if self.axes is not None else self._given_width()
        if given.ndim != 2 or given.shape[1] != expected:
            raise ValueError(
                f"embeddings of the new items have shape {given.shape}, those that the model was trained with have {expected} columns"
            )
        return unit_rows(given) @ self.axes if self.axes is not None else given

    def _given_width(self) -> int:
        if self.alignment is not None:
            return self.alignment.input_size
        return next(width for kind, width, _ in self.parts if kind == "given")

    def with_behaviour(
        self, vectors: np.ndarray, known: np.ndarray, together: scipy.sparse.csr_matrix | None = None
    ) -> np.ndarray:
        """
        Fills the columns of behaviour of new items: the mean of the known items that they are consumed together with; without any, of the known
        items with the most similar content.

        Args:
            vectors: (n, width) from [`encode`].
            known: (N, width) embeddings of the known items, e.g. reconstructed from their codes.
            together: (n, N) how often a new item is consumed together with a known one.

        Returns:
            (n, width) float32; a row of zeros for an item with neither content nor behaviour.

        Example:
            >>> encoder = ItemEncoder([("given", 2, 1.0), ("behaviour", 1, 1.0)])
            >>> known = np.array([[1, 0, 1], [0, 1, -1]], dtype=np.float32)
            >>> encoder.with_behaviour(encoder.encode(given=np.array([[1.0, 0.0], [0.0, 0.0]])), known).tolist()
            [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
        """
        columns = self.behaviour
        if columns is None:
            return vectors
        found = np.zeros((len(vectors), columns.stop - columns.start), dtype=np.float32)
        if together is not None:
            found = unit_rows(together @ known[:, columns])
        content, of_known = (unit_rows(np.delete(rows, columns, axis=1)) for rows in (vectors, known))
        alone = np.flatnonzero(~found.any(1) & content.any(1))
        step = max(1, _AT_ONCE // max(1, len(known)))
        for start in range(0, len(alone), step):
            some = alone[start : start + step]
            similar = content[some] @ of_known.T
            best = np.argpartition(-similar, min(NEIGHBOURS, len(known)) - 1, axis=1)[:, :NEIGHBOURS]
            weights = np.take_along_axis(similar, best, axis=1).clip(min=0)
            found[some] = unit_rows(np.einsum("nk,nkd->nd", weights, known[best][..., columns]))
        weight = next(weight for kind, _, weight in self.parts if kind == "behaviour")
        vectors = vectors.copy()
        vectors[:, columns] = weight * found
        return vectors

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, under a temporary name that is then renamed."""
        tensors: dict[str, torch.Tensor] = {}
        if self.text is not None:
            words = json.dumps(self.text.terms, ensure_ascii=False).encode()
            tensors["text.terms"] = torch.frombuffer(bytearray(words), dtype=torch.uint8)
            tensors["text.idf"] = torch.from_numpy(np.ascontiguousarray(self.text.idf, dtype=np.float32))
            tensors["text.vectors"] = torch.from_numpy(np.ascontiguousarray(self.text.vectors, dtype=np.float16))
        if self.alignment is not None:
            tensors |= {f"alignment.{name}": part for name, part in self.alignment.tensors().items()}
        if self.axes is not None:
            tensors["axes"] = torch.from_numpy(np.ascontiguousarray(self.axes, dtype=np.float32))
        metadata = {"format": _FORMAT, "version": _VERSION, "parts": json.dumps(self.parts)}
        with replacing(path) as temporary:
            save_file({name: part.contiguous() for name, part in tensors.items()}, temporary, metadata=metadata)
            sort_header(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike) -> ItemEncoder:
        """
        Loads a saved encoder.

        Raises:
            ValueError: damaged or truncated file, not an encoder, or an unsupported version.
        """
        path = os.fspath(path)
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
            raise ValueError(
                f"{path} is not an item encoder of version {_VERSION} (its tensors: {listed(sorted(tensors)) or 'none'}); copy it again, or "
                "update onerec_hf"
            )
        with refusing(path):
            parts = [(str(kind), int(width), float(weight)) for kind, width, weight in json.loads(metadata["parts"])]
            if any(kind not in _KINDS or not 0 < width < 1 << 20 for kind, width, _ in parts):
                raise ValueError(f"unknown parts {parts!r:.100}")
            text = None
            if "text.terms" in tensors:
                terms = json.loads(tensors["text.terms"].numpy().tobytes())
                idf, vectors = tensors["text.idf"].numpy(), tensors["text.vectors"].float().numpy()
                if not (len(terms) == len(set(terms)) == len(idf) == len(vectors)) or vectors.ndim != 2:
                    raise ValueError("terms, frequencies and vectors do not fit together")
                text = TextEncoder(terms, idf, vectors)
            aligned = {name.removeprefix("alignment."): part for name, part in tensors.items() if "alignment." in name}
            axes = tensors["axes"].numpy() if "axes" in tensors else None
            return cls(parts, text, AlignmentMap.of(aligned) if aligned else None, axes)
