"""Checkpoints that are there whole or not at all, whatever ended their writing, and the newest of them to go on from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from onerec_hf.modeling.files import cannot_write, remove_whole

_UNFINISHED, _REMOVED = "_unfinished-", "_removed-"  # Trainer's uploads leave out what begins with an underscore


class CheckpointError(OSError):
    """A checkpoint could not be written. Those before it are whole; `checkpoint` is the newest of them, or None."""

    def __init__(self, message: str, checkpoint: str | None):
        super().__init__(message)
        self.checkpoint = checkpoint


def is_whole(checkpoint: str | os.PathLike) -> bool:
    """
    Whether training can go on from this folder: the trainer's state, which is written last, is there and can be read.

    Example:
        >>> is_whole("no/such/checkpoint-5")
        False
    """
    try:
        return TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).global_step >= 0
    except (OSError, ValueError, TypeError):
        return False


def newest_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    The whole checkpoint of most steps among a training's `checkpoint-N`; None where there is none.

    Example:
        >>> newest_checkpoint("no/such/folder") is None
        True
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdecimal() and is_whole(path)]
    return str(max(found, key=lambda path: int(path.name[11:]))) if found else None


class AtomicCheckpointMixin(Trainer):
    """
    Mixin of trainers. A checkpoint is written under another name and renamed when all ranks have written their part, so that whatever
    `checkpoint-N` there is, is whole; one that gives way to `save_total_limit` loses its name before its files.

    `train(resume_from_checkpoint=True)`, or `"last"`, goes on from the newest whole one.

    Raises:
        CheckpointError: on all ranks, where one of them could not write: a full or read-only disk.
    """

    _unfinished: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        As `transformers.Trainer.train`.

        Raises:
            ValueError: a folder that is no whole checkpoint, or none to go on from.
        """
        folder = str(self.args.output_dir)
        if resume_from_checkpoint is True or resume_from_checkpoint == "last":
            resume_from_checkpoint = newest_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise ValueError(f"{folder} holds no whole checkpoint: leave resume_from_checkpoint out to begin anew")
        elif resume_from_checkpoint and not is_whole(resume_from_checkpoint):
            last = newest_checkpoint(folder)
            raise ValueError(
                f"resume_from_checkpoint={str(resume_from_checkpoint)!r} is no whole checkpoint: its {TRAINER_STATE_NAME} is missing or cut "
                "short; " + (f"the newest whole one is {last}" if last else f"there is none in {folder}")
            )
        if self.args.should_save:  # what a process that was killed has left
            for path in Path(folder).glob("_*-checkpoint-*"):
                if path.name.startswith((_UNFINISHED, _REMOVED)):
                    shutil.rmtree(path, ignore_errors=True)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial):
        return self._unfinished or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._unfinished is None:  # it is uploaded by its own name, once it has that
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial):
        run_dir, name = self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"
        unfinished = os.path.join(run_dir, _UNFINISHED + name)
        source, target = os.path.join(unfinished, name), os.path.join(run_dir, name)
        self._unfinished, self._failure = unfinished, None
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == source:
                self.state.best_model_checkpoint = target
                if self.args.should_save:
                    self.state.save_to_json(os.path.join(source, TRAINER_STATE_NAME))
        except Exception as error:
            self._note_failure(error)
        finally:
            self._unfinished = None
        self._raise_together(name, run_dir)
        # Ranks of other machines may write to disks of their own; on a shared one there is nothing left for them to rename.
        for mine in (self.args.should_save, self.args.local_process_index == 0):
            if mine and os.path.isdir(source):
                remove_whole(target)  # of an earlier run
                os.replace(source, target)
                shutil.rmtree(unfinished, ignore_errors=True)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(target)
        if self.args.should_save:
            self._rotate(run_dir)

    # The parts are written between collectives that all ranks take part in: a rank that cannot write says so after them.
    def _save(self, output_dir=None, state_dict=None):
        try:
            super()._save(output_dir, state_dict)
        except Exception as error:
            self._note_failure(error)

    def _save_optimizer_and_scheduler(self, output_dir):
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        except Exception as error:
            self._note_failure(error)

    def _save_rng_state(self, output_dir):
        try:
            super()._save_rng_state(output_dir)
        except Exception as error:
            self._note_failure(error)

    def _note_failure(self, error: Exception) -> None:
        """Keeps the first failure to write a checkpoint for `_raise_together`, and raises everything else: but what follows from it."""
        if self._unfinished is None or (
            self._failure is None and cannot_write(str(self.args.output_dir), error) is None
        ):
            raise error
        self._failure = self._failure or error

    def _raise_together(self, name: str, run_dir: str) -> None:
        failed = self._failure is not None
        if self.accelerator.num_processes > 1:
            flags: Any = self.accelerator.reduce(torch.tensor(float(failed), device=self.accelerator.device))
            failed = bool(flags.item())
        if not failed:
            return
        if self.args.should_save:
            shutil.rmtree(os.path.join(run_dir, _UNFINISHED + name), ignore_errors=True)
        told = None if self._failure is None else cannot_write(os.path.join(run_dir, name), self._failure)
        reason = "another rank could not write its part" if told is None else str(told)
        last = newest_checkpoint(run_dir)
        raise CheckpointError(
            f"training stopped at step {self.state.global_step}: {reason} (fewer checkpoints: save_total_limit). "
            + (
                f"The checkpoint before it is whole: go on with resume_from_checkpoint={last!r}"
                if last
                else "There is no earlier one"
            ),
            last,
        ) from self._failure

    def _rotate(self, run_dir: str) -> None:
        """As Trainer's, which removes a checkpoint's files under its name."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        checkpoints = sort_checkpoints(run_dir, use_mtime=True)
        best = self.state.best_model_checkpoint
        protected = {checkpoints[-1], *([str(Path(best))] if best else [])}
        others = [checkpoint for checkpoint in checkpoints if checkpoint not in protected]
        for checkpoint in others[: max(0, len(checkpoints) - max(limit, len(protected)))]:
            remove_whole(checkpoint)
