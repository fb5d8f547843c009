"""Runs that were killed go on, and full disks, read-only targets and bad batches end in one message."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, Trainer

import onerec_hf.workflows.semantic_ids
import onerec_hf.workflows.training
from onerec_hf import OneRecProcessor
from onerec_hf.trainers import OneRecTrainer
from onerec_hf.workflows.run_folder import UNFINISHED_RUN
from tests.cli.commands import CODES, TINY, codes, contents, onerec, refused, succeeded
from tests.cli.test_align import QUICK, reward  # noqa: F401 (a fixture)
from tests.mounts import fill, set_read_only, small_disk

ROOT = Path(__file__).resolve().parents[2]
SAVING = ["--save_strategy", "steps", "--save_steps", 1]


class Killed(BaseException):
    """In place of a kill, which would take the test with it: nothing of the commands catches it."""


def killed(monkeypatch, owner, name, *argv, calls=1):
    """Runs a command that dies when it calls `owner.name` for the n-th time."""
    original, count = getattr(owner, name), iter(range(1, 1000))

    def die(*args, **kwargs):
        if next(count) == calls:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        with pytest.raises(Killed):
            onerec(*argv)


@pytest.mark.slow
def test_a_training_that_was_killed_goes_on_by_one_option(data, tmp_path, monkeypatch):
    whole, folder = tmp_path / "whole", tmp_path / "shop"
    settings = [*data.options, *CODES, *TINY, *SAVING]
    succeeded(onerec("train", *settings, "--output_dir", whole))
    command = ["train", *settings, "--output_dir", folder]
    go_on = [*command, "--resume_from_checkpoint", "last"]
    killed(monkeypatch, OneRecTrainer, "training_step", *command)  # before the first checkpoint
    assert json.loads((folder / UNFINISHED_RUN).read_text())["command"].startswith("onerec-hf train --interactions")
    refused(onerec(*command), "contains an unfinished run", "--resume_from_checkpoint last", "--overwrite")
    killed(monkeypatch, OneRecTrainer, "training_step", *go_on, calls=3)  # in the third step
    assert sorted(os.listdir(folder / "checkpoints")) == ["checkpoint-1", "checkpoint-2"]
    killed(monkeypatch, Trainer, "save_model", *go_on, calls=2)  # in the final save, after that of step 3
    assert not (folder / "config.json").exists()
    killed(monkeypatch, onerec_hf.workflows.training, "report", *go_on)  # before the card
    assert (folder / "config.json").is_file()
    done = succeeded(onerec(*go_on))
    assert "starts from the beginning" not in done.err
    assert set(contents(folder)) == set(contents(whole))
    first, second = (load_file(path / "model.safetensors") for path in (folder, whole))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    before = contents(folder)
    assert "holds a complete run: nothing is left to do" in succeeded(onerec(*go_on)).err
    assert contents(folder) == before
    refused(onerec(*command), "exists already and is not empty")


def test_last_begins_anew_in_a_new_folder(data, tmp_path):
    settings = [*data.options, *CODES, *TINY, "--output_dir", tmp_path / "new", "--resume_from_checkpoint", "last"]
    done = succeeded(onerec("train", *settings))
    assert "holds no checkpoint yet: training starts from the beginning" in done.err
    assert not (tmp_path / "new" / UNFINISHED_RUN).exists()


def test_an_alignment_that_was_killed_goes_on(trained, data, reward, tmp_path, monkeypatch):  # noqa: F811
    settings = ["align", "--model", trained.folder, "--reward", reward, "--max_examples", 24, *data.options, *QUICK]
    settings += [*SAVING, "--evaluate", "false", "--max_steps", 6, "--num_train_epochs", 2]
    succeeded(onerec(*settings, "--output_dir", tmp_path / "whole"))
    folder = tmp_path / "killed"
    command = [*settings, "--output_dir", folder]
    killed(monkeypatch, Trainer, "training_step", *command, calls=5)  # in the second iteration
    succeeded(onerec(*command, "--resume_from_checkpoint", "last"))
    first, second = contents(folder), contents(tmp_path / "whole")
    assert set(first) == set(second)
    assert first["pairs/pairs.parquet"] == second["pairs/pairs.parquet"]  # those of the first iteration too
    assert len({line["iteration"] for line in pairs(folder)}) == 2
    mine, theirs = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "whole"))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def pairs(folder):
    import pyarrow.parquet as pq

    return pq.read_table(folder / "pairs" / "pairs.parquet").to_pylist()


def test_a_fit_that_was_killed_is_simply_started_again(data, semantic_ids, tmp_path, monkeypatch):
    folder = tmp_path / "ids"
    command = ["semantic-ids", "fit", *data.options, *CODES, "--output_dir", folder]
    killed(monkeypatch, onerec_hf.workflows.semantic_ids, "write_origin", *command)
    assert sorted(os.listdir(folder)) == [UNFINISHED_RUN]
    killed(monkeypatch, OneRecProcessor, "save_pretrained", *command)
    refused(
        onerec("train", *data.options, *TINY, "--semantic_ids", folder, "--output_dir", tmp_path / "shop"),
        f"--semantic_ids {folder}",
    )
    succeeded(onerec(*command))
    assert codes(folder) == codes(semantic_ids.folder)
    assert set(contents(folder)) == set(contents(semantic_ids.folder))


def test_a_full_disk_in_training(data, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", "16m") as disk:
        step, count = OneRecTrainer.training_step, iter(range(1, 100))

        def training_step(self, *args, **kwargs):
            if next(count) == 3:
                fill(disk, 10_000)
            return step(self, *args, **kwargs)

        command = ["train", *data.options, *CODES, *TINY, *SAVING, "--output_dir", disk / "shop"]
        with monkeypatch.context() as patch:
            patch.setattr(OneRecTrainer, "training_step", training_step)
            message = refused(
                onerec(*command), "checkpoint-3: No space left on device", "make room there", "checkpoint-2"
            )
        assert message.startswith("onerec-hf train: training stopped at step 3: cannot write")
        assert not (disk / "shop" / "config.json").exists()
        (disk / "filling").unlink()
        succeeded(onerec(*command, "--resume_from_checkpoint", "last"))
        AutoModelForSeq2SeqLM.from_pretrained(disk / "shop")


@pytest.mark.parametrize("leave", [0, 5_000, 30_000, 120_000])
def test_a_full_disk_in_fitting(data, semantic_ids, tmp_path, leave):
    with small_disk(tmp_path / "disk", "1m") as disk:
        command = ["semantic-ids", "fit", *data.options, *CODES, "--output_dir", disk / "ids"]
        fill(disk, leave)
        refused(onerec(*command), "No space left on device", str(disk))
        assert not (disk / "ids" / "catalogue.safetensors").exists()  # without which nothing is trained
        (disk / "filling").unlink()
        succeeded(onerec(*command))
        assert codes(disk / "ids") == codes(semantic_ids.folder)


@pytest.mark.parametrize("command", [["semantic-ids", "fit"], ["train", *TINY], ["quickstart", "--max_steps", 2]])
def test_a_read_only_target_is_refused_before_the_work(data, tmp_path, command):
    with small_disk(tmp_path / "disk", "1m") as disk:
        set_read_only(disk)
        done = onerec(*command, *data.options, "--output_dir", disk / "new" / "shop")
        message = refused(done, f"{disk / 'new' / 'shop'} cannot be written", "read-only", "name a folder")
        assert "interactions;" not in done.err.removesuffix(message)  # it has not read the data


def test_bad_batches_end_in_one_message(data, tmp_path, monkeypatch):
    command = ["train", *data.options, *CODES, *TINY, "--output_dir"]
    loss = Trainer.compute_loss
    monkeypatch.setattr(
        Trainer, "compute_loss", lambda self, *args, **kwargs: loss(self, *args, **kwargs) * float("nan")
    )
    message = refused(onerec(*command, tmp_path / "nan"), "training stopped at step 1", "is nan", "learning_rate")
    (path,) = (tmp_path / "nan" / "checkpoints").glob("nonfinite-step-1-rank-0.jsonl")
    assert str(path) in message
    assert all(item.startswith("m") for item in json.loads(path.read_text().splitlines()[0])["session"])
    monkeypatch.setattr(Trainer, "compute_loss", lambda self, *args, **kwargs: torch.empty(2**50))
    refused(onerec(*command, tmp_path / "memory"), "out of memory at step 1", "per_device_train_batch_size (8)")


@pytest.mark.slow
def test_real_kills(tmp_path):
    """Two of each phase; benchmarks/robustness/reliability.py does twenty."""
    script = [
        sys.executable,
        ROOT / "benchmarks" / "robustness" / "reliability.py",
        "--kills",
        "2",
        "--json",
        tmp_path / "rows.json",
    ]
    done = subprocess.run([*map(str, script), "--seed", "7"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["name"]: row["value"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    phases = ("train", "align", "fit", "save", "push")
    assert {name: value for name, value in rows.items() if name.startswith("kill9/")} == {
        f"kill9/{phase}": 2 for phase in phases
    }, done.stderr[-3000:]
