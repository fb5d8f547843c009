"""Checkpoints that are there whole or not at all: killed, on a full or read-only disk; and which one a training goes on with."""

import contextlib
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import safe_globals

from onerec_hf.trainers import CheckpointError, RewardTrainer, checkpoints, newest_checkpoint
from onerec_hf.trainers.checkpoints import is_whole
from onerec_hf.trainers.folder_lock import LOCK
from onerec_hf.workflows.run_folder import own_folder
from tests.mounts import fill, set_read_only, small_disk
from tests.trainers import preference_runs, test_onerec_dpo
from tests.trainers import test_reward_trainer as reward_runs
from tests.trainers.test_onerec_trainer import losses, make_trainer

SAVING = {"save_strategy": "steps", "save_steps": 2}


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK)


class AtFirstStep(TrainerCallback):
    """Calls a function in the first step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.function()


def test_a_second_training_in_the_same_folder_is_refused_before_it_writes(tmp_path):
    """Of any trainer, in this process or another; a search's trials have folders of their own."""
    refused = []

    def second():
        for other in (make_trainer(tmp_path, **SAVING), reward_trainer(tmp_path)):
            with pytest.raises(FileExistsError, match="holds a run that has not ended: another process or trainer"):
                other.train()
            assert other.state.global_step == 0
            refused.append(other)
        with pytest.raises(FileExistsError), own_folder(tmp_path):
            pass
        make_trainer(tmp_path / "other", **SAVING).train()

    trainer = make_trainer(tmp_path, **SAVING)
    (tmp_path / "_unfinished-checkpoint-1").mkdir()
    trainer.add_callback(AtFirstStep(second))
    trainer.train()
    assert len(refused) == 2
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert not (tmp_path / LOCK).exists()
    make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)  # the first one has ended
    with own_folder(tmp_path), pytest.raises(FileExistsError):
        trainer.train()


def reward_trainer(folder):
    return RewardTrainer(
        reward_runs.make_model(), reward_runs.arguments(folder, max_steps=1), reward_runs.synthetic(8, 0)
    )


def test_a_checkpoint_has_its_name_when_all_is_written(tmp_path, monkeypatch):
    seen = []

    def save(self, folder):
        seen.append((names(tmp_path), os.path.basename(folder)))
        original(self, folder)

    original = Trainer._save_rng_state
    monkeypatch.setattr(Trainer, "_save_rng_state", save)
    trainer = make_trainer(tmp_path, **SAVING, save_total_limit=2)
    trainer.train()
    assert seen == [
        (["_unfinished-checkpoint-2"], "checkpoint-2"),
        (["_unfinished-checkpoint-4", "checkpoint-2"], "checkpoint-4"),
        (["_unfinished-checkpoint-6", "checkpoint-2", "checkpoint-4"], "checkpoint-6"),
    ]
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


def test_the_best_checkpoint_is_known_by_its_name_and_kept(tmp_path):
    best = {"metric_for_best_model": "loss", "load_best_model_at_end": True, "greater_is_better": True}
    trainer = make_trainer(tmp_path, **SAVING, eval_strategy="steps", eval_steps=2, save_total_limit=1, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")  # where the loss was highest
    assert "checkpoint-2" in names(tmp_path)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")


def test_going_on_from_the_newest_whole_one(tmp_path):
    whole = make_trainer(tmp_path / "whole", **SAVING)
    whole.train()
    cut = tmp_path / "whole" / "checkpoint-6"
    (cut / "trainer_state.json").write_text('{"epoch": 1.')  # another trainer's, which was killed while it wrote
    (tmp_path / "whole" / "_unfinished-checkpoint-8").mkdir()
    assert not is_whole(cut)
    for asked in (True, "last"):
        resumed = make_trainer(tmp_path / "whole", **SAVING)
        resumed.train(resume_from_checkpoint=asked)
        assert resumed._initial_global_step == 4
        assert not (tmp_path / "whole" / "_unfinished-checkpoint-8").exists()
        (cut / "trainer_state.json").unlink()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name])
    assert losses(resumed) == losses(whole)
    with pytest.raises(
        ValueError,
        match=r"is not a complete checkpoint: its trainer_state.json .*; use the newest complete one, .*checkpoint-4",
    ):
        make_trainer(tmp_path / "whole").train(resume_from_checkpoint=str(cut))
    with pytest.raises(ValueError, match="contains no complete checkpoint; omit resume_from_checkpoint"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("best", [False, True])
def test_tied_weights_are_not_missing(tmp_path, monkeypatch, best):
    """The library's words for a damaged checkpoint do not stand over a sound one, and do over one that lacks weights."""
    said = []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda text, *args: said.append(text))
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True} if best else {}
    trainer = make_trainer(tmp_path, **SAVING, **options)
    trainer.train()
    make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)
    assert not [text for text in said if "keys in the checkpoint" in text]
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    tensors = load_file(weights)
    lost = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors.pop(lost)
    save_file(tensors, weights, metadata={"format": "pt"})
    make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    (text,) = [text for text in said if "missing keys in the checkpoint" in text]
    assert f"['{lost}']" in text


def test_how_often_experts_were_chosen_is_kept(tmp_path):
    whole = make_trainer(tmp_path, **SAVING)
    whole.train()
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (resumed.tokens_per_expert == whole.tokens_per_expert).all()
    resumed.train()  # once more, from the beginning
    assert resumed.tokens_per_expert.sum() == whole.tokens_per_expert.sum()


class Full(TrainerCallback):
    """Fills the disk after the step."""

    def __init__(self, folder, step, leave):
        self.folder, self.step, self.leave = folder, step, leave

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            fill(self.folder, self.leave)


# What fits decides which part fails: nothing but folders, the catalogue, the weights, weights and a part of the optimizer's state.
@pytest.mark.parametrize("leave", [0, 8_000, 150_000, 600_000])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, leave):
    whole = make_trainer(tmp_path / "whole", **SAVING)
    whole.train()
    with small_disk(tmp_path / "disk", "8m") as disk:
        trainer = make_trainer(disk / "run", callbacks=[Full(disk, 3, leave)], **SAVING)
        with pytest.raises(
            CheckpointError,
            match=r"stopped at step 4: cannot write .*checkpoint-4: No space left on device; make room there.*"
            r"Resume from the previous checkpoint with resume_from_checkpoint='.*checkpoint-2'",
        ):
            trainer.train()
        assert names(disk / "run") == ["checkpoint-2"]
        (disk / "filling").unlink()
        resumed = make_trainer(disk / "run", **SAVING)
        resumed.train(resume_from_checkpoint=True)
        for name, value in resumed.model.state_dict().items():
            assert torch.equal(value, whole.model.state_dict()[name])


@pytest.mark.parametrize(
    "make", [test_onerec_dpo.make_trainer, preference_runs.make_trainer], ids=["alignment", "pairs"]
)
def test_a_full_disk_in_alignment(tmp_path, make):
    with small_disk(tmp_path / "disk", "8m") as disk:
        moves = {} if make is test_onerec_dpo.make_trainer else {"sync_ref_model": True, "max_steps": 6}
        trainer = make(disk / "run", callbacks=[Full(disk, 3, 20_000)], **SAVING, **moves)
        with pytest.raises(CheckpointError, match=r"checkpoint-2"):
            trainer.train()
        assert "checkpoint-4" not in names(disk / "run")
        assert is_whole(disk / "run" / "checkpoint-2")


def test_a_disk_that_is_mounted_read_only(tmp_path, monkeypatch):
    # A failing disk is remounted whatever is open; `mount` refuses to while the lock is.
    monkeypatch.setattr(checkpoints, "locked", contextlib.nullcontext)

    class Locks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                set_read_only(tmp_path / "disk")

    with small_disk(tmp_path / "disk", "8m") as disk:
        trainer = make_trainer(disk / "run", callbacks=[Locks()], **SAVING)
        with pytest.raises(
            CheckpointError, match=r"Read-only file system; it is mounted read-only: name a folder.*checkpoint-2'"
        ):
            trainer.train()
        assert is_whole(disk / "run" / "checkpoint-2")


@pytest.mark.slow
def test_a_kill_at_every_file_operation_leaves_whole_checkpoints_only(tmp_path):
    """A forked process saves the checkpoint of step 4, to which that of step 2 gives way, and kills itself at the n-th operation."""
    trainer = make_trainer(tmp_path / "run", save_total_limit=1)
    trainer.train()
    trainer.state.global_step = 2
    trainer._save_checkpoint(trainer.model, None)
    shutil.copytree(tmp_path / "run", tmp_path / "start")
    trainer.state.global_step = 4
    found, survived = set(), 0
    for at in range(1, 1000):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "start", tmp_path / "run")
        if not killed_at(at, lambda: trainer._save_checkpoint(trainer.model, None), tmp_path / "run"):
            break
        survived += 1
        left = [path for path in (tmp_path / "run").iterdir() if path.name.startswith("checkpoint-")]
        assert left, f"no checkpoint after operation {at}"
        for path in left:
            assert is_whole(path)
            torch.load(path / "optimizer.pt", weights_only=True)
            with safe_globals():
                torch.load(path / "rng_state.pth", weights_only=True)
            assert {"model.safetensors", "config.json", "catalogue.safetensors"} <= set(names(path))
            found.add(path.name)
    assert survived > 30
    assert found == {"checkpoint-2", "checkpoint-4"}
    assert names(tmp_path / "run") == ["checkpoint-4"]


# What changes a folder: reading it is no moment of its own.
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def killed_at(number, work, folder) -> bool:
    """Runs `work` in a fork that kills itself before its n-th change of `folder`; whether it came to that."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def hook(event, args):
            nonlocal count
            changes = event in _CHANGES or (event == "open" and args[2] & _WRITING)
            if changes and str(args[0]).startswith(str(folder)):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False
