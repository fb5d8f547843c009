"""The average of a training's weights, which evaluations, checkpoints and the trained model have in place of the latest ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainerCallback

from onerec_hf.modeling.files import read_safetensors
from onerec_hf.trainers.sharding import is_sharded

#: The latest weights in a checkpoint, whose own weights are the average.
LATEST_NAME = "latest_weights.safetensors"
_AVERAGE = "average/"  # before names in that file
# The weights of step t count as t^8: the last ninth of a training makes most of the average, however long it is.
_POWER = 8


class WeightAverage:
    """
    Polynomial-decay average of the weights that train (Shamir and Zhang, arXiv 1212.1824, section 4): weights of step t count as t^8. It has no
    horizon to choose, and what it averages grows with the training. Kept in float32.

    Args:
        model: its trainable weights are the first ones of the average.
        steps: steps that the average holds already.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(model)
        >>> for value in (1.0, 4.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     average.update()
        >>> with average.swapped():
        ...     round(model.weight.item(), 2)  # (1 * 1 + 4 * 9) / 10
        3.7
        >>> model.weight.item()
        4.0
    """

    def __init__(self, model: nn.Module, steps: int = 0):
        self.steps = steps
        self._parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._average = {name: each.detach().float().clone() for name, each in self._parameters.items()}
        self._latest: dict[str, torch.Tensor] | None = None

    @torch.no_grad()
    def update(self) -> None:
        """Adds the weights of a step."""
        self.steps += 1
        latest = [each.detach().float() for each in self._parameters.values()]
        torch._foreach_lerp_(list(self._average.values()), latest, (_POWER + 1) / (_POWER + self.steps))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the average inside the context. Contexts may be nested."""
        if self._latest is not None or not self.steps:
            yield
            return
        self._latest = {name: each.detach().clone() for name, each in self._parameters.items()}
        try:
            self._fill(self._average)
            yield
        finally:
            self._fill(self._latest)
            self._latest = None

    def finish(self) -> None:
        """Leaves the average in the model."""
        if self.steps:
            self._fill(self._average)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the latest weights beside those of the average, inside `swapped`; with narrower weights the float32 of the average too."""
        tensors = {name: each.detach().cpu().contiguous() for name, each in (self._latest or {}).items()}
        for name, each in self._average.items():
            if self._parameters[name].dtype != each.dtype:
                tensors[_AVERAGE + name] = each.cpu().contiguous()
        save_file(tensors, os.path.join(folder, LATEST_NAME), metadata={"format": "pt", "steps": str(self.steps)})

    @classmethod
    def load(cls, model: nn.Module, folder: str | os.PathLike) -> WeightAverage:
        """
        The average that a model was loaded with, and the latest weights into the model.

        Raises:
            ValueError: weights of another model, or a damaged file. OSError: no such file.
        """
        path = os.path.join(folder, LATEST_NAME)
        found, metadata = read_safetensors(path)
        average = cls(model, int(metadata["steps"]))
        latest = {name: each for name, each in found.items() if not name.startswith(_AVERAGE)}
        shapes = {name: each.shape for name, each in average._parameters.items()}
        if {name: each.shape for name, each in latest.items()} != shapes:
            raise ValueError(f"{path} holds weights of another model: resume from a checkpoint of this training")
        for name, each in average._average.items():
            if _AVERAGE + name in found:
                each.copy_(found[_AVERAGE + name])
        average._fill(latest)
        return average

    @torch.no_grad()
    def _fill(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])


class AveragedWeights(Trainer):
    """
    Trainer mixin, after [`AtomicCheckpointMixin`] in the order of bases. With `args.average_weights` evaluations, checkpoints and the model after the
    training have the average of the weights ([`WeightAverage`]). Checkpoints hold the latest weights beside it, so that a resumed training goes on
    from these.

    Raises:
        ValueError: a sharded model.

    Example:
        >>> OneRecTrainer(model, OneRecTrainingArguments("out", average_weights=True), ...).train()  # doctest: +SKIP
    """

    _average: WeightAverage | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._check_whole()
        self.add_callback(_AverageCallback(self))

    @property
    def _averages(self) -> bool:
        args: Any = self.args
        return args.average_weights

    def _check_whole(self) -> None:
        if self._averages and (is_sharded(self.model) or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "average_weights keeps whole weights, and the model is sharded: set average_weights to false"
            )

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        if self._average is None:
            yield
            return
        with self._average.swapped():
            yield

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self._average = None  # of a training that failed: its model has the latest weights

    def evaluate(self, *args, **kwargs):
        with self._averaged():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with self._averaged():
            return super().predict(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        with self._averaged():
            super()._save_checkpoint(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self._average is not None and self._average.steps and self.args.should_save:
            self._average.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not os.path.isfile(os.path.join(checkpoint, LATEST_NAME)):
            return
        if self.args.auto_find_batch_size:  # a second try, whose model is not the checkpoint's any more
            self._load_from_checkpoint(checkpoint)
        average = WeightAverage.load(self.model, checkpoint)
        self._average = average if self._averages else None  # without an average the latest weights train on alone

    def _finalize_training(self, *args, **kwargs):
        average, self._average = self._average, None
        if average is not None:
            average.finish()  # the best checkpoint's weights replace them, where it is loaded
        return super()._finalize_training(*args, **kwargs)


class _AverageCallback(TrainerCallback):
    """Begins the trainer's average, and tells it of steps."""

    def __init__(self, trainer: AveragedWeights):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer._check_whole()  # the option may be set after the trainer was made
        if not trainer._averages:
            trainer._average = None
        elif trainer._average is None or not state.global_step:  # not that of a try with a larger batch
            trainer._average = WeightAverage(trainer.model)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer._average is not None:
            self.trainer._average.update()


__all__ = ["LATEST_NAME", "AveragedWeights", "WeightAverage"]
