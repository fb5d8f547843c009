"""The `evaluate` modules load by path without a network, in a fresh cache, and equal the plain functions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from onerec_hf.evaluation import coverage_at_k, metric_path, mrr_at_k, ndcg_at_k, recall_at_k

NAMES = ["coverage_at_k", "mrr_at_k", "ndcg_at_k", "recall_at_k"]

# `evaluate` reads HF_HOME when it is imported, hence a process of its own.
SCRIPT = """
import doctest, json, sys
import evaluate, numpy as np
from onerec_hf.evaluation import metric_path

inputs = json.load(sys.stdin)
results = {}
for name in inputs.pop("names"):
    metric = evaluate.load(metric_path(name))
    needs_references = "references" in metric._feature_names()
    settings = {"k": 2} if needs_references else {"k": 2, "num_items": 10}
    for kind, (ranked, relevant) in inputs.items():
        references = {"references": relevant} if needs_references else {}
        results[f"{name}/{kind}"] = metric.compute(predictions=ranked, **references, **settings)
        if kind == "integers":
            references = {"references": np.array(relevant)} if needs_references else {}
            results[f"{name}/arrays"] = metric.compute(predictions=np.array(ranked), **references, **settings)
            for row, items in enumerate(ranked):
                metric.add(prediction=items, **({"reference": relevant[row]} if needs_references else {}))
            results[f"{name}/one by one"] = metric.compute(**settings)
    example = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, name, None, 0)
    assert example.examples
    results[f"{name}/doctest"] = doctest.DocTestRunner().run(example).failed
print(json.dumps(results))
"""

INTEGERS = ([[4, 1, 2], [3, -1, 0], [-1, -1, -1]], [[1, 2], [0, 5], [7, 8]])
STRINGS = ([["7", "m1"], ["007", "m3", "m9"], []], [["m1"], ["7", "m3"], ["m2"]])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    home = tmp_path_factory.mktemp("hf_home")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps({"names": NAMES, "integers": INTEGERS, "strings": STRINGS}),
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert (home / "modules" / "evaluate_modules").is_dir()
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("metric", [recall_at_k, ndcg_at_k, mrr_at_k])
def test_equals_the_plain_function(results, metric):
    key = metric.__name__.replace("_at_k", "@2")
    for kind in ("integers", "arrays", "one by one"):
        assert results[f"{metric.__name__}/{kind}"] == {key: metric(*INTEGERS, 2)}
    assert results[f"{metric.__name__}/strings"] == {key: metric(*STRINGS, 2)}


def test_coverage_equals_the_plain_function(results):
    for kind in ("integers", "arrays", "one by one"):
        assert results[f"coverage_at_k/{kind}"] == {"coverage@2": coverage_at_k(INTEGERS[0], 10, 2)}
    # "7" and "007" are two items.
    assert results["coverage_at_k/strings"] == {"coverage@2": coverage_at_k(STRINGS[0], 10, 2)} == {"coverage@2": 0.4}


@pytest.mark.parametrize("name", NAMES)
def test_example_in_the_description_runs(results, name):
    assert results[f"{name}/doctest"] == 0


def test_metric_path():
    for name in NAMES:
        assert (Path(metric_path(name)) / f"{name}.py").is_file()
    with pytest.raises(
        ValueError, match="no evaluate module 'recall'; choose one of coverage_at_k, mrr_at_k, ndcg_at_k, recall_at_k"
    ):
        metric_path("recall")
