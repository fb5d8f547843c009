"""The contest's script (benchmarks/quality.py), where no training is needed: rankings that were kept are fused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_kept_rankings_are_fused(tmp_path, data_folder):
    rng = np.random.default_rng(0)
    for name in "ab":
        for split in ("validation", "test"):
            np.savez(tmp_path / f"{name}-{split}.npz", rows=rng.integers(0, 12101, (300, 20)))
    command = [ROOT / "benchmarks" / "quality.py", "--quick", "--data_dir", data_folder / "amazon_beauty"]
    fuse = ["--fuse", tmp_path / "a", tmp_path / "b", "--label", "both", "--json", tmp_path / "found.json"]
    subprocess.run([sys.executable, *command, *fuse], check=True, capture_output=True)
    rows = {row["name"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert rows["amazon-beauty/both/test/recall@10"]["settings"] == {"fused": ["a", "b"]}
    assert "amazon-beauty/both/validation/ndcg@10" in rows
