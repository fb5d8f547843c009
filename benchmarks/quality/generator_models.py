"""Splits, models and rankings of benchmarks/quality/generator.py."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.harness import say
from benchmarks.quality.runs import parsed

BATCH = 100
# The recipe's generator, one that trains in two minutes on one core, and what --quick makes of them.
FULL = {"save_strategy": "no", "report_to": "none"}
SMALL = {**FULL, "hidden_size": 64, "intermediate_size": 128, "num_train_epochs": 2}
QUICK = {"hidden_size": 16, "num_attention_heads": 2, "kmeans_iterations": 3, "max_steps": 3}
# Rankings by the item head alone (no decoder runs), by the decoder alone, and by both.
WAYS: dict[str, dict[str, Any]] = {
    "head": {"item_score_weight": 1.0, "decoder_weight": 0.0},
    "decoder": {"item_score_weight": 0.0, "decoder_weight": 1.0},
    "both": {"item_score_weight": 8.0, "decoder_weight": 1.0},
}
SASREC = {
    "architecture": "sasrec",
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "dropout_rate": 0.3,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 128,
    "label_smoothing_factor": 0.1,
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 6,
}


@dataclass
class HeldOut:
    """
    Users whose last items no model has seen.

    Args:
        data: the data set, its training sequences without them.
        histories, targets: (users) lists of item ids.
    """

    data: Any
    histories: list[list]
    targets: list[list]


def hold_out_last(data, count: int, users: int, seed: int = 0) -> HeldOut:
    """The last `count` items of some users with at least three more; the other users train with all of theirs."""
    sequences = data.sequences
    able = np.flatnonzero(sequences.lengths >= count + 3)
    chosen = np.sort(np.random.default_rng(seed).permutation(able)[:users])
    from_end = sequences.offsets[1:][sequences.user_rows] - np.arange(len(sequences.item_ids))
    held = np.isin(sequences.user_rows, chosen) & (from_end <= count)
    lists = [sequences[user].tolist() for user in chosen]
    return HeldOut(
        training_on(data, sequences.where(~held)),
        [items[:-count] for items in lists],
        [items[-count:] for items in lists],
    )


def hold_out_items(data, share: float, users: int, seed: int = 0) -> tuple[HeldOut, HeldOut, np.ndarray]:
    """
    A share of the items that no model has seen: they join the catalogue after the training.

    Returns:
        users whose next item is one of them, users whose next item is another one (their last), and the items. Histories hold other items only.
    """
    sequences, rng = data.sequences, np.random.default_rng(seed)
    new = np.sort(rng.permutation(data.item_ids)[: int(share * len(data.item_ids))])
    is_new = np.isin(sequences.item_ids, new)
    chosen, cold, warm = [], [], []
    for user in rng.permutation(len(sequences)):
        items, fresh = sequences[user].tolist(), is_new[sequences.offsets[user] : sequences.offsets[user + 1]]
        known = [item for item, is_fresh in zip(items, fresh, strict=True) if not is_fresh]
        at = np.flatnonzero(fresh)
        if len(at) and len(cold) < users:
            before = [item for item in items[: at[-1]] if item in set(known)]
            if len(before) >= 2:
                cold.append((before, [items[at[-1]]]))
                continue
        if len(known) >= 4 and len(warm) < users:
            chosen.append(user)
            warm.append((known[:-1], known[-1:]))
    lasts = sequences.offsets[1:][chosen] - 1
    while (moved := is_new[lasts]).any():  # the last item that is not new
        lasts = lasts - moved
    keep = ~is_new
    keep[lasts] = False
    data = training_on(replace(data, item_ids=np.setdiff1d(data.item_ids, new)), sequences.where(keep))
    return HeldOut(data, *_columns(cold)), HeldOut(data, *_columns(warm)), new


def _columns(pairs: list) -> tuple[list, list]:
    return [history for history, _ in pairs], [target for _, target in pairs]


def split_items(data, copies: int):
    """
    The data set with `copies` items in place of each: a user meets the one that a hash of the user names. Item `i * copies + c` is copy c of
    item i.
    """
    sequences = data.sequences
    copy = (sequences.user_ids * 2654435761 % 2**32 % copies)[sequences.user_rows]
    sequences = replace(sequences, item_ids=sequences.item_ids * copies + copy)
    ids = (data.item_ids[:, None] * copies + np.arange(copies)).ravel()
    return replace(data, sequences=sequences, item_ids=ids)


def training_on(data, sequences):
    """The data set with these training sequences; its held-out examples are not used."""
    return replace(data, split=replace(data.split, train_sequences=sequences))


def train_onerec(
    data, config: list[str], settings: dict[str, Any], folder: str, catalogue=None, content: bool = False
) -> tuple[Any, Any]:
    """
    A generator, trained on all sessions of the training sequences, or the one that an earlier run left in the folder.

    Args:
        config: options of `onerec-hf train` that name the recipe and the data.
        settings: over the recipe's.
        catalogue: semantic IDs; fitted when not given.
        content: the item head reads content vectors ([`content_of`]).

    Returns:
        model and processor.
    """
    from transformers import set_seed

    from onerec_hf import OneRecForConditionalGeneration, OneRecProcessor
    from onerec_hf.data import prefix_examples
    from onerec_hf.trainers import OneRecTrainer
    from onerec_hf.workflows.artefact import new_model
    from onerec_hf.workflows.semantic_ids import fit_catalogue

    if not Path(folder, "config.json").exists():
        data_args, id_args, model_args, _, training_args = parsed(config, settings)
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        set_seed(0)
        if catalogue is None:
            fitted = fit_catalogue(data, id_args)
            fitted.quantizer.save(f"{folder}-quantizer.safetensors")
            catalogue = fitted.catalogue
        processor = OneRecProcessor.from_catalogue(catalogue, max_history=data_args.max_history)
        given = content_of(data.items, catalogue.item_ids) if content else None
        model = new_model(model_args, processor, data_args.session_length, given)
        train = prefix_examples(
            data.train_sequences, data_args.session_length, data_args.max_history, data_args.stride
        )
        with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
            training_args.output_dir, training_args.disable_tqdm = scratch, True
            trainer = OneRecTrainer(model, training_args, train_dataset=train, processing_class=processor)
            trainer.train()
        say(f"{folder}: {model.num_parameters():,} parameters, {trainer.state.global_step} steps")
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    model = cast(Any, OneRecForConditionalGeneration.from_pretrained(folder))
    return model.eval(), OneRecProcessor.from_pretrained(folder)


def content_of(items, item_ids: Sequence) -> np.ndarray:
    """(items, d) content vectors of length 1."""
    vectors = np.asarray(items.select(np.asarray(item_ids)).embeddings, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def train_sasrec(data, max_history: int, quick: bool):
    """A SASRec on the same training sequences."""
    from onerec_hf.trainers import fit_sequential

    settings = {**SASREC, **({"hidden_size": 16, "max_steps": 3} if quick else {})}
    sequences: list[Any] = data.train_sequences.lists()
    with contextlib.redirect_stdout(sys.stderr):
        return fit_sequential(
            sequences,
            item_ids=data.item_ids.tolist(),
            max_history=max_history,
            seed=0,
            **settings,
        )


def batches(histories: Sequence) -> Iterator[Sequence]:
    """`BATCH` histories at a time."""
    for start in range(0, len(histories), BATCH):
        yield histories[start : start + BATCH]


def ranking(
    model, processor, histories: Sequence[list], k: int = 10, exclude_seen: bool = True, **arguments
) -> np.ndarray:
    """(users, k) item indices, best first, by `recommend()` with sessions of one item."""
    found = []
    for some in batches(histories):
        excluded = some if exclude_seen else None
        out = model.recommend(
            **processor(some), exclude=excluded, session_length=1, num_beams=50, num_return_sequences=k, **arguments
        )
        found.append(processor.item_indices(out).view(len(some), k).numpy())
    return np.concatenate(found)


def sessions(model, processor, histories: Sequence[list], count: int = 1, exclude_seen: bool = True, **arguments):
    """(users, count, items) item indices and (users, count) log-probabilities of sessions by `recommend()`."""
    arguments = {"num_beams": 50, "session_length": 5, "num_return_sequences": count, **arguments}
    rows, scores = [], []
    for some in batches(histories):
        excluded = some if exclude_seen else None
        out = model.recommend(**processor(some), exclude=excluded, return_dict_in_generate=True, **arguments)
        rows.append(processor.item_indices(out.sequences).view(len(some), count, -1).numpy())
        scores.append(out.sequences_scores.view(-1, count).numpy())
    return np.concatenate(rows), np.concatenate(scores)
