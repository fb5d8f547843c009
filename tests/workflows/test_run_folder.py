"""What a run that begins removes from its folder, and what it must not lose."""

import os
import signal
import subprocess
import sys

import pytest

from onerec_hf.workflows.run_folder import begin, check_folder, own_folder

# Locks a folder, says so, and waits for its end.
_HOLDS = """
import sys, time
from onerec_hf.workflows.run_folder import own_folder
with own_folder(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    """Before any work, and whatever the second run wants; a killed run frees it."""
    folder = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", _HOLDS, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(FileExistsError, match="holds a run that has not ended"), own_folder(folder):
            pass
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        first.stdout.close()
    assert (folder / "_lock").is_file()  # what a kill leaves
    with own_folder(folder):
        check_folder(folder, overwrite=False)  # it counts as empty


def test_a_run_that_does_not_begin_leaves_no_trace(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("new/er/run", "mine"):
        with pytest.raises(ValueError, match="bad data"), own_folder(tmp_path / name):
            raise ValueError("bad data")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


@pytest.mark.parametrize("resumes", [False, True])
def test_a_resumed_run_keeps_what_it_started_with(tmp_path, resumes):
    """A kill between the begin of a resumed run and its first write must not lose codebooks and titles."""
    started_with = ["codebooks.safetensors", "items.parquet", "semantic_ids.json"]
    for name in (*started_with, "config.json", "results.json", "mine.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoints").mkdir()
    begin(tmp_path, "onerec-hf train", resumes)
    left = {path.name for path in tmp_path.iterdir()}
    assert {"mine.txt"} <= left
    assert not {"config.json", "results.json"} & left
    assert (left >= {*started_with, "checkpoints"}) == resumes
    assert bool(left & {*started_with, "checkpoints"}) == resumes
