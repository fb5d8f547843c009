"""Processor: item ids in, token tensors out, and back. It is the tokenizer plus the item catalogue."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .catalogue import CATALOGUE_NAME, ItemCatalogue
from .feature_codes import interaction_codes, pathway_places, place_codes, split_histories, user_codes
from .features import FeatureSchema, check_codes
from .features_file import FEATURES_NAME, find_features, save_features
from .files import find_file, pinned, refusing, replacing_files
from .hub import CarriesCode, in_code
from .item_ids import plain_lists
from .items_file import ITEMS_NAME, find_items
from .lifelong_history import LIFELONG_NAME, LifelongHistory
from .tokenization_onerec import OneRecTokenizer

if TYPE_CHECKING:
    from transformers.utils import ModelOutput


class OneRecProcessor(CarriesCode, ProcessorMixin):
    """
    Turns histories and sessions of item ids into model inputs, and generated tokens into item ids.

    Args:
        tokenizer (`OneRecTokenizer`): made with the catalogue's codebook sizes.
        catalogue (`ItemCatalogue`): item ids and their semantic IDs.
        max_history (`int`, *optional*): the latest items of a history that the encoder reads; all when not given. It is saved, so
            that a loaded model reads as much as it was trained on.
        features (`FeatureSchema`, *optional*): the features that the model reads ([`FeatureSchema`]).
        item_features (*optional*): (items, item slots) int32 codes of the catalogue's items; missing values when not given.
        lifelong (`LifelongHistory`, *optional*): compresses what a history has beyond `max_history` items, for a model with a lifelong pathway.
        pathways (`dict`, *optional*): sizes of short-term and positive pathway, for a model with them ([`FeaturesConfig`]).

    Example:
        >>> from onerec_hf import ItemCatalogue, OneRecProcessor
        >>> catalogue = ItemCatalogue(["m4", "m17"], codes=[[0, 1], [1, 0]], codebook_sizes=[2, 2])
        >>> processor = OneRecProcessor.from_catalogue(catalogue, max_history=20)
        >>> inputs = processor([["m4"], ["m17", "m4"]], sessions=[["m17"], ["m17"]], return_tensors="pt")
        >>> inputs["input_ids"].tolist()  # SEP a b, right-padded
        [[3, 4, 7, 0, 0, 0], [3, 5, 6, 3, 4, 7]]
        >>> inputs["decoder_input_ids"].tolist(), inputs["labels"].tolist()
        ([[1, 5], [1, 5]], [[5, 6], [5, 6]])
        >>> processor.batch_decode(inputs["labels"])
        [['m17'], ['m17']]
    """

    _files_beside = (CATALOGUE_NAME, FEATURES_NAME, LIFELONG_NAME, ITEMS_NAME)

    #: Path of the items table (titles and other columns) of the repository, which is saved with the processor.
    items_file: str | None = None

    def __init__(
        self,
        tokenizer=None,
        catalogue: ItemCatalogue | None = None,
        max_history: int | None = None,
        features: FeatureSchema | None = None,
        item_features: np.ndarray | None = None,
        lifelong: LifelongHistory | None = None,
        pathways: Mapping[str, int] | None = None,
        **kwargs,
    ):
        super().__init__(tokenizer, **kwargs)
        if max_history is not None and not (isinstance(max_history, int) and 1 <= max_history < 2**31):
            raise ValueError(f"max_history must be at least 1, or None for whole histories; got {max_history!r:.80}")
        self.max_history, self.pathways = max_history, None if pathways is None else dict(pathways)
        self.catalogue, self.features, self.item_features, self.lifelong = None, None, None, lifelong
        if lifelong is not None and max_history is None:
            raise ValueError("a lifelong history is what is older than max_history items: pass max_history too")
        if lifelong is not None and (catalogue is None or len(lifelong.vectors) != len(catalogue)):
            raise ValueError(
                f"lifelong has vectors of {len(lifelong.vectors)} items: make the processor with the catalogue of these items"
            )
        self.set_catalogue(catalogue)
        if features is not None:
            self.set_features(features, item_features)

    def set_features(self, features: FeatureSchema, item_features: np.ndarray | None = None) -> None:
        """
        Sets the schema and the items' codes.

        Raises:
            ValueError: codes of another shape, or of another schema.
        """
        if self.catalogue is None:
            raise ValueError("features need the item catalogue: make the processor with both")
        shape = (len(self.catalogue), features.item_slots)
        if item_features is None:
            item_features = np.repeat(features.encode_items([{}]), len(self.catalogue), axis=0)
        item_features = np.asarray(item_features)
        if item_features.shape != shape or item_features.dtype.kind not in "iu":
            raise ValueError(
                f"item_features: expected codes of shape {shape} (items, item slots); got {item_features.dtype} of shape {item_features.shape}"
            )
        check_codes(item_features, features.item, "item_features")
        self.features, self.item_features = features, item_features.astype(np.int32)

    @property
    def static_places(self) -> int:
        """Places of a history before its first item: one where the schema has user features."""
        return 0 if self.features is None else self.features.static_places

    def set_catalogue(
        self, catalogue: ItemCatalogue | None, item_values: Mapping[Any, Mapping[str, Any]] | None = None
    ) -> None:
        """
        Sets the processor's catalogue, e.g. a grown one. Items keep their features; new ones have missing values (and zeros as lifelong vectors).

        Args:
            item_values: raw values of items' features by column, by item id: of new items, or of others that changed.

        Raises:
            ValueError: its codebooks have other sizes than the tokenizer's, or `item_values` of items that the catalogue lacks.
        """
        if catalogue is not None and self.tokenizer.codebook_sizes != catalogue.codebook_sizes:
            raise ValueError(
                f"the tokenizer was made for codebooks of {self.tokenizer.codebook_sizes}, the catalogue has "
                f"{catalogue.codebook_sizes}; they belong to different models"
            )
        if item_values and (self.features is None or catalogue is None):
            raise ValueError("item_values are for a processor with features; leave them out")
        if None not in (catalogue, self.catalogue) and catalogue.hash != self.catalogue.hash:
            self._follow(self.catalogue.indices(catalogue.item_ids, unknown="mask"))
        if item_values:
            codes = self.item_features.copy()
            codes[catalogue.indices(list(item_values))] = self.features.encode_items(list(item_values.values()))
            self.item_features = codes
        self.catalogue = catalogue

    def _follow(self, former: np.ndarray) -> None:
        """Features and lifelong vectors of a grown catalogue's items, whose indices were `former`; -1 for new items."""
        known = (former >= 0)[:, None]
        if self.lifelong is not None:
            self.lifelong = replace(self.lifelong, vectors=self.lifelong.vectors[former] * known)
        if self.features is not None:
            self.item_features = np.where(known, self.item_features[former], self.features.encode_items([{}]))

    @classmethod
    def from_catalogue(
        cls,
        catalogue: ItemCatalogue,
        max_history: int | None = None,
        features: FeatureSchema | None = None,
        item_features: np.ndarray | None = None,
        lifelong: LifelongHistory | None = None,
        pathways: Mapping[str, int] | None = None,
    ) -> OneRecProcessor:
        """A processor with a fresh tokenizer for the catalogue."""
        tokenizer = OneRecTokenizer(catalogue.codebook_sizes)
        return cls(tokenizer, catalogue, max_history, features, item_features, lifelong, pathways)

    def __call__(
        self,
        histories: Sequence[Sequence],
        sessions: Sequence[Sequence] | None = None,
        max_history: int | None = None,
        unknown: str = "error",
        return_tensors: str = "pt",
        users: Sequence[Mapping[str, Any] | None] | None = None,
        user_features: Sequence | None = None,
        history_features: Sequence | None = None,
    ) -> BatchFeature:
        """
        Args:
            histories: per user, item ids, oldest first. An entry may also be an object with the id and the interaction's values by column:
                `{"item": "m17", "time": 1700000000, "like": True}`. Columns that the schema does not name are left out.
            sessions: per user, the items to learn, in order; lengths may differ.
            max_history: overrides the processor's own.
            unknown: "error" raises on an item id that the catalogue lacks; "skip" leaves it out and warns with the count.
            return_tensors: "pt".
            users: per user, values of user features by column (or None), for a processor with features. Missing values are legal, as in histories.
            user_features, history_features: per user, codes as datasets hold them in columns of these names, in place of values: `user_slots`
                codes, and `interaction_slots` codes for each entry of the whole history, one after another.

        Returns:
            `input_ids`, `attention_mask` (users, items * (levels + 1)): `SEP a b c` per item, padded on the right; with features also
            `feature_ids` (users, places, slots), and, where users have features, `SEP EOS EOS EOS` before the first item; with sessions also
            `decoder_input_ids`, `decoder_attention_mask`, `labels` (users, items * (levels + 1) - 1): `BOS a b c BOS ...`, and labels
            that are -100 on BOS (it is given, never predicted) and padding. All int64.

        Raises:
            KeyError: an unknown item with `unknown="error"`.
            ValueError: an empty batch, an empty history or session (which users), unequal numbers of histories and sessions, or features of the wrong
                type or of another schema.
        """
        if return_tensors != "pt":
            raise ValueError(f'OneRecProcessor returns PyTorch tensors (return_tensors="pt"); got {return_tensors!r}')
        if unknown not in ("error", "skip"):
            raise ValueError(f'unknown must be "error" or "skip"; got {unknown!r}')
        if self.catalogue is None:
            raise ValueError(
                f"this processor has no item catalogue: the folder or repository that it comes from holds no {CATALOGUE_NAME}; set the "
                "model's with set_catalogue(...)"
            )
        histories = plain_lists(histories)
        if isinstance(histories, str) or any(isinstance(history, str | int) for history in histories):
            raise ValueError('histories must be a list of lists of item ids, one list per user, e.g. [["m17", "m4"]]')
        histories, objects = split_histories(histories)
        keep = max_history if max_history is not None else self.max_history
        rows, lengths, places = self._rows(histories, unknown, "history")
        if objects is not None:
            # As in training, the gap is to the interaction before with an item that the catalogue holds.
            flat = [entry for history in objects for entry in history]
            starts = np.cumsum(lengths) - lengths
            objects = [
                [flat[place] for place in places[start : start + length]]
                for start, length in zip(starts, lengths, strict=True)
            ]
            places = np.arange(len(rows))
        tokenizer, all_rows, all_lengths, latest = self.tokenizer, rows, lengths, np.ones(len(rows), dtype=bool)
        if keep is not None:
            latest = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(rows)) <= keep
            rows, places, lengths = rows[latest], places[latest], np.minimum(lengths, keep)
        data, older, pathway = {}, all_lengths - lengths, None
        if self.features is not None:
            raw, codes = (objects, users), (history_features, user_features)
            if any(value is not None and code is not None for value, code in zip(raw, codes, strict=True)):
                raise ValueError(
                    "pass values (objects in histories, users) or codes (history_features, user_features)"
                )
            entries_of = interaction_codes(self.features, list(map(len, histories)), objects, history_features)[places]
            if self.pathways is not None:
                read, lengths, pathway = pathway_places(self.pathways, self.features, entries_of, lengths)
                rows, entries_of = rows[read], entries_of[read]
            items = np.concatenate([entries_of, self.item_features[rows]], axis=1)
            of_users = user_codes(self.features, len(lengths), users, user_features)
            data["feature_ids"] = torch.from_numpy(place_codes(self.features, of_users, items, lengths, pathway))
        elif not (users is None and user_features is None and history_features is None):
            raise ValueError("this processor has no features; leave users, user_features and history_features out")
        inputs = self._write(rows, lengths, tokenizer.sep_token_id, self.static_places)
        if self.lifelong is not None:
            inputs, data = self._with_lifelong(inputs, data, all_rows[~latest], older)
        data = {"input_ids": inputs, "attention_mask": (inputs != tokenizer.pad_token_id).long(), **data}
        if sessions is not None:
            sessions = plain_lists(sessions)
            if len(sessions) != len(histories):
                raise ValueError(f"{len(histories)} histories but {len(sessions)} sessions")
            data |= self.sessions(sessions, unknown)
        return BatchFeature(data)

    def sessions(self, sessions: Sequence[Sequence], unknown: str = "error") -> dict[str, torch.Tensor]:
        """
        The decoder's side of a batch, for sessions that share histories: `decoder_input_ids`,
        `decoder_attention_mask` and `labels`, as `__call__` makes them.

        Example:
            >>> from onerec_hf import ItemCatalogue, OneRecProcessor
            >>> catalogue = ItemCatalogue(["m4", "m17"], codes=[[0, 1], [1, 0]], codebook_sizes=[2, 2])
            >>> OneRecProcessor.from_catalogue(catalogue).sessions([["m4", "m17"], ["m17"]])["labels"].tolist()
            [[4, 7, -100, 5, 6], [5, 6, -100, -100, -100]]
        """
        rows, lengths, _ = self._rows(plain_lists(sessions), unknown, "session")
        written = self._write(rows, lengths, self.tokenizer.bos_token_id)
        decoder_input_ids = written[:, :-1].contiguous()
        special = (written == self.tokenizer.bos_token_id) | (written == self.tokenizer.pad_token_id)
        return {
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": (decoder_input_ids != self.tokenizer.pad_token_id).long(),
            "labels": written.masked_fill(special, -100)[:, 1:].contiguous(),
        }

    def _rows(self, lists, unknown, what) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Item indices of ragged lists, flattened, their lengths, and their places in the lists; only known items."""
        if not len(lists):
            raise ValueError(f"an empty batch: pass at least one {what}")
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        rows = self.catalogue.indices(
            [item for items in lists for item in items], unknown="mask" if unknown == "skip" else "error"
        )
        owner, places = np.repeat(np.arange(len(lists)), lengths), np.arange(len(rows))
        if (missing := rows < 0).any():
            warnings.warn(f"left out {int(missing.sum())} of {len(rows)} {what} items: not in the catalogue")
            rows, owner, places = rows[~missing], owner[~missing], places[~missing]
            lengths = np.bincount(owner, minlength=len(lists))
        if (lengths == 0).any():
            empty = np.flatnonzero(lengths == 0)
            raise ValueError(
                f"{len(empty)} of {len(lists)} users have an empty {what} (first: number {empty[0]}); leave these users out, or show "
                "them the most popular items: there is nothing to read about them"
            )
        return rows, lengths, places

    def _with_lifelong(
        self, inputs: torch.Tensor, data: dict, rows: np.ndarray, lengths: np.ndarray
    ) -> tuple[torch.Tensor, dict]:
        """
        Inputs with the places of the lifelong pathway first, padding for users without earlier items, and `lifelong_ids` in the data.

        Args:
            rows, lengths: the items that are older than the history, flattened, and their numbers.
        """
        levels = len(self.tokenizer.codebook_sizes)
        queries = self.lifelong.places_of(levels + 1)
        found, sizes, counts = self.lifelong.compressed(rows, lengths)
        written = np.full((len(inputs), max(1, int(counts.max())), levels + 1), self.tokenizer.pad_token_id, np.int64)
        written[:, :, 0] = 0
        there = np.arange(written.shape[1]) < counts[:, None]
        codes = self.catalogue.codes[found] + np.asarray(self.tokenizer.level_offsets)
        written[there] = np.concatenate([sizes[:, None], codes], axis=1)
        held = np.where(lengths > 0, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        places = torch.from_numpy(np.repeat(held[:, None], queries * (levels + 1), axis=1))
        if "feature_ids" in data:
            data = {"feature_ids": torch.nn.functional.pad(data["feature_ids"], (0, 0, queries, 0))}
        return torch.cat([places, inputs], dim=1), {**data, "lifelong_ids": torch.from_numpy(written)}

    def _write(self, rows: np.ndarray, lengths: np.ndarray, separator: int, static: int = 0) -> torch.Tensor:
        """(users, longest * (levels + 1)) tokens: separator and codes per item, after `static` places of the user; padded on the right."""
        levels = len(self.tokenizer.codebook_sizes)
        item = np.empty((len(rows), levels + 1), dtype=np.int64)
        item[:, 0] = separator
        item[:, 1:] = self.catalogue.codes[rows] + np.asarray(self.tokenizer.level_offsets)
        shape = (len(lengths), static + int(lengths.max()), levels + 1)
        written = np.full(shape, self.tokenizer.pad_token_id, dtype=np.int64)
        written[:, :static] = [separator] + [self.tokenizer.eos_token_id] * levels
        written[:, static:][np.arange(shape[1] - static) < lengths[:, None]] = item
        return torch.from_numpy(written.reshape(len(lengths), -1))

    def _blocks(self, sequences: torch.Tensor) -> torch.Tensor:
        """(n, t) tokens, with or without the first BOS, as (n, items, levels + 1)."""
        width = len(self.tokenizer.codebook_sizes) + 1
        bos = self.tokenizer.bos_token_id
        if not (sequences[:, :1] == bos).any():
            sequences = torch.cat([sequences.new_full((len(sequences), 1), bos), sequences], dim=1)
        items = sequences.shape[1] // width
        return sequences[:, : items * width].reshape(len(sequences), items, width)

    def item_indices(self, sequences) -> torch.Tensor:
        """
        Item indices of generated sequences.

        Args:
            sequences: (n, t) token ids as `generate()` returns them (beginning with BOS), or labels (beginning with a code).

        Returns:
            (n, items) int64: the item indices by position; -1 where the tokens are no semantic ID of the catalogue.
        """
        blocks = self._blocks(torch.as_tensor(sequences))
        codes = blocks[..., 1:] - torch.tensor(self.tokenizer.level_offsets, device=blocks.device)
        return self.catalogue.indices_of_codes(codes)

    def batch_decode(self, sequences: torch.Tensor | ModelOutput, **kwargs) -> list[list]:
        """
        Item ids of generated sequences: one list per sequence, in order; `None` where tokens name no item. Padding (a beam that found
        no further item) is left out.
        """
        sequences = torch.as_tensor(getattr(sequences, "sequences", sequences)).cpu()
        rows, first_code = self.item_indices(sequences), self._blocks(sequences)[..., 1]
        written = (first_code != self.tokenizer.pad_token_id) & (first_code != -100)
        ids = self.catalogue.ids(rows.flatten().numpy())
        width = rows.shape[1]
        return [
            [ids[i * width + j] for j, keep in enumerate(keeps) if keep] for i, keeps in enumerate(written.tolist())
        ]

    def decode(self, sequence, **kwargs) -> list:
        """Item ids of one generated sequence."""
        return self.batch_decode(torch.as_tensor(sequence)[None])[0]

    @property
    def model_input_names(self) -> list[str]:
        features = [] if self.features is None else ["feature_ids"]
        features += [] if self.lifelong is None else ["lifelong_ids"]
        return [*self.tokenizer.model_input_names, *features, "decoder_input_ids", "decoder_attention_mask", "labels"]

    def to_dict(self):
        output = super().to_dict()
        for saved_in_its_file in ("catalogue", "features", "item_features", "lifelong"):
            output.pop(saved_in_its_file, None)
        for place in ("items_file", "record_of"):
            output.pop(place, None)
        output.pop("include_code", None)  # what to save, not how to read
        if self.pathways is None:  # as earlier versions wrote it
            output.pop("pathways", None)
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, include_code: bool | None = None, **kwargs):
        """
        Writes the tokenizer's and the processor's configs, the item catalogue, the features, the items table and the code. They are moved into the folder when all of
        them are written, the catalogue last: an interrupted save leaves no half-written processor.

        Args:
            save_directory: the folder.
            push_to_hub, kwargs: as for `transformers.ProcessorMixin.save_pretrained`.
            include_code: write the code, as for [`push_to_hub`].

        Raises:
            OSError: a full or read-only disk; the folder stays as it was.
        """
        if push_to_hub:
            kwargs.setdefault("repo_id", Path(save_directory).name)  # the library would take the temporary folder's
        self.tokenizer.init_kwargs.pop("auto_map", None)  # from the repository that it was loaded from
        last = "processor_config.json" if self.catalogue is None else CATALOGUE_NAME
        try:
            with replacing_files(save_directory, last, (FEATURES_NAME, LIFELONG_NAME)) as temporary:
                if self.catalogue is not None:
                    self.catalogue.save(os.path.join(temporary, CATALOGUE_NAME))
                if self.features is not None:
                    place = os.path.join(temporary, FEATURES_NAME)
                    save_features(place, self.features, self.item_features, self.catalogue.hash)
                if self.lifelong is not None:
                    self.lifelong.save(os.path.join(temporary, LIFELONG_NAME), self.catalogue.hash)
                if self.items_file is not None and os.path.isfile(self.items_file):
                    shutil.copyfile(self.items_file, os.path.join(temporary, ITEMS_NAME))
                if self.include_code if include_code is None else include_code:
                    self._save_code(temporary)
                    self.auto_map = {"AutoProcessor": in_code("processing_onerec.OneRecProcessor")}
                    self.tokenizer.init_kwargs["auto_map"] = {
                        "AutoTokenizer": (in_code("tokenization_onerec.OneRecTokenizer"), None)
                    }
                saved = super().save_pretrained(temporary, push_to_hub=push_to_hub, **kwargs)
        finally:
            self.__dict__.pop("auto_map", None)
            self.tokenizer.init_kwargs.pop("auto_map", None)
        return [os.path.join(os.fspath(save_directory), os.path.basename(path)) for path in saved]

    @classmethod
    def _load_tokenizer_from_pretrained(cls, sub_processor_type, pretrained_model_name_or_path, **kwargs):
        # AutoTokenizer would take the repository's class where it may, though the package's, or the one beside this file, is at hand.
        if find_file(pretrained_model_name_or_path, "tokenizer_config.json", **kwargs):
            return OneRecTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        catalogue = ItemCatalogue.find(pretrained_model_name_or_path, **kwargs)
        if catalogue is None:
            raise OSError(
                f"{pretrained_model_name_or_path} holds neither a processor nor a {CATALOGUE_NAME} to make one from"
            )
        warnings.warn(
            f"{pretrained_model_name_or_path} holds a catalogue but no processor: this one is made from the catalogue and reads whole "
            "histories; save the processor there too, or set max_history to what the model was trained on"
        )
        return OneRecTokenizer(catalogue.codebook_sizes)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        Loads the processor and its item catalogue from a folder or a Hub repository; arguments as for
        `transformers.ProcessorMixin.from_pretrained`. Where only a model was saved, with its catalogue, the processor is made from that.

        Raises:
            ValueError: a config that is damaged; a catalogue that is of a newer version, damaged, or of other codebooks than the tokenizer.
            OSError: the library's own errors: no such repository or revision, no access, no connection; or nothing to make one from.
        """
        kwargs = pinned(pretrained_model_name_or_path, kwargs)
        with refusing(pretrained_model_name_or_path):
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        try:
            processor.set_catalogue(ItemCatalogue.find(pretrained_model_name_or_path, **kwargs))
            if processor.catalogue is not None:
                found = find_features(pretrained_model_name_or_path, processor.catalogue, **kwargs)
                processor.features, processor.item_features = (None, None) if found is None else found
                processor.lifelong = LifelongHistory.find(pretrained_model_name_or_path, processor.catalogue, **kwargs)
        except ValueError as error:
            raise ValueError(f"{pretrained_model_name_or_path}: {error}") from error
        processor.items_file = find_items(pretrained_model_name_or_path, **kwargs)
        repo = os.fspath(pretrained_model_name_or_path)
        processor.record_of = (os.path.abspath(repo) if os.path.isdir(repo) else repo, kwargs.get("revision"))
        return processor


__all__ = ["OneRecProcessor"]
