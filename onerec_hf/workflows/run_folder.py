"""The output folder of a run: checked and marked as unfinished before work begins, resumed after a kill, cleared by overwrite."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from onerec_hf.trainers.folder_lock import LOCK, locked
from onerec_hf.workflows.artefact import (
    CODEBOOKS_NAME,
    CONTENT_ENCODER_NAME,
    ITEM_ENCODER_NAME,
    ITEMS_NAME,
    REPORT_NAME,
    write_bytes,
)
from onerec_hf.workflows.data_options import DATA_OPTIONS_NAME
from onerec_hf.workflows.distributed import is_first, num_ranks, say
from onerec_hf.workflows.errors import RunComplete

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: This file marks the folder of a run that is under way or was killed.
UNFINISHED_RUN = "unfinished.json"
LAST = ("last", "true")

# What the workflows write: overwrite removes these files of an earlier run, and no others.
# Without the first two no model and no processor loads, so partly removed results are not mistaken for complete ones.
_WRITTEN = (
    "config.json",
    "catalogue.safetensors",
    "features.safetensors",
    "lifelong.safetensors",
    "README.md",
    "expert_load.png",
    "training_report.html",
    "training_report.png",
    "semantic_ids.html",
    "results.json",
    "trained_on.json",
    "pairs/README.md",
    "pairs/pairs.parquet",
    REPORT_NAME,
    CODEBOOKS_NAME,
    ITEM_ENCODER_NAME,
    CONTENT_ENCODER_NAME,
    ITEMS_NAME,
    DATA_OPTIONS_NAME,
    "model*.safetensors",
    "code/*.py",
    "*_onerec.py",
    "model.safetensors.index.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "training_args.bin",
)


@contextlib.contextmanager
def own_folder(folder: str | os.PathLike) -> Iterator[None]:
    """
    Locks a folder for one run, before any work: no second run writes to it at the same time, not with `overwrite` and not to resume either. A
    folder that was made for the lock and stays empty is removed. The first rank locks.

    Raises:
        FileExistsError: another process runs in the folder, or it is a file.
        PermissionError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent, own_folder(f"{parent}/run"), own_folder(f"{parent}/run"):
        ...     pass
        Traceback (most recent call last):
        ...
        FileExistsError: ...run holds a run that has not ended: another process or trainer writes to it. Wait until it ends, or name another folder
    """
    if not is_first():
        yield
        return
    _check_place(Path(folder))
    with locked(folder):
        yield


def _check_place(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder for the output")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise PermissionError(
            f"{folder} cannot be written: {there} is read-only; name a folder that can be written to"
        )


def check_folder(folder: str | os.PathLike, overwrite: bool) -> Path:
    """
    The output folder, untouched so far: `claim_folder` makes it ready once the input has been checked. Only the first rank checks, since it
    may already write when another rank arrives.

    Raises:
        FileExistsError: the folder is not empty and `overwrite` is not set.
        PermissionError: the folder cannot be written.
    """
    folder = Path(folder)
    if not is_first():
        return folder
    _check_place(folder)
    if not overwrite and is_unfinished(folder):
        raise FileExistsError(
            f"{folder} contains an unfinished run; resume it with --resume_from_checkpoint last (a training), or start again with "
            "--overwrite"
        )
    if not overwrite and any(path.is_file() and path.name != LOCK for path in folder.rglob("*")):
        raise FileExistsError(
            f"{folder} exists already and is not empty; name another folder, or pass --overwrite to replace its results"
        )
    return folder


def is_unfinished(folder: str | os.PathLike) -> bool:
    """Whether a run in this folder is under way or was killed."""
    return any(Path(folder).glob(f"{UNFINISHED_RUN}*"))  # a run killed while it wrote the mark left its temporary name


def is_complete(folder: Path) -> bool:
    """Whether a training has ended here, with model and results, and none is under way."""
    return all((folder / name).is_file() for name in ("config.json", "results.json")) and not is_unfinished(folder)


def open_folder(folder: Path, overwrite: bool, args: TrainingArguments) -> bool:
    """
    Checks the output folder of a training, and replaces `resume_from_checkpoint="last"` by the checkpoint's path. A run that was killed
    before its first checkpoint starts again.

    Returns:
        Whether the run resumes from a checkpoint of this folder, which then keeps its checkpoints.

    Raises:
        RunComplete: `resume_from_checkpoint="last"` and the folder contains a complete run.
        ValueError: an incomplete checkpoint, or processes that transformers would not join.
        FileExistsError: the folder is another run's, as in `check_folder`.
    """
    if args.world_size != num_ranks():
        raise ValueError(
            f"this is one of {num_ranks()} processes, and transformers joins them only on accelerators, or on the CPU where that is set: "
            "add --use_cpu true"
        )
    wanted = args.resume_from_checkpoint
    if wanted is not None and wanted.lower() in LAST:
        from onerec_hf.trainers.checkpoints import newest_checkpoint

        args.resume_from_checkpoint = newest_checkpoint(folder / "checkpoints")
        if args.resume_from_checkpoint is None:
            if not overwrite and is_complete(folder):
                raise RunComplete(f"{folder} holds a complete run: nothing is left to do")
            say(f"{folder} holds no checkpoint yet: training starts from the beginning")
            overwrite = overwrite or is_unfinished(folder)
    own = resumes_in(folder, args)
    if not own:
        check_folder(folder, overwrite)
    return own


def resumes_in(folder: Path, args: TrainingArguments) -> bool:
    """
    Whether the run resumes from a checkpoint of its own output folder.

    Raises:
        ValueError: an incomplete checkpoint.
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


def begin(folder: Path, command: str | None, resumes: bool = False) -> None:
    """Marks the folder as this run's and removes an earlier run's results; a run that resumes keeps the checkpoints. The first rank does it."""
    if not is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / UNFINISHED_RUN, (json.dumps({"command": command}) + "\n").encode())
    claim_folder(folder, keep_checkpoints=resumes)


def finish(folder: Path, keep_checkpoints: bool = False) -> None:
    """Removes the mark once everything is written, and the checkpoints; the first rank does it."""
    if not is_first():
        return
    from onerec_hf.modeling.files import remove_whole

    os.unlink(folder / UNFINISHED_RUN)
    if not keep_checkpoints:
        remove_whole(folder / "checkpoints")


def claim_folder(folder: Path, keep_checkpoints: bool = False) -> None:
    """Makes the folder and removes an earlier run's results from it: they must not be mistaken for this run's."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*(() if keep_checkpoints else ("checkpoints",)), "_removed-checkpoints", "aligned", ".unfinished"):
        shutil.rmtree(folder / name, ignore_errors=True)
    # A resumed run reads these from its folder and writes them again: after a kill in between they would be lost.
    kept = (
        (REPORT_NAME, CODEBOOKS_NAME, ITEM_ENCODER_NAME, CONTENT_ENCODER_NAME, ITEMS_NAME, DATA_OPTIONS_NAME)
        if keep_checkpoints
        else ()
    )
    written = [name for name in _WRITTEN if name not in kept]
    for pattern in (*written, *(f"{name}.*.tmp" for name in (*_WRITTEN, UNFINISHED_RUN))):
        for path in folder.glob(pattern):
            path.unlink()
    for name in ("code", "pairs"):
        with contextlib.suppress(OSError):  # absent, or it holds files of the user
            (folder / name).rmdir()


def discard(folder: Path) -> None:
    """Removes what a run has written, and the folder if nothing else is in it; the first rank does it."""
    if not is_first():
        return
    claim_folder(folder)
    for name in (UNFINISHED_RUN, LOCK):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def resumable(folder: Path, command: str | None, keep: bool = True) -> Iterator[None]:
    """
    After Ctrl-C, raises the instructions to resume; a run without a checkpoint is removed.

    Args:
        command: the command line of the run; None for a call from Python.
        keep: False for a run that cannot be resumed, which is removed then.

    Raises:
        KeyboardInterrupt: with the instructions.
    """
    try:
        yield
    except KeyboardInterrupt:
        from onerec_hf.trainers import newest_checkpoint

        last = newest_checkpoint(folder / "checkpoints")
        if keep and last is not None:
            hint = f"The checkpoint {last} is kept; "
            if command is None:
                hint += 'resume with the same call and resume_from_checkpoint="last"'
            else:
                hint += f"resume with:\n  {command} --resume_from_checkpoint {shlex.quote(last)}"
        elif any(folder.glob("model*.safetensors")):
            hint = f"The trained model is in {folder}, without an evaluation: onerec-hf evaluate --help"
        else:
            discard(folder)
            hint = "Nothing is kept; start again."
        raise KeyboardInterrupt(hint) from None
