"""Recall@k as an `evaluate` metric, computed by `onerec_hf.evaluation.metrics.recall_at_k`."""

from __future__ import annotations

import datasets
import evaluate

from onerec_hf.evaluation.metrics import recall_at_k

_DESCRIPTION = """\
Recall@k: the share of a row's relevant items in its top k, averaged over rows.
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions: ranked ids per row, best first: all strings or all integers. The integer -1 means "no item".
    references: relevant ids per row, at least one, of the same type.
    k: cut-off, at least 1 (default 10).

Returns:
    {"recall@<k>": mean over rows}. A repeated item counts at its first rank only.

Example:
    >>> import evaluate
    >>> from onerec_hf.evaluation import metric_path
    >>> metric = evaluate.load(metric_path("recall_at_k"))
    >>> metric.compute(predictions=[["m1", "m2"], ["m3", "m1"]], references=[["m2"], ["m4"]], k=2)
    {'recall@2': 0.5}
"""

_CITATION = """\
@inproceedings{krichene2020sampled,
    title = {On Sampled Metrics for Item Recommendation},
    author = {Krichene, Walid and Rendle, Steffen},
    booktitle = {Proceedings of the 26th ACM SIGKDD International Conference on Knowledge Discovery and Data Mining},
    year = {2020}
}
"""


class RecallAtK(evaluate.Metric):
    def _info(self):
        # Strings first: converted to integers, the ids "7" and "007" would be equal.
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=[
                datasets.Features(
                    {name: datasets.List(datasets.Value(kind)) for name in ("predictions", "references")}
                )
                for kind in ("string", "int64")
            ],
        )

    def _compute(self, predictions, references, k: int = 10):
        return {f"recall@{k}": recall_at_k(predictions, references, k)}
