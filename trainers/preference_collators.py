"""Collators of preference pairs: decoder-first batches, chosen rows first, then rejected rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from trl.trainer.utils import pad

from onerec_hf.data.collators import feature_columns
from onerec_hf.modeling.feature_codes import BESIDE_HISTORIES

if TYPE_CHECKING:
    from onerec_hf.modeling.processing_onerec import OneRecProcessor

_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


def _with_reference(batch: dict[str, torch.Tensor], examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Adds the reference's log-probabilities if the dataset has them."""
    return batch | {
        name: torch.tensor([example[name] for example in examples]) for name in _REFERENCE if name in examples[0]
    }


def _in_rows(chosen: list[list], rejected: list[list]) -> list[list]:
    """Chosen rows, then rejected rows. With several rejected answers per example: all first ones, then all second ones, ..."""
    if not (rejected[0] and isinstance(rejected[0][0], list)):
        return [*chosen, *rejected]
    counts = {len(several) for several in rejected}
    if len(counts) > 1:
        raise ValueError(
            f"examples of a batch have {min(counts)} to {max(counts)} rejected answers; pass the same number for every example"
        )
    return [*chosen, *(answer for answers in zip(*rejected, strict=True) for answer in answers)]


@dataclass
class Seq2SeqPreferenceCollator:
    """
    Batches tokenized preference rows of an encoder-decoder text model.

    Args:
        pad_token_id, decoder_start_token_id: token ids of the model.
        max_length: answers are truncated to their first `max_length` tokens.
        pad_to_multiple_of: pad encoder and decoder inputs to a multiple of this length, for few shapes.

    Returns:
        int64 tensors: `input_ids`, `attention_mask`, `completion_mask` (2B, 1 + T), the decoder's, with its start token;
        `encoder_input_ids`, `encoder_attention_mask` (B, S); and the reference's log-probabilities (B,), if the rows have them. With
        several rejected answers per row, (1 + N) * B decoder rows.

    Example:
        >>> collator = Seq2SeqPreferenceCollator(pad_token_id=0, decoder_start_token_id=0)
        >>> batch = collator([{"prompt_ids": [5, 1], "chosen_ids": [7, 8, 1], "rejected_ids": [9, 1]}])
        >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
        ([[0, 7, 8, 1], [0, 9, 1, 0]], [[0, 1, 1, 1], [0, 1, 1, 0]])
        >>> batch["encoder_input_ids"].tolist()
        [[5, 1]]
    """

    pad_token_id: int
    decoder_start_token_id: int
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts = [example["prompt_ids"] for example in examples]
        answers = _in_rows([row["chosen_ids"] for row in examples], [row["rejected_ids"] for row in examples])
        answers = [answer[: self.max_length] for answer in answers]
        batch = {
            "input_ids": self._pad([[self.decoder_start_token_id, *answer] for answer in answers], self.pad_token_id),
            "attention_mask": self._pad([[1] * (1 + len(answer)) for answer in answers], 0),
            "completion_mask": self._pad([[0] + [1] * len(answer) for answer in answers], 0),
            "encoder_input_ids": self._pad(prompts, self.pad_token_id),
            "encoder_attention_mask": self._pad([[1] * len(prompt) for prompt in prompts], 0),
        }
        return _with_reference(batch, examples)

    def _pad(self, rows: list[list[int]], value: int) -> torch.Tensor:
        return pad(
            [torch.tensor(row, dtype=torch.long) for row in rows],
            padding_value=value,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
        )


@dataclass
class OneRecPreferenceCollator:
    """
    Batches preference rows of a OneRec model: `history`, `chosen` and `rejected`, lists of item ids; or several rejected sessions per
    row. Reads a history as the processor does, its latest `max_history` items.

    Args:
        processor: the model's processor, with its catalogue.

    Returns:
        As [`Seq2SeqPreferenceCollator`]; decoder rows are `BOS a b c BOS a b c`, and `completion_mask` is 1 on codes: a BOS is given, never
        predicted. With features also `feature_ids` (B, places, slots), of the encoder.

    Example:
        >>> from onerec_hf import ItemCatalogue, OneRecProcessor
        >>> catalogue = ItemCatalogue([7, 8, 9], codes=[[0, 1], [1, 0], [1, 1]], codebook_sizes=[2, 2])
        >>> collator = OneRecPreferenceCollator(OneRecProcessor.from_catalogue(catalogue))
        >>> batch = collator([{"history": [7], "chosen": [8, 9], "rejected": [9]}])
        >>> batch["input_ids"].tolist()
        [[1, 5, 6, 1, 5, 7], [1, 5, 7, 0, 0, 0]]
        >>> batch["completion_mask"].tolist()
        [[0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0]]
    """

    processor: OneRecProcessor

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sessions = _in_rows([row["chosen"] for row in examples], [row["rejected"] for row in examples])
        histories = [example["history"] for example in examples]
        history = self.processor(histories, **feature_columns(self.processor, examples))
        encoded = self.processor.sessions(sessions)
        inputs, labels = encoded["decoder_input_ids"], encoded["labels"]
        # TRL shifts the sequence itself, while the processor returns shifted inputs and labels.
        input_ids = torch.cat([inputs, labels[:, -1:].clamp(min=0)], dim=1)
        batch = {
            "input_ids": input_ids,
            "attention_mask": (input_ids != self.processor.tokenizer.pad_token_id).long(),
            "completion_mask": torch.nn.functional.pad((labels != -100).long(), (1, 0)),
            "encoder_input_ids": history["input_ids"],
            "encoder_attention_mask": history["attention_mask"],
        }
        batch |= {name: history[name] for name in BESIDE_HISTORIES if name in history}
        return _with_reference(batch, examples)
