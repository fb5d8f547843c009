"""Training once more on all interactions: the model that is deployed has seen the held-out items too."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onerec_hf.workflows.artefact import catalogue_of, save_processor, save_trained
from onerec_hf.workflows.dataset import InMemoryDataset, RecommendationDataset
from onerec_hf.workflows.distributed import is_first, say, wait

if TYPE_CHECKING:
    from collections.abc import Callable

    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

# Inside the model's folder: never uploaded, and removed with the checkpoints of a killed run.
_FOLDER = Path("checkpoints") / "refit"


@dataclass(frozen=True)
class Refit:
    """
    What a refitted model was trained on, for results and card.

    Args:
        interactions: all of them, of which none is held out.
        steps: optimizer steps.
    """

    interactions: int
    steps: int

    @property
    def facts(self) -> dict[str, Any]:
        """For `results.json`."""
        return {"interactions": self.interactions, "steps": self.steps, "note": self.note}

    @property
    def note(self) -> str:
        """Which numbers are of which model, in one sentence or two."""
        return (
            "The metrics are of the model that was trained without the held-out items. The weights here were then trained once more with the same "
            f"settings on all {self.interactions:,} interactions ({self.steps:,} steps), so nothing is left to evaluate them on."
        )


def growth(data: RecommendationDataset) -> float:
    """
    All interactions of a dataset relative to its training interactions.

    Raises:
        ValueError: a prepared folder.
    """
    if not isinstance(data, InMemoryDataset):
        raise ValueError(
            "--refit goes with --interactions: the shards of a prepared folder hold the training rows only"
        )
    return len(data.sequences.item_ids) / len(data.train_sequences.item_ids)


def everything(data: InMemoryDataset) -> InMemoryDataset:
    """
    The dataset with all interactions for training, the held-out ones too.

    Args:
        data: on windows or on prefixes, which stays so.
    """
    from onerec_hf.data import window_examples

    settings = data.settings
    windows = window_examples(
        data.sequences, settings.session_length, settings.max_history, settings.stride, data.trained
    )
    whole = replace(data, split=replace(data.split, train=windows, train_sequences=data.sequences))
    return whole.on_prefixes() if "history_lengths" in data.train.column_names else whole


def refit(
    trainer: OneRecTrainer,
    data: RecommendationDataset,
    folder: Path,
    args: OneRecTrainingArguments,
    train_again: Callable[..., OneRecTrainer],
) -> tuple[OneRecTrainer, Refit]:
    """
    Trains a model with the settings of a finished training on all interactions, as many epochs as that one, and puts it into the folder in place
    of the evaluated one.

    Args:
        trainer: of the finished training.
        folder: its artefact.
        args: its arguments; a copy is changed.
        train_again: `train_again(data, folder, args, last_step, evaluated)` trains into another folder, with the evidence weights of the
            evaluated model.
    """
    from onerec_hf.trainers import PlateauDecayCallback
    from onerec_hf.trainers.callbacks import callback_of

    assert isinstance(data, InMemoryDataset)
    whole, again = everything(data), copy.copy(args)
    steps, scheduled = _length(trainer)
    grown = _rows(whole.train) / _rows(data.train)
    last_step, again.max_steps = max(round(steps * grown), 1), max(round(scheduled * grown), 1)
    if (plateau := callback_of(trainer, PlateauDecayCallback)) is not None:
        # No validation ends it, so that the decay is part of the schedule, in its length of the first training.
        assert plateau.decay is not None
        first, last = (round(step * grown * scheduled / trainer.state.max_steps) for step in plateau.decay)
        again.max_steps = max(last, 1)
        again.lr_scheduler_type = cast("Any", "warmup_stable_decay")
        again.lr_scheduler_kwargs = {"num_decay_steps": max(last - first, 1), "decay_type": "linear"}
    again.eval_strategy = again.save_strategy = cast("Any", "no")
    again.load_best_model_at_end, again.resume_from_checkpoint = False, None
    count = len(data.sequences.item_ids)
    say(f"refit: training once more, on all {count:,} interactions, for {last_step:,} steps")
    refitted = train_again(whole, folder / _FOLDER, again, last_step, trainer)
    processor = cast("OneRecProcessor", refitted.processing_class)
    catalogue = catalogue_of(processor)
    counts = np.bincount(catalogue.indices(data.sequences.item_ids), minlength=len(catalogue))
    processor.set_catalogue(catalogue.with_popularity(counts))
    cast("Any", refitted.model).set_catalogue(processor.catalogue)
    save_trained(refitted, folder)
    save_processor(processor, folder)
    wait()
    if is_first():
        shutil.rmtree(folder / _FOLDER)
    return refitted, Refit(count, refitted.state.global_step)


def _rows(examples) -> int:
    """Sessions of training examples: what an epoch's length grows with."""
    if "sessions" in examples.column_names:
        return sum(map(len, examples["sessions"]))
    return len(examples)


def _length(trainer: OneRecTrainer) -> tuple[int, float]:
    """Steps that the kept weights were trained for, and steps at which their schedule would have ended."""
    from transformers import TrainerState

    from onerec_hf.trainers import BudgetCallback
    from onerec_hf.trainers.callbacks import callback_of

    state = trainer.state
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    steps, callback = state.global_step, callback_of(trainer, BudgetCallback)
    progress = None if callback is None else callback.progress
    if best is not None:
        saved = TrainerState.load_from_json(str(Path(best) / "trainer_state.json"))
        steps = saved.global_step
        if callback is not None:
            progress = cast("Any", saved.stateful_callbacks)[type(callback).__name__]["attributes"]["progress"]
    # The schedule follows the time where that was further than the steps.
    return steps, min(state.max_steps, steps / progress if progress else state.max_steps)
