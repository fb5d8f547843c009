"""What to try where a model is not above every baseline, or does not read what the tables hold: reasons and commands."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from onerec_hf.workflows.data_options import option_words

if TYPE_CHECKING:
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

# A model that read its training examples fewer times than this may not have learned them yet.
_FEW_EPOCHS = 5
# The item head of recipes/amazon_beauty_items.yaml.
_HEAD = {"item_head": True, "item_head_dropout": 0.3, "item_head_codes": True, "item_score_weight": 32}


def what_to_try(
    trainer: OneRecTrainer,
    folder: Path,
    command: str | None = None,
    data: Mapping[str, Any] | None = None,
    fixed_sizes: bool = False,
) -> list[tuple[str, str]]:
    """
    Reasons and commands for a model below a baseline: longer training where it may not be over, an item head where there is none, and the
    comparison of all models.

    Args:
        trainer: of the finished training.
        folder: the model's.
        command: the command line of the training; None for a call from Python.
        data: the data options of the training, by name; None where they are not known.
        fixed_sizes: the architecture cannot be chosen: the training went on from a saved model, or has no option for it.

    Example:
        >>> what_to_try(trainer, Path("mine"), "onerec-hf train --interactions a.csv --output_dir mine")[0]  # doctest: +SKIP
        ('longer training: it read each training example 3 times', 'onerec-hf train --interactions a.csv --num_train_epochs 6 --output_dir mine-2')
    """
    tries = []
    if (reason := _why_longer(trainer)) is not None:
        tries.append((f"longer training: {reason}", _again(command, _longer(trainer, command), folder)))
    if not fixed_sizes and cast("Any", trainer.model).config.item_head is None:
        tries.append(("an item head: every item is scored with a vector of its own", _again(command, _HEAD, folder)))
    if data and data.get("prepared") is None:
        words = option_words(data)
        comparison = ["onerec-hf", "compare", *words, "--output_dir", f"{folder}-comparison"]
        tries.append(("other models, all with the same number of trials", shlex.join(comparison)))
    return tries


def with_features(
    unread: str, folder: Path, command: str | None = None, data: Mapping[str, Any] | None = None
) -> list[tuple[str, str]]:
    """
    The training with features, for one without.

    Args:
        unread: what the model does not read, from [`~onerec_hf.workflows.unread.unread`].
        folder, command, data: as in [`what_to_try`].

    Example:
        >>> with_features("age, city of users", Path("mine"), "onerec-hf train --dataset kuairand-pure --output_dir mine")
        [('features, which the model does not read: age, city of users', 'onerec-hf train --dataset kuairand-pure --features auto --output_dir mine-2')]
    """
    in_dataset = command is None and data is None  # a dataset of the caller's
    again = "load_dataset(..., features='auto')" if in_dataset else _again(command, {"features": "auto"}, folder)
    return [(f"features, which the model does not read: {unread}", again)]


def _why_longer(trainer: OneRecTrainer) -> str | None:
    """Why the training may have ended too early, if it may."""
    from onerec_hf.trainers import PlateauDecayCallback
    from onerec_hf.trainers.callbacks import callback_of

    state, plateau = trainer.state, callback_of(trainer, PlateauDecayCallback)
    if plateau is not None and plateau.decay is not None and plateau.decay[1] < state.max_steps:
        return (
            None  # its last evaluation is the best one of a decayed learning rate, after a constant one gained nothing
        )
    evaluated = [entry["step"] for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    if state.best_global_step and evaluated:
        return "its last evaluation was the best" if state.best_global_step == max(evaluated) else None
    epochs = state.epoch or 0.0
    return f"it read each training example {epochs:.2g} times" if epochs < _FEW_EPOCHS else None


def _longer(trainer: OneRecTrainer, command: str | None) -> dict[str, Any]:
    """Twice what ended the training: its budget, steps or epochs."""
    from onerec_hf.trainers.budget import Budget, duration

    args = cast("OneRecTrainingArguments", trainer.args)
    if (text := _value_of("--budget", shlex.split(command or ""))) is not None:
        given = Budget.parse(text)
        return {"budget": duration(2 * given.seconds) + ("-cpu" if given.cpu else "")}
    if args.max_steps > 0:
        return {"max_steps": 2 * args.max_steps}
    return {"num_train_epochs": 2 * math.ceil(args.num_train_epochs)}


def _value_of(option: str, words: list[str]) -> str | None:
    """
    What a command line gives an option, the last time that it names it.

    Example:
        >>> _value_of("--budget", ["train", "--budget", "10m"]), _value_of("--budget", ["--budget=1h"]), _value_of("--budget", ["train"])
        ('10m', '1h', None)
    """
    found = None
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word == option or word.startswith(f"{option}="):
            found = following if word == option else word.removeprefix(f"{option}=")
    return found


def _again(command: str | None, options: Mapping[str, Any], folder: Path) -> str:
    """The training with other options into another folder."""
    options = {**options, "output_dir": f"{folder}-2"}
    if command is None:
        return f"train(..., {', '.join(f'{name}={value!r}' for name, value in options.items())})"
    replaced = {*options, "overwrite", "resume_from_checkpoint"}
    return shlex.join([*_without(shlex.split(command), replaced), *option_words(options)])


def _without(words: Sequence[str], names: set[str]) -> list[str]:
    """A command line without some options and their values."""
    kept, keeps = [], True
    for word in words:
        if word.startswith("--"):
            keeps = word[2:].split("=")[0] not in names
        if keeps:
            kept.append(word)
    return kept
