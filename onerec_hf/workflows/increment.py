"""Going on from a saved model with newer interactions: which rows it has not been trained on, and examples of those alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from onerec_hf.workflows.artefact import catalogue_of, load_processor, write_bytes
from onerec_hf.workflows.dataset import InMemoryDataset, RecommendationDataset, check_catalogue
from onerec_hf.workflows.distributed import say

#: What a model was trained on, beside it.
TRAINED_ON = "trained_on.json"


def write_trained_on(folder: Path, data: RecommendationDataset, refitted: bool) -> None:
    """Writes until when the interactions of a model go, and whether the last two items of each user were held out; not for a prepared folder."""
    if not isinstance(data, InMemoryDataset):
        return
    by_user = data.settings.holdout == "last"
    sequences = data.sequences if refitted or by_user else data.train_sequences
    content = {
        "until": int(sequences.timestamps.max()),
        "interactions": len(sequences.item_ids),
        "users": len(sequences),
        "held_out": 2 if by_user and not refitted else 0,
    }
    write_bytes(folder / TRAINED_ON, (json.dumps(content) + "\n").encode())


def newer(data: InMemoryDataset, model: str, name: str | None = None) -> InMemoryDataset:
    """
    The dataset for going on from a saved model: training examples whose sessions hold an item that the model has not been trained on, and held-out
    items that it has not seen. Rows of items that the model's catalogue lacks are left out and counted. Without newer rows, or for a model that does
    not say what it was trained on, the dataset stays as it is.

    Args:
        model: folder or Hub id of a model that `train` wrote.
        name: of the model in messages.

    Raises:
        ValueError: items that the model should know are not in its catalogue, or no user has a newer item to evaluate on.
    """
    trained_on = _read(model)
    if trained_on is None:
        return data
    if data.settings.holdout != "last":
        say(
            f"--model {model}: with --holdout {data.settings.holdout} all training interactions are read again, not the newer ones alone"
        )
        return data
    until, sequences = trained_on["until"], data.sequences
    catalogue, name = catalogue_of(load_processor("--model", model)), name or model
    old = sequences.timestamps <= until
    ids, codes = np.unique(sequences.item_ids, return_inverse=True)
    frequent = np.bincount(codes[old], minlength=len(ids)) >= data.settings.min_item_interactions
    check_catalogue(f"--model {name}", catalogue, replace(data, item_ids=ids[frequent]), may_choose=True)
    known = catalogue.indices(sequences.item_ids, unknown="mask") >= 0
    if not (known & ~old).any():
        say(f"--model {name}: {_nothing_new(trained_on, sequences, known)}")
        return data if known.all() else _examples(data, sequences.where(known), None, "The model's own items")
    kept = sequences.where(known)
    before = _per_user(kept, kept.timestamps <= until)
    held_out = trained_on["held_out"]
    trained = np.where(before >= 3, before - held_out, before)
    return _examples(data, kept, trained, _counts(name, sequences, kept, known, until, trained_on))


def _read(model: str) -> dict | None:
    from transformers.utils.hub import cached_file

    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(model, TRAINED_ON, **quietly)
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return {name: int(content[name]) for name in ("until", "interactions", "users", "held_out")}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"--model {model}: {TRAINED_ON} is damaged ({error}); remove it to train on all rows"
        ) from error


def _per_user(sequences, rows: np.ndarray) -> np.ndarray:
    """(U,) number of each user's rows where the mask is true."""
    return np.bincount(sequences.user_rows[rows], minlength=len(sequences))


def _nothing_new(trained_on: dict, sequences, known: np.ndarray) -> str:
    """What is said of data without newer rows of known items."""
    text = (
        "no row of its items is newer than those that it was trained on; it is trained on the same interactions again"
    )
    if not known.all():
        text += f", {_left_out(sequences, known)}"
    if not trained_on["held_out"]:
        text += ". It was refitted on the held-out items, so that the metrics here are of items it has seen"
    return text


def _left_out(sequences, known: np.ndarray) -> str:
    items = len(np.unique(sequences.item_ids[~known]))
    return f"{int((~known).sum()):,} rows of {items:,} items that its catalogue lacks are left out"


def _counts(model: str, sequences, kept, known: np.ndarray, until: int, trained_on: dict) -> str:
    """What is new, for the message."""
    late = kept.timestamps > until
    users = int((_per_user(kept, late) == kept.lengths).sum())
    text = (
        f"--model {model}: {int(late.sum()):,} rows are newer than those that it was trained on, {users:,} new users"
    )
    if not known.all():
        text += f"; {_left_out(sequences, known)}"
    missed = int((~late).sum()) - trained_on["interactions"]
    if missed > 0:
        text += f"; {missed:,} rows that are not newer were not in its data either, and are read as history only"
    return text


def _examples(data: InMemoryDataset, kept, trained: np.ndarray | None, counts: str) -> InMemoryDataset:
    """The examples of rows behind the first `trained` ones of each user, or of all rows."""
    from onerec_hf.data import window_examples
    from onerec_hf.data.splits import LeaveOneOutSplit, hold_out_last_two, last_items

    settings, behind = data.settings, 0 if trained is None else trained
    kept = kept.reading(kept.item_counts()[0])
    train_sequences, held_out = hold_out_last_two(kept)
    train = window_examples(train_sequences, settings.session_length, settings.max_history, settings.stride, trained)
    validation, test = (
        last_items(kept, held_out & (kept.lengths - 1 - before_end >= behind), before_end, times=True)
        for before_end in (1, 0)
    )
    if not len(train) or not len(test):
        what = "training sessions" if not len(train) else "user with a newer item to evaluate on"
        raise ValueError(
            f"{counts}. That gives no {what}: the last two items of each user are held out. Add more interactions, or train anew without --model"
        )
    which = "all windows" if trained is None else "windows with items that it was not trained on"
    description = f"Going on from a model: the {len(train):,} training examples are {which}; {len(validation):,} validation and {len(test):,} test users."
    say(f"{counts}. {description}")
    split = LeaveOneOutSplit(train, validation, test, train_sequences, description)
    return replace(
        data,
        sequences=kept,
        split=split,
        item_ids=kept.item_counts()[0],
        protocol=f"{data.protocol} {description}",
        trained=trained,
    )
