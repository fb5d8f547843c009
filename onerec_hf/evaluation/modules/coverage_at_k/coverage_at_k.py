"""Coverage@k as an `evaluate` metric, computed by `onerec_hf.evaluation.metrics.coverage_at_k`."""

from __future__ import annotations

import datasets
import evaluate

from onerec_hf.evaluation.metrics import coverage_at_k

_DESCRIPTION = """\
Coverage@k: the share of the catalogue in the top k of any row.
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions: ranked ids per row, best first: all strings or all integers. The integer -1 means "no item".
    num_items: size of the catalogue.
    k: cut-off, at least 1 (default 10).

Returns:
    {"coverage@<k>": the share}. References are ignored.

Example:
    >>> import evaluate
    >>> from onerec_hf.evaluation import metric_path
    >>> metric = evaluate.load(metric_path("coverage_at_k"))
    >>> metric.compute(predictions=[["m1", "m2"], ["m3", "m1"]], num_items=6, k=2)
    {'coverage@2': 0.5}
"""

_CITATION = """\
@inproceedings{ge2010beyond,
    title = {Beyond Accuracy: Evaluating Recommender Systems by Coverage and Serendipity},
    author = {Ge, Mouzhi and Delgado-Battenfeld, Carla and Jannach, Dietmar},
    booktitle = {Proceedings of the Fourth ACM Conference on Recommender Systems},
    year = {2010}
}
"""


class CoverageAtK(evaluate.Metric):
    def _info(self):
        # Strings first: converted to integers, the ids "7" and "007" would be equal.
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": datasets.List(datasets.Value(kind))}) for kind in ("string", "int64")
            ],
        )

    def _compute(self, predictions, num_items: int, k: int = 10):
        return {f"coverage@{k}": coverage_at_k(predictions, num_items, k)}
