"""No command unpickles anything that a user, a checkpoint or the Hub provides; a checkpoint that is resumed is read by torch's restricted reader."""

import json
import shutil

import numpy as np
import pytest

from onerec_hf.semantic_ids import ResidualQuantizer, read_index_json
from onerec_hf.semantic_ids.formats.grid import read_grid_tensor
from tests.cli.commands import CODES, TINY, onerec, succeeded
from tests.unpickling import heard_unpickling


def test_reading_an_artefact(trained, data, tmp_path):
    history = json.dumps(["m1", "m2"]) + "\n"
    with heard_unpickling() as heard:
        succeeded(onerec("recommend", "--model", trained.folder, "--top_k", "2", stdin=history))
        succeeded(onerec("evaluate", "--model", trained.folder, *data.options, "--json", tmp_path / "results.json"))
        ResidualQuantizer.load(trained.folder / "codebooks.safetensors")
    assert heard == []


def test_imports_of_semantic_ids(tmp_path):
    (tmp_path / "x.index.json").write_text(json.dumps({"0": ["<a_1>"], "1": ["<a_0>"]}))
    np.save(tmp_path / "ids.npy", np.array([[0, 1], [1, 0]]))
    with heard_unpickling() as heard:
        read_index_json(tmp_path / "x.index.json")
        read_grid_tensor(tmp_path / "ids.npy")
    assert heard == []


def test_fitting_semantic_ids_of_a_users_tables(data, tmp_path):
    with heard_unpickling() as heard:
        succeeded(onerec("semantic-ids", "fit", *data.options, *CODES, "--output_dir", tmp_path / "ids"))
    assert heard == []


def test_training_on_a_users_table_and_resuming(data, tmp_path):
    options = [*data.options, *CODES, *TINY, "--save_steps", "2", "--keep_checkpoints", "true"]
    with heard_unpickling() as heard:
        succeeded(onerec("train", *options, "--output_dir", tmp_path / "shop"))
    assert heard == []
    checkpoint = tmp_path / "shop/checkpoints/checkpoint-2"
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {path.name for path in checkpoint.iterdir()}
    # Trainer's pickle of its arguments stands beside them, and is never opened.
    (checkpoint / "training_args.bin").write_bytes(b"no pickle")
    shutil.rmtree(tmp_path / "shop/checkpoints/checkpoint-3")
    with heard_unpickling() as heard:
        succeeded(onerec("train", *options, "--output_dir", tmp_path / "shop", "--resume_from_checkpoint", checkpoint))
    assert heard == []


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_would_run_code_is_refused(data, tmp_path, name):
    import torch

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    options = [*data.options, *CODES, *TINY, "--save_steps", "2", "--keep_checkpoints", "true"]
    succeeded(onerec("train", *options, "--output_dir", tmp_path / "shop"))
    checkpoint = tmp_path / "shop/checkpoints/checkpoint-2"
    torch.save({"state": Bomb()}, checkpoint / name)
    with pytest.raises(Exception, match="Weights only load failed"):
        onerec("train", *options, "--output_dir", tmp_path / "shop", "--resume_from_checkpoint", checkpoint)
    assert not (tmp_path / "ran").exists()
