"""The recipes for accelerate that need no GPU, run as their comments say: two gloo processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import CODES, TINY

ROOT = Path(__file__).parents[2]


SHARDED = ["--fsdp_size", "2", "--ep_size", "2", "--save_only_model", "true"]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "options"), [("ddp", []), ("distributed", SHARDED)])
def test_two_processes_train_one_model(recipe, options, tmp_path):
    rows = [f"{user},film{(user + step) % 24},{step}" for user in range(60) for step in range(8)]
    (tmp_path / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    command = ["launch", "--config_file", ROOT / "recipes" / "accelerate" / f"{recipe}.yaml"]
    command += ["--num_machines", "1", "--num_processes", "2", "--module", "onerec_hf.cli.main", "train"]
    command += ["--interactions", "interactions.csv", *CODES, *TINY, "--eval_num_beams", "10", *options]
    done = subprocess.run(
        [str(Path(sys.executable).parent / "accelerate"), *map(str, command), "--output_dir", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("saved to out") == 1  # two processes of one run, not two runs
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "onerec"
    assert "onerec" in done.stdout
