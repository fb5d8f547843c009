"""A command's run in its output folder: marked until everything is written, and how one that was killed goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from onerec_hf.workflows.distributed import is_first, num_ranks
from onerec_hf.workflows.steps import UNFINISHED_RUN, check_folder, claim_folder, is_unfinished, say, write_bytes

if TYPE_CHECKING:
    from transformers import TrainingArguments

LAST = ("last", "true")


def open_folder(folder: Path, overwrite: bool, args: TrainingArguments) -> bool:
    """
    Checks the output folder of a training, and puts the checkpoint's path in place of `--resume_from_checkpoint last`. Where a run was
    killed before its first checkpoint, there is none, and it begins anew; where it is complete, there is nothing to do, and the program ends.

    Returns:
        Whether the run goes on with a checkpoint of its own folder, which then keeps its checkpoints.

    Raises:
        ValueError: a folder that is no whole checkpoint, or processes that each would train alone.
        FileExistsError: the folder is another run's, as `check_folder` says.
    """
    if args.world_size != num_ranks():
        raise ValueError(
            f"this is one of {num_ranks()} processes, and transformers joins them only on accelerators, of which there is none, or where it is "
            "told to use the CPU: add --use_cpu true"
        )
    asked = args.resume_from_checkpoint
    if asked is not None and asked.lower() in LAST:
        from onerec_hf.trainers.checkpoints import newest_checkpoint

        args.resume_from_checkpoint = newest_checkpoint(folder / "checkpoints")
        if args.resume_from_checkpoint is None:
            if not overwrite and is_complete(folder):
                say(f"{folder} holds a complete run: nothing is left to do")
                raise SystemExit(0)
            say(f"{folder} holds no checkpoint yet: training begins anew")
            overwrite = overwrite or is_unfinished(folder)
    own = resumes_in(folder, args)
    if not own:
        check_folder(folder, overwrite)
    return own


def is_complete(folder: Path) -> bool:
    """Whether a training has ended here, with model and results, and nothing is under way."""
    return all((folder / name).is_file() for name in ("config.json", "results.json")) and not is_unfinished(folder)


def resumes_in(folder: Path, args: TrainingArguments) -> bool:
    """
    Whether the run goes on with a checkpoint of its own output folder.

    Raises:
        ValueError: a folder that is no whole checkpoint.
    """
    checkpoint = args.resume_from_checkpoint
    if checkpoint is None:
        return False
    from onerec_hf.trainers.checkpoints import is_whole

    if not is_whole(checkpoint):
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: it holds no complete checkpoint (trainer_state.json); name a folder such as "
            f"{folder / 'checkpoints' / 'checkpoint-500'}, or `last`"
        )
    return Path(checkpoint).resolve().parent == (folder / "checkpoints").resolve()


def begin(folder: Path, command: str | None, goes_on: bool = False) -> None:
    """
    Takes the folder for this run: marks it, and removes an earlier one's results, but for the checkpoints that it goes on with. Of several
    ranks the first one does.
    """
    if not is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / UNFINISHED_RUN, (json.dumps({"command": command}) + "\n").encode())
    claim_folder(folder, keep_checkpoints=goes_on)


def finish(folder: Path, keep_checkpoints: bool = False) -> None:
    """Takes the mark off, now that everything is written, and removes the checkpoints; of several ranks the first one does."""
    if not is_first():
        return
    from onerec_hf.modeling.files import remove_whole

    os.unlink(folder / UNFINISHED_RUN)
    if not keep_checkpoints:
        remove_whole(folder / "checkpoints")
