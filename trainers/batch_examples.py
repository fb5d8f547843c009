"""What a batch of tensors says in item ids: the examples that a fault is about, for people to look at."""

from __future__ import annotations

from typing import Any

import torch

from onerec_hf.modeling.processing_onerec import OneRecProcessor


def batch_examples(batch: dict[str, Any], processing_class: Any = None, items: Any = None) -> list[dict[str, list]]:
    """
    The examples of a batch, as far as the model reads them (histories are cut to what the encoder gets).

    Args:
        batch: what a collator of this package made: windows, packed rows, prefixes, preferences, alignment, reward.
        processing_class: the [`OneRecProcessor`], or the tokenizer of a text model.
        items: the [`RewardItems`] of a reward model.

    Returns:
        per example `history` and `session` (or `chosen` and `rejected`), lists of item ids, None for tokens that name no item; of a
        text model's batch the token ids.

    Example:
        >>> from onerec_hf import ItemCatalogue, OneRecProcessor
        >>> catalogue = ItemCatalogue(["m4", "m17"], codes=[[0, 1], [1, 0]], codebook_sizes=[2, 2])
        >>> processor = OneRecProcessor.from_catalogue(catalogue)
        >>> batch_examples(processor([["m4", "m17"]], sessions=[["m4"]]), processor)
        [{'history': ['m4', 'm17'], 'session': ['m4']}]
    """
    batch = {name: value.detach().cpu() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    if "ntp" in batch:
        preferences = batch_examples(batch["pairs"], processing_class) if "pairs" in batch else []
        return [*batch_examples(batch["ntp"], processing_class), *preferences]
    if "session_input_ids" in batch:
        return [
            {"history": _ids(history, items), "session": _ids(session, items)}
            for history, session in zip(batch["input_ids"].tolist(), batch["session_input_ids"].tolist(), strict=True)
        ]
    if "encoder_input_ids" in batch:
        return _preferences(batch, processing_class)
    if not isinstance(processing_class, OneRecProcessor):
        return [{name: row.tolist()} for name, value in batch.items() if name == "input_ids" for row in value]
    sessions = processing_class.batch_decode(batch["labels"])
    if "history_ranges" not in batch:
        histories = _histories(batch["input_ids"], processing_class)
        return [{"history": history, "session": session} for history, session in zip(histories, sessions, strict=True)]
    slots = batch["history_ranges"].shape[1]
    written = (batch["labels"] != -100).any(1).tolist()
    ranges = batch["history_ranges"].flatten(0, 1).tolist()
    return [
        {
            "history": _histories(batch["input_ids"][slot // slots, None, begin:end], processing_class)[0],
            "session": session,
        }
        for slot, ((begin, end), session) in enumerate(zip(ranges, sessions, strict=True))
        if written[slot]
    ]


def _histories(tokens: torch.Tensor, processor: OneRecProcessor) -> list[list]:
    """Item ids of `SEP a b c` rows: sessions are written in the same way, with another token before each item."""
    tokenizer = processor.tokenizer
    return processor.batch_decode(tokens.masked_fill(tokens == tokenizer.sep_token_id, tokenizer.bos_token_id))


def _ids(rows: list[int], items) -> list:
    return [items.item_ids[row - 1] for row in rows if row > 0]


def _preferences(batch: dict[str, torch.Tensor], processing_class: Any) -> list[dict[str, list]]:
    prompts, answers = batch["encoder_input_ids"], batch["input_ids"]
    if isinstance(processing_class, OneRecProcessor):
        names = ("history", "chosen", "rejected")
        read, written = _histories(prompts, processing_class), processing_class.batch_decode(answers)
    else:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        read = [row[mask].tolist() for row, mask in zip(prompts, batch["encoder_attention_mask"].bool(), strict=True)]
        written = [row[mask].tolist() for row, mask in zip(answers, batch["completion_mask"].bool(), strict=True)]
    found, users = [], len(read)
    for user, prompt in enumerate(read):
        chosen, *rejected = written[user::users]
        found.append(dict(zip(names, (prompt, chosen, rejected[0] if len(rejected) == 1 else rejected), strict=True)))
    return found
