"""Atomic checkpoints, and resuming from the newest complete one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from onerec_hf.modeling.files import cannot_write, give_usual_modes, remove_whole
from onerec_hf.trainers.folder_lock import locked

_UNFINISHED, _REMOVED = "_unfinished-", "_removed-"  # Trainer does not upload names that start with an underscore


class CheckpointError(OSError):
    """A checkpoint could not be written. Earlier ones are complete; `checkpoint` is the newest of them, or None."""

    def __init__(self, message: str, checkpoint: str | None):
        super().__init__(message)
        self.checkpoint = checkpoint


def is_whole(checkpoint: str | os.PathLike) -> bool:
    """
    Whether training can resume from this folder: the trainer's state, which is written last, exists and is readable.

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
    The complete `checkpoint-N` with the most steps in a folder, or None.

    Example:
        >>> newest_checkpoint("no/such/folder") is None
        True
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdecimal() and is_whole(path)]
    return str(max(found, key=lambda path: int(path.name[11:]))) if found else None


def remove_gradient_hooks(model: torch.nn.Module) -> None:
    """
    Removes the hooks that activation checkpointing has put on embeddings, which are of use in training alone: with these local functions no
    model can be pickled. (Trainer sets them more than once and knows the last ones only, which `disable_input_require_grads` removes.)

    Example:
        >>> remove_gradient_hooks(trainer.model)  # doctest: +SKIP
    """
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__qualname__", "").startswith(PreTrainedModel.enable_input_require_grads.__qualname__):
                del module._forward_hooks[number]


class AtomicCheckpointMixin(Trainer):
    """
    Trainer mixin. A checkpoint is written under a temporary name and renamed when all ranks have written their part, so every `checkpoint-N`
    is complete. Checkpoints beyond `save_total_limit` are renamed before their files are deleted.

    `train(resume_from_checkpoint=True)`, or `"last"`, resumes from the newest complete checkpoint.

    Raises:
        CheckpointError: on all ranks, if one of them cannot write (full or read-only disk).
    """

    _unfinished: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args, **kwargs):
        """
        As `transformers.Trainer.train`.

        Raises:
            ValueError: the folder is not a complete checkpoint, or there is none to resume from.
            FileExistsError: another training runs in the output folder, in this process or another.
        """
        with self._locked_folder(trial):
            return self._train(resume_from_checkpoint, trial, *args, **kwargs)

    @contextmanager
    def _locked_folder(self, trial: Any) -> Iterator[None]:
        """The lock of the output folder, which the first rank holds; a trial of a search has a folder of its own in it."""
        with ExitStack() as stack:
            if self.args.process_index == 0 and trial is None:
                try:
                    stack.enter_context(locked(str(self.args.output_dir)))
                except FileExistsError:
                    raise
                except OSError:
                    pass  # a full or read-only disk: saving says so, with the newest checkpoint
            yield

    def _train(self, resume_from_checkpoint: str | bool | None, *args, **kwargs):
        folder = str(self.args.output_dir)
        if resume_from_checkpoint is True or resume_from_checkpoint == "last":
            resume_from_checkpoint = newest_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{folder} contains no complete checkpoint; omit resume_from_checkpoint to start a new run"
                )
        elif resume_from_checkpoint and not is_whole(resume_from_checkpoint):
            last = newest_checkpoint(folder)
            raise ValueError(
                f"resume_from_checkpoint={str(resume_from_checkpoint)!r} is not a complete checkpoint: its {TRAINER_STATE_NAME} is missing or "
                "truncated; " + (f"use the newest complete one, {last}" if last else f"there is none in {folder}")
            )
        if self.args.should_save:  # leftovers of killed processes
            for path in Path(folder).glob("_*-checkpoint-*"):
                if path.name.startswith((_UNFINISHED, _REMOVED)):
                    shutil.rmtree(path, ignore_errors=True)
        best = self.args.load_best_model_at_end  # the guards set it for the time of a training
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.args.load_best_model_at_end = best
            remove_gradient_hooks(self.model)  # type: ignore[arg-type]

    def _run_epoch(self, *args, **kwargs):
        # Trainer would train on from a checkpoint of the last step, or of one that a callback stopped at.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial):
        return self._unfinished or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._unfinished is None:  # uploaded after renaming
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
        # Ranks on other machines may use local disks; on a shared disk there is nothing left to rename.
        for mine in (self.args.should_save, self.args.local_process_index == 0):
            if mine and os.path.isdir(source):
                give_usual_modes(source)
                remove_whole(target)  # from an earlier run
                os.replace(source, target)
                shutil.rmtree(unfinished, ignore_errors=True)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(target)
        if self.args.should_save:
            self._rotate(run_dir)

    # All ranks take part in the collectives between these writes, so a failed rank reports its error afterwards.
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
        """Keeps the first write failure (and ignores its consequences) for `_raise_together`; re-raises all other errors."""
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
        local_reason = None if self._failure is None else cannot_write(os.path.join(run_dir, name), self._failure)
        reason = "another rank could not write its part" if local_reason is None else str(local_reason)
        last = newest_checkpoint(run_dir)
        raise CheckpointError(
            f"training stopped at step {self.state.global_step}: {reason} (fewer checkpoints: save_total_limit). "
            + (
                f"Resume from the previous checkpoint with resume_from_checkpoint={last!r}"
                if last
                else "There is no earlier checkpoint"
            ),
            last,
        ) from self._failure

    def _rotate(self, run_dir: str) -> None:
        """Like Trainer's rotation, but renames a checkpoint before deleting its files."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        checkpoints = sort_checkpoints(run_dir, use_mtime=True)
        best = self.state.best_model_checkpoint
        protected = {checkpoints[-1], *([str(Path(best))] if best else [])}
        others = [checkpoint for checkpoint in checkpoints if checkpoint not in protected]
        for checkpoint in others[: max(0, len(checkpoints) - max(limit, len(protected)))]:
            remove_whole(checkpoint)
