"""Processor: item ids in, token tensors out, and back. It is the tokenizer plus the item catalogue."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .catalogue import CATALOGUE_NAME, ItemCatalogue
from .files import find_file, pinned, refusing, replacing_files
from .hub import CarriesCode, in_code
from .requests import ITEMS_NAME, find_items
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

    _files_beside = (CATALOGUE_NAME, ITEMS_NAME)

    #: Path of the items table (titles and other columns) of the repository, which is saved with the processor.
    items_file: str | None = None

    def __init__(
        self, tokenizer=None, catalogue: ItemCatalogue | None = None, max_history: int | None = None, **kwargs
    ):
        super().__init__(tokenizer, **kwargs)
        if max_history is not None and not (isinstance(max_history, int) and 1 <= max_history < 2**31):
            raise ValueError(f"max_history must be at least 1, or None for whole histories; got {max_history!r:.80}")
        self.max_history = max_history
        self.set_catalogue(catalogue)

    def set_catalogue(self, catalogue: ItemCatalogue | None) -> None:
        """
        Sets the processor's catalogue, e.g. a grown one.

        Raises:
            ValueError: its codebooks have other sizes than the tokenizer's.
        """
        if catalogue is not None and self.tokenizer.codebook_sizes != catalogue.codebook_sizes:
            raise ValueError(
                f"the tokenizer was made for codebooks of {self.tokenizer.codebook_sizes}, the catalogue has "
                f"{catalogue.codebook_sizes}; they belong to different models"
            )
        self.catalogue = catalogue

    @classmethod
    def from_catalogue(cls, catalogue: ItemCatalogue, max_history: int | None = None) -> OneRecProcessor:
        """A processor with a fresh tokenizer for the catalogue."""
        return cls(OneRecTokenizer(catalogue.codebook_sizes), catalogue, max_history)

    def __call__(
        self,
        histories: Sequence[Sequence],
        sessions: Sequence[Sequence] | None = None,
        max_history: int | None = None,
        unknown: str = "error",
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """
        Args:
            histories: per user, item ids, oldest first.
            sessions: per user, the items to learn, in order; lengths may differ.
            max_history: overrides the processor's own.
            unknown: "error" raises on an item id that the catalogue lacks; "skip" leaves it out and warns with the count.
            return_tensors: "pt".

        Returns:
            `input_ids`, `attention_mask` (users, items * (levels + 1)): `SEP a b c` per item, padded on the right; with sessions also
            `decoder_input_ids`, `decoder_attention_mask`, `labels` (users, items * (levels + 1) - 1): `BOS a b c BOS ...`, and labels
            that are -100 on BOS (it is given, never predicted) and padding. All int64.

        Raises:
            KeyError: an unknown item with `unknown="error"`.
            ValueError: an empty batch, an empty history or session (which users), or unequal numbers of histories and sessions.
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
        histories = _plain_lists(histories)
        if isinstance(histories, str) or any(isinstance(history, str | int) for history in histories):
            raise ValueError('histories must be a list of lists of item ids, one list per user, e.g. [["m17", "m4"]]')
        keep = max_history if max_history is not None else self.max_history
        rows, lengths = self._rows(histories, unknown, "history", keep)
        tokenizer = self.tokenizer
        inputs = self._write(rows, lengths, tokenizer.sep_token_id)
        data = {"input_ids": inputs, "attention_mask": (inputs != tokenizer.pad_token_id).long()}
        if sessions is not None:
            sessions = _plain_lists(sessions)
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
        rows, lengths = self._rows(_plain_lists(sessions), unknown, "session", None)
        written = self._write(rows, lengths, self.tokenizer.bos_token_id)
        decoder_input_ids = written[:, :-1].contiguous()
        special = (written == self.tokenizer.bos_token_id) | (written == self.tokenizer.pad_token_id)
        return {
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": (decoder_input_ids != self.tokenizer.pad_token_id).long(),
            "labels": written.masked_fill(special, -100)[:, 1:].contiguous(),
        }

    def _rows(self, lists, unknown, what, keep) -> tuple[np.ndarray, np.ndarray]:
        """Item indices of ragged lists, flattened, and their lengths; only the latest `keep` known items of each."""
        if not len(lists):
            raise ValueError(f"an empty batch: pass at least one {what}")
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        rows = self.catalogue.indices(
            [item for items in lists for item in items], unknown="mask" if unknown == "skip" else "error"
        )
        owner = np.repeat(np.arange(len(lists)), lengths)
        if (missing := rows < 0).any():
            warnings.warn(f"left out {int(missing.sum())} of {len(rows)} {what} items: not in the catalogue")
            rows, owner = rows[~missing], owner[~missing]
            lengths = np.bincount(owner, minlength=len(lists))
        if (lengths == 0).any():
            empty = np.flatnonzero(lengths == 0)
            raise ValueError(
                f"{len(empty)} of {len(lists)} users have an empty {what} (first: number {empty[0]}); leave these users out, or show "
                "them the most popular items: there is nothing to read about them"
            )
        if keep is not None:
            place_from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(rows))
            rows, owner = rows[place_from_end <= keep], owner[place_from_end <= keep]
            lengths = np.minimum(lengths, keep)
        return rows, lengths

    def _write(self, rows: np.ndarray, lengths: np.ndarray, separator: int) -> torch.Tensor:
        """(users, longest * (levels + 1)) tokens: separator and codes per item, padded on the right."""
        levels = len(self.tokenizer.codebook_sizes)
        item = np.empty((len(rows), levels + 1), dtype=np.int64)
        item[:, 0] = separator
        item[:, 1:] = self.catalogue.codes[rows] + np.asarray(self.tokenizer.level_offsets)
        written = np.full((len(lengths), int(lengths.max()), levels + 1), self.tokenizer.pad_token_id, dtype=np.int64)
        written[np.arange(written.shape[1]) < lengths[:, None]] = item
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
        return [*self.tokenizer.model_input_names, "decoder_input_ids", "decoder_attention_mask", "labels"]

    def to_dict(self):
        output = super().to_dict()
        output.pop("catalogue", None)  # saved in its file
        for place in ("items_file", "record_of"):
            output.pop(place, None)
        output.pop("include_code", None)  # what to save, not how to read
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, include_code: bool | None = None, **kwargs):
        """
        Writes the tokenizer's and the processor's configs, the item catalogue, the items table and the code. They are moved into the folder when all of
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
            with replacing_files(save_directory, last) as temporary:
                if self.catalogue is not None:
                    self.catalogue.save(os.path.join(temporary, CATALOGUE_NAME))
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
        except ValueError as error:
            raise ValueError(f"{pretrained_model_name_or_path}: {error}") from error
        processor.items_file = find_items(pretrained_model_name_or_path, **kwargs)
        repo = os.fspath(pretrained_model_name_or_path)
        processor.record_of = (os.path.abspath(repo) if os.path.isdir(repo) else repo, kwargs.get("revision"))
        return processor


def _plain_lists(lists):
    """Lists of item ids, also where they are tensors or arrays, all at once or one by one."""
    if isinstance(lists, torch.Tensor | np.ndarray):
        return lists.tolist()
    if any(isinstance(each, torch.Tensor | np.ndarray) for each in lists):
        return [each.tolist() if isinstance(each, torch.Tensor | np.ndarray) else each for each in lists]
    if any(isinstance(each, list) and isinstance(next(iter(each), None), torch.Tensor) for each in lists):
        return [[item.item() if isinstance(item, torch.Tensor) else item for item in each] for each in lists]
    return lists


__all__ = ["OneRecProcessor"]
