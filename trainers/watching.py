"""What held-out users get of a generator: rewards of its sessions, recall, variety, and the likelihood of the sessions that they had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from onerec_hf.data.collators import feature_columns, positive_items
from onerec_hf.data.windows import REQUEST_TIME
from onerec_hf.modeling.item_evidence import as_times
from onerec_hf.modeling.processing_onerec import OneRecProcessor
from onerec_hf.trainers.rewards import RewardFunction, reward_values
from onerec_hf.trainers.rollouts import code_places, legal_codes, token_log_probs

TOP_K = 10
_BATCH = 64


def with_items_left(examples: list[dict[str, Any]], processor: OneRecProcessor, count: int) -> list[dict[str, Any]]:
    """The examples of users who have this many items left to recommend."""
    catalogue: Any = processor.catalogue
    return [row for row in examples if catalogue.num_left(catalogue.indices(positive_items(row))) >= count]


def recommended_sessions(
    model: Any,
    processor: OneRecProcessor,
    examples: Sequence[Mapping[str, Any]],
    exclude_seen: bool = True,
    **options: Any,
) -> list[list]:
    """
    The sessions that the model recommends after the histories of examples.

    Args:
        exclude_seen: leave out the history's (positive) items.
        options: of `model.recommend`; by default one session of 10 beams.
    """
    found: list[list] = []
    with model.eval().packed_experts():
        for some in _batches(examples):
            inputs = processor([row["history"] for row in some], **feature_columns(processor, some))
            exclude = [positive_items(row) for row in some] if exclude_seen else None
            when = as_times([row.get(REQUEST_TIME) for row in some])
            sequences = model.recommend(**inputs, **{"num_beams": 10, **options}, exclude=exclude, request_times=when)
            found += processor.batch_decode(sequences)
    return found


def measured(
    model: Any,
    processor: OneRecProcessor,
    examples: Sequence[Mapping[str, Any]],
    judges: Mapping[str, list[RewardFunction]],
    exclude_seen: bool,
) -> dict[str, float]:
    """
    Rewards by judge (the sum of its functions), `recall@10` and `variety`, the share of distinct items in all sessions, of what a model recommends.

    NaN where a judge returns None for every session.

    Raises:
        ValueError: a reward that is not finite.
    """
    seen = [positive_items(row) for row in examples]
    sessions = recommended_sessions(model, processor, examples)
    rewards = {}
    for name, functions in judges.items():
        values = np.sum([reward_values(each, name, seen, sessions) for each in functions], axis=0)
        applies = values[~np.isnan(values)]  # None is a reward that does not apply
        rewards[name] = float(applies.mean()) if len(applies) else float("nan")
    one = {"session_length": 1, "num_beams": max(TOP_K, 32), "num_return_sequences": TOP_K}
    ranked = recommended_sessions(model, processor, examples, exclude_seen, **one)
    hits = []
    for place, row in enumerate(examples):
        found = {item for items in ranked[place * TOP_K : (place + 1) * TOP_K] for item in items}
        hits.append(len(found & set(row["session"])) / len(set(row["session"])))
    items = [item for session in sessions for item in session]
    return {**rewards, f"recall@{TOP_K}": float(np.mean(hits)), "variety": len(set(items)) / max(1, len(items))}


def draw_sessions(
    model: Any, processor: OneRecProcessor, examples: Sequence[Mapping[str, Any]], seed: int
) -> list[list]:
    """A session per example that the decoder draws: items of the catalogue, distinct, without those of the history (item scores left out)."""
    generator = torch.Generator(model.device).manual_seed(seed)
    decoder = {"item_score_weight": 0.0, "decoder_weight": 1.0}
    return recommended_sessions(
        model, processor, examples, num_beams=1, do_sample=True, generator=generator, **decoder
    )


@torch.no_grad()
def session_log_probs(
    model: Any,
    processor: OneRecProcessor,
    examples: Sequence[Mapping[str, Any]],
    sessions: Sequence[list],
    constrained: bool = False,
) -> list[np.ndarray]:
    """
    Per session after the history of its example the log-probabilities of its codes, (codes,) float64.

    Args:
        constrained: under the distribution that [`draw_sessions`] draws from; else under the softmax that next-token training has.
    """
    found: list[np.ndarray] = []
    model.eval()
    for start, some in zip(range(0, len(examples), _BATCH), _batches(examples), strict=True):
        theirs = list(sessions[start : start + _BATCH])
        batch = processor([row["history"] for row in some], theirs, **feature_columns(processor, some))
        batch = {name: value.to(model.device) for name, value in batch.items()}
        labels = batch["labels"]
        logits = model(**batch, use_cache=False).logits.float()
        if constrained:
            seen = model._rows_per_user([positive_items(row) for row in some], "exclude", len(some), "skip")
            sequences = torch.cat([batch["decoder_input_ids"], labels[:, -1:]], dim=1)
            places = code_places(labels.shape[1], model.config.tokens_per_item, labels.device)
            chosen, _ = token_log_probs(logits[:, places], sequences, places, legal=legal_codes(model, seen))
        else:
            logps = logits.log_softmax(-1)
            chosen = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0.0)
        codes = labels != -100
        found += [row[mask].double().cpu().numpy() for row, mask in zip(chosen, codes, strict=True)]
    return found


def _batches(examples: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
    return [examples[start : start + _BATCH] for start in range(0, len(examples), _BATCH)]
