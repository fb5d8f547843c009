"""The benchmark of lifelong histories."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_quick_has_the_rows_of_the_published_results(tmp_path):
    file = tmp_path / "lifelong.json"
    command = [sys.executable, "benchmarks/speed/lifelong.py", "--quick", "--json", str(file)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    published = {
        row["name"]: row for row in json.loads((ROOT / "benchmarks/results/lifelong.json").read_text())["rows"]
    }
    assert {row["name"] for row in json.loads(file.read_text())["rows"]} == set(published)
    assert published["lifelong_over_latest_300"]["value"] <= 1.3
