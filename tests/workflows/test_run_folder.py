"""What a run that begins removes from its folder, and what it must not lose."""

import pytest

from onerec_hf.workflows.run_folder import begin


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
