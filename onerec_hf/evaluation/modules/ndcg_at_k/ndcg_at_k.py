"""NDCG@k as an `evaluate` metric, computed by `onerec_hf.evaluation.metrics.ndcg_at_k`."""

from __future__ import annotations

import datasets
import evaluate

from onerec_hf.evaluation.metrics import ndcg_at_k

_DESCRIPTION = """\
NDCG@k with binary gains: a relevant item at rank p gains 1 / log2(p + 1), divided by the gain of the ideal ranking.
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions: ranked ids per row, best first: all strings or all integers. The integer -1 means "no item".
    references: relevant ids per row, at least one, of the same type.
    k: cut-off, at least 1 (default 10).

Returns:
    {"ndcg@<k>": mean over rows}. A repeated item counts at its first rank only.

Example:
    >>> import evaluate
    >>> from onerec_hf.evaluation import metric_path
    >>> metric = evaluate.load(metric_path("ndcg_at_k"))
    >>> metric.compute(predictions=[["m1", "m2"], ["m3", "m1"]], references=[["m2"], ["m4"]], k=2)
    {'ndcg@2': 0.31546487678572877}
"""

_CITATION = """\
@article{jarvelin2002cumulated,
    title = {Cumulated Gain-Based Evaluation of {IR} Techniques},
    author = {J{\\"a}rvelin, Kalervo and Kek{\\"a}l{\\"a}inen, Jaana},
    journal = {ACM Transactions on Information Systems},
    volume = {20},
    number = {4},
    year = {2002}
}
"""


class NDCGAtK(evaluate.Metric):
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
        return {f"ndcg@{k}": ndcg_at_k(predictions, references, k)}
