"""Workflows called from a program under torchrun: every rank makes the calls, the folder is complete when they return."""

import json
import re

import pytest

from onerec_hf.workflows import load_dataset, train
from tests.cli.commands import contents
from tests.ranks import torchrun
from tests.workflows.conftest import TINY

PROGRAM = """
import sys
from onerec_hf.workflows import evaluate, load_dataset, train
from tests.workflows.conftest import TINY

interactions, items, folder = sys.argv[1:]
dataset = load_dataset(interactions=interactions, items=items)
result = train(dataset, output_dir=folder, **TINY)
found = evaluate(dataset, model=folder)
assert found.metrics == {name: value for name, value in result.metrics.items() if name != "seconds"}
print(f"done with {len(result.rows)} rows")
"""


@pytest.mark.slow
def test_a_program_under_torchrun(tables, files, tmp_path):
    program, folder = tmp_path / "program.py", tmp_path / "ranks"
    program.write_text(PROGRAM)
    done = torchrun(program, files["interactions"], files["items"], folder, ranks=2)
    assert done.returncode == 0, done.stderr
    alone = train(load_dataset(**tables), output_dir=tmp_path / "alone", **TINY)
    # The ranks share one pipe, so their lines may follow each other without a line break.
    assert sorted(map(int, re.findall(r"done with (\d+) rows", done.stdout))) == [0, len(alone.rows)]
    assert contents(folder).keys() == contents(alone.folder).keys()
    assert done.stderr.count(f"saved to {folder}") == 1
    rows = {row["name"]: row["value"] for row in json.loads((folder / "results.json").read_text())["rows"]}
    baselines = {name: value for name, value in alone.metrics.items() if name.startswith(("popularity", "item_knn"))}
    assert {name: rows[name] for name in baselines} == baselines
