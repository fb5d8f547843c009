"""Collators: rows of item ids to padded model inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onerec_hf.data.windows import REQUEST_TIME
from onerec_hf.modeling.feature_codes import FEATURE_COLUMNS
from onerec_hf.modeling.item_evidence import as_times

if TYPE_CHECKING:
    from onerec_hf.modeling.processing_onerec import OneRecProcessor


@dataclass
class OneRecDataCollator:
    """
    Batches examples with the columns `history` and, for training, `session` (lists of item ids, oldest first).

    The encoder reads the latest `max_history` items of a history (default: the processor's `max_history`). For a processor with features, examples
    also have the columns that its schema reads ([`feature_columns`]). Examples with the column `request_time` give `request_times` for `recommend()`.

    Args:
        processor: the model's processor, with its catalogue.
        max_history: history items to keep, the latest ones.
        with_seen: also return `exclude`, (users, e) int64 item indices of the *whole* history padded with -1, for
            `recommend(exclude=...)`: evaluation excludes every item that the user has seen, not only those that the encoder reads.
        unknown: "error" or "skip", as for the processor.
        pad_to_multiple_of: pad histories to a multiple of this number of items (with the place of user features), so that `torch.compile` sees few shapes.
        session_items: pad sessions to this number of items (default: the longest session of the batch).

    Example:
        >>> from onerec_hf import ItemCatalogue, OneRecProcessor
        >>> catalogue = ItemCatalogue([7, 8, 9], codes=[[0, 1], [1, 0], [1, 1]], codebook_sizes=[2, 2])
        >>> collator = OneRecDataCollator(OneRecProcessor.from_catalogue(catalogue), max_history=1, with_seen=True)
        >>> batch = collator([{"history": [7, 8], "session": [9]}])
        >>> batch["input_ids"].tolist(), batch["exclude"].tolist()
        ([[3, 5, 6]], [[0, 1]])
    """

    processor: OneRecProcessor
    max_history: int | None = None
    with_seen: bool = False
    unknown: str = "error"
    pad_to_multiple_of: int | None = None
    session_items: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        histories = [example["history"] for example in examples]
        sessions = [example["session"] for example in examples] if "session" in examples[0] else None
        options = {"max_history": self.max_history, "unknown": self.unknown}
        batch = dict(self.processor(histories, sessions, **options, **feature_columns(self.processor, examples)))
        width = len(self.processor.tokenizer.codebook_sizes) + 1
        if self.pad_to_multiple_of is not None:
            missing = -batch["input_ids"].shape[1] % (self.pad_to_multiple_of * width)
            batch |= _padded(batch, ("input_ids", "attention_mask"), missing)
            if "feature_ids" in batch:
                batch["feature_ids"] = torch.nn.functional.pad(batch["feature_ids"], (0, 0, 0, missing // width))
        if self.session_items is not None and sessions is not None:
            missing = self.session_items * width - 1 - batch["labels"].shape[1]
            batch |= _padded(batch, ("decoder_input_ids", "decoder_attention_mask", "labels"), missing)
        if self.with_seen:
            batch["exclude"] = self._seen([positive_items(example) for example in examples])
        if (times := as_times([example.get(REQUEST_TIME) for example in examples])) is not None:
            batch["request_times"] = times
        return batch

    def _seen(self, histories) -> torch.Tensor:
        lengths = np.fromiter(map(len, histories), np.int64, len(histories))
        seen = np.full((len(histories), lengths.max()), -1, dtype=np.int64)
        assert self.processor.catalogue is not None  # the processor needed it to encode the histories
        seen[np.arange(seen.shape[1]) < lengths[:, None]] = self.processor.catalogue.indices(
            [item for history in histories for item in history], unknown="mask"
        )
        return torch.from_numpy(seen)


def positive_items(example: Mapping[str, Any]) -> list:
    """The items that the user has had: the history without interactions that are not positive."""
    flags = example.get("history_positive")
    return example["history"] if flags is None else list(compress(example["history"], flags))


def feature_columns(processor: OneRecProcessor, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    What the processor's features need of examples: the column `user_features` where its schema has user features, and `history_features` where it has
    features of interactions. Empty for a processor without features.

    Raises:
        ValueError: examples without such a column: the model would train on missing values.

    Example:
        >>> from onerec_hf import ItemCatalogue, OneRecProcessor
        >>> processor = OneRecProcessor.from_catalogue(ItemCatalogue([7], codes=[[0]], codebook_sizes=[2]))
        >>> feature_columns(processor, [{"history": [7]}])
        {}
    """
    schema = processor.features
    if schema is None:
        return {}
    needed = [name for name, of in zip(FEATURE_COLUMNS, (schema.user, schema.interaction), strict=True) if of]
    lacking = [name for name in needed for example in examples if name not in example]
    if lacking:
        raise ValueError(
            f"{len(lacking)} examples lack the column {lacking[0]!r} that the processor's features need (found: {', '.join(examples[0])}). Prepare the "
            "data with these features; None in the column is a missing value"
        )
    return {name: [example[name] for example in examples] for name in needed}


_PADDING = {"labels": -100}  # all other tensors are padded with 0: <pad>, masked


def _padded(batch: dict[str, torch.Tensor], names: tuple[str, ...], missing: int) -> dict[str, torch.Tensor]:
    return {name: torch.nn.functional.pad(batch[name], (0, missing), value=_PADDING.get(name, 0)) for name in names}


PREFIXES_OF_PATHWAYS = (
    "prefixes share one reading of a history, and the short-term pathway differs for each target: train on windows (--train_on windows), or without "
    "pathways"
)


@dataclass
class PackedDataCollator:
    """
    Batches the packed rows of a [`PackedDataset`], or plain examples, one per row: windows (`history`, `session`) or prefixes (`history`,
    `sessions`, `history_lengths`).

    Args:
        processor: the model's processor; a window keeps the latest `processor.max_history` items of its history.
        encoder_is_causal: `config.encoder_is_causal` of the model. A fully visible encoder cannot train on prefixes.
        items, slots, session_items: history items per row, sessions per row, items per session (default: what the batch needs).
        rows: rows per batch; a smaller batch (the last of an epoch) is padded.
        pad_to_multiple_of: round `items` and `slots` up to a multiple of this number where they are not given.

    Returns:
        int64 tensors: `input_ids` and `segment_ids` (B, items * (levels + 1)), `feature_ids` (B, items, slots) where the processor has features, whose
        users take the place of one item; `history_ranges` (B, slots, 2); `decoder_input_ids`,
        `decoder_attention_mask` and `labels` (B * slots, session_items * (levels + 1) - 1).

    Raises:
        ValueError: prefixes with a fully visible encoder or with pathways, examples that exceed the batch shape, or a processor with a lifelong pathway.

    Example:
        >>> from onerec_hf import ItemCatalogue, OneRecProcessor
        >>> catalogue = ItemCatalogue([7, 8, 9], codes=[[0, 1], [1, 0], [1, 1]], codebook_sizes=[2, 2])
        >>> collator = PackedDataCollator(OneRecProcessor.from_catalogue(catalogue), encoder_is_causal=True)
        >>> batch = collator([{"history": [7, 8], "sessions": [[8], [9]], "history_lengths": [1, 2]}])
        >>> batch["input_ids"].tolist(), batch["history_ranges"].tolist()
        ([[3, 4, 7, 3, 5, 6]], [[[0, 3], [0, 6]]])
        >>> batch["labels"].tolist()
        [[5, 6], [5, 7]]
    """

    processor: OneRecProcessor
    encoder_is_causal: bool
    items: int | None = None
    slots: int | None = None
    session_items: int | None = None
    rows: int | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.processor.lifelong is not None:
            raise ValueError(
                "a lifelong pathway reads one history per row: train on windows with OneRecDataCollator, without packing and prefixes"
            )
        packs = [feature.get("examples", [feature]) for feature in features]
        segments = [example for pack in packs for example in pack]
        sessions = [example.get("sessions") or [example["session"]] for example in segments]
        histories = [example["history"] for example in segments]
        read = [
            example.get("history_lengths") or [len(history)]
            for example, history in zip(segments, histories, strict=True)
        ]
        self._check(histories, read)
        width = len(self.processor.tokenizer.codebook_sizes) + 1
        inputs = self.processor(histories, **feature_columns(self.processor, segments))
        static = self.processor.static_places
        lengths = (inputs["attention_mask"].sum(1) // width).numpy()  # items, cut to max_history, and the user's place
        counts = np.fromiter(map(len, sessions), np.int64, len(sessions))
        row = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])
        begins, first_slots = _starts_in_rows(lengths, row), _starts_in_rows(counts, row)
        multiple = self.pad_to_multiple_of or 1
        needed = len(packs), int((begins + lengths).max()), int((first_slots + counts).max())
        batch = self.rows or needed[0]
        items, slots = (
            given or -(-need // multiple) * multiple
            for given, need in zip((self.items, self.slots), needed[1:], strict=True)
        )
        if needed[0] > batch or needed[1] > items or needed[2] > slots:
            raise ValueError(
                f"{needed[0]} rows of up to {needed[1]} history items and {needed[2]} sessions do not fit into a batch of {batch} rows of "
                f"{items} items and {slots} sessions; raise items, slots or rows"
            )
        flat = np.repeat(row * items + begins - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        tokens = torch.full((batch * items, width), self.processor.tokenizer.pad_token_id)
        tokens[flat] = inputs["input_ids"][inputs["attention_mask"].bool()].view(-1, width)
        segment_ids = torch.zeros(batch * items, dtype=torch.int64)
        segment_ids[flat] = torch.from_numpy(np.repeat(np.arange(len(row)) - np.searchsorted(row, row) + 1, lengths))
        slot = np.repeat(row * slots + first_slots - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        # A window reads its (cut) history, a prefix its `history_lengths`.
        reads = np.repeat(lengths, counts)
        if self.processor.pathways is None:
            reads = np.minimum(np.concatenate(read) + static, reads)
        ranges = torch.tensor([0, 1]).repeat(batch * slots, 1)
        ranges[slot] = torch.from_numpy(np.repeat(begins, counts)[:, None] + np.stack([0 * reads, reads], 1)) * width
        codes_of: dict[str, torch.Tensor] = {}
        if "feature_ids" in inputs:
            codes = torch.zeros(batch * items, inputs["feature_ids"].shape[2], dtype=torch.int64)
            codes[flat] = inputs["feature_ids"][inputs["attention_mask"][:, ::width].bool()]
            codes_of["feature_ids"] = codes.view(batch, items, -1)
        return {
            "input_ids": tokens.view(batch, -1),
            **codes_of,
            "segment_ids": segment_ids.repeat_interleave(width).view(batch, -1),
            "history_ranges": ranges.view(batch, slots, 2),
            **self._decoder([session for group in sessions for session in group], slot, batch * slots),
        }

    def _check(self, histories, read) -> None:
        whole = all(
            length == len(history) for history, lengths in zip(histories, read, strict=True) for length in lengths
        )
        if whole:
            return
        if self.processor.pathways is not None:
            raise ValueError(PREFIXES_OF_PATHWAYS)
        if not self.encoder_is_causal:
            raise ValueError(
                "prefixes need a causal encoder: a fully visible encoder also reads the items after a prefix, which are the targets. Create "
                "the model with encoder_is_causal=True, or train on windows"
            )
        longest, limit = max(map(len, histories)), self.processor.max_history
        if limit is not None and longest > limit:
            raise ValueError(
                f"prefixes of a history of {longest} items exceed the processor's max_history of {limit}; create them with "
                f"prefix_examples(..., max_history={limit})"
            )

    def _decoder(self, sessions, slot, total) -> dict[str, torch.Tensor]:
        """Decoder tensors of the sessions, one per slot; empty slots are padded."""
        tokenizer = self.processor.tokenizer
        encoded = self.processor.sessions(sessions)
        width = len(tokenizer.codebook_sizes) + 1
        length = encoded["labels"].shape[1] if self.session_items is None else self.session_items * width - 1
        placed = {name: torch.full((total, length), _PADDING.get(name, 0)) for name in encoded}
        for name, value in encoded.items():
            placed[name][slot, : value.shape[1]] = value
        return placed


def draw_sessions(
    batch: dict[str, torch.Tensor], share: float, generator: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """
    A random share of the sessions of a packed batch for the decoder, and all of them for the item head, whose loss needs no decoder.

    Args:
        batch: of [`PackedDataCollator`].
        share: probability of a session to be drawn, above 0 and below 1. At least one session of a batch is drawn.
        generator: on the CPU.

    Returns:
        the batch with `ceil(share * slots)` slots: `history_ranges` (B, drawn slots, 2) and the decoder's tensors (B * drawn slots, t). All
        sessions are in `item_ranges` (B, slots, 2) and `item_targets` (B * slots, t), the former `history_ranges` and `labels`, and
        `item_code_tokens` is the number of their code tokens.

    Example:
        >>> ranges = torch.tensor([[[0, 3], [0, 6], [0, 9], [0, 12]]])
        >>> batch = {"history_ranges": ranges, "labels": torch.tensor([[3, 4], [5, 6], [7, 8], [9, 10]])}
        >>> drawn = draw_sessions(batch, share=0.5, generator=torch.Generator().manual_seed(0))
        >>> drawn["history_ranges"].shape, drawn["labels"].shape, drawn["item_targets"].shape
        (torch.Size([1, 2, 2]), torch.Size([2, 2]), torch.Size([4, 2]))
    """
    ranges, labels = batch["history_ranges"], batch["labels"]
    rows, slots = ranges.shape[:2]
    random = torch.rand(rows, slots + 1, generator=generator).to(ranges.device)
    filled = (labels[:, 0] != -100).view(rows, slots)
    # Rounded up or down at random, so that each session is drawn with the same probability, however many its row has.
    counts = (share * filled.sum(1) + random[:, -1]).long()
    counts[filled.any(1).int().argmax()] += counts.sum() == 0
    # The first in a random order, empty slots last.
    drawn = random[:, :-1].masked_fill(~filled, 2.0).argsort(1)[:, : ceil(share * slots)]
    empty = torch.arange(drawn.shape[1], device=drawn.device) >= counts[:, None]
    flat = (drawn + slots * torch.arange(rows, device=drawn.device)[:, None]).flatten()
    smaller = {
        name: batch[name][flat].masked_fill(empty.view(-1, 1), _PADDING.get(name, 0))
        for name in ("decoder_input_ids", "decoder_attention_mask", "labels")
        if name in batch
    }
    one_token = torch.tensor([0, 1], device=ranges.device)
    return {
        **batch,
        **smaller,
        "history_ranges": ranges.flatten(0, 1)[flat].view(*drawn.shape, 2).where(~empty[..., None], one_token),
        "item_ranges": ranges,
        "item_targets": labels,
        "item_code_tokens": (labels != -100).sum(),
    }


def _starts_in_rows(sizes: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Offset of each part inside its row, from the parts' sizes and their (sorted) row numbers."""
    starts = np.cumsum(sizes) - sizes
    return starts - starts[np.searchsorted(row, row)]
