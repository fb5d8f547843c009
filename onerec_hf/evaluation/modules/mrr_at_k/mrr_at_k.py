"""MRR@k as an `evaluate` metric, computed by `onerec_hf.evaluation.metrics.mrr_at_k`."""

from __future__ import annotations

import datasets
import evaluate

from onerec_hf.evaluation.metrics import mrr_at_k

_DESCRIPTION = """\
MRR@k: the reciprocal rank of the first relevant item in the top k, else 0; averaged over rows.
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions: ranked ids per row, best first: all strings or all integers. The integer -1 means "no item".
    references: relevant ids per row, at least one, of the same type.
    k: cut-off, at least 1 (default 10).

Returns:
    {"mrr@<k>": mean over rows}. A repeated item counts at its first rank only.

Example:
    >>> import evaluate
    >>> from onerec_hf.evaluation import metric_path
    >>> metric = evaluate.load(metric_path("mrr_at_k"))
    >>> metric.compute(predictions=[["m1", "m2"], ["m3", "m1"]], references=[["m2"], ["m4"]], k=2)
    {'mrr@2': 0.25}
"""

_CITATION = """\
@inproceedings{voorhees1999trec8,
    title = {The {TREC}-8 Question Answering Track Report},
    author = {Voorhees, Ellen M.},
    booktitle = {Proceedings of the Eighth Text REtrieval Conference},
    year = {1999}
}
"""


class MRRAtK(evaluate.Metric):
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
        return {f"mrr@{k}": mrr_at_k(predictions, references, k)}
