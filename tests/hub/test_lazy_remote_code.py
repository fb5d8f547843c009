"""A OneRec-V2 repository's own code: a process without the package loads it and answers alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from onerec_hf import OneRecV2Config, OneRecV2ForConditionalGeneration

HISTORY = ["m1", "m2", "m3"]
STRANGER = """
import json, sys
import remote_code
sys.meta_path.insert(0, remote_code.WithoutThePackage())
print(json.dumps(remote_code.use(sys.argv[1], json.loads(sys.argv[2]))[0]))
"""


def test_a_process_without_the_package_does_the_same(catalogue, processor, tmp_path):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "decoder_layers": 2,
        "num_experts": 4,
        "first_dense_layers": 1,
    }
    torch.manual_seed(0)
    config = OneRecV2Config(codebook_sizes=catalogue.codebook_sizes, initializer_range=0.2, **sizes)
    model = OneRecV2ForConditionalGeneration(config).eval()
    model.set_catalogue(catalogue)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "model"), json.dumps(HISTORY)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "HF_HOME": str(tmp_path / "stranger")},
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert all(module.startswith("transformers_modules.") for module in answer["modules"])
    assert answer["backbone"] == "OneRecV2Model"
    wanted = model.recommend(**processor([HISTORY]), num_beams=4, num_return_sequences=4)
    assert answer["recommend"] == answer["generate"] == processor.batch_decode(wanted)
