"""Evaluation of trainers whose models rank items: who cannot be ranked is counted, named and left out of the metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging

from onerec_hf.evaluation.held_out import seen_items
from onerec_hf.evaluation.metrics import metrics_of_ranked
from onerec_hf.trainers.whole_evaluation import WholeEvaluation

logger = logging.get_logger(__name__)


class RankingEvaluation(WholeEvaluation):
    """
    Mixin of trainers whose evaluation ranks items. With `args.eval_exclude_seen`, a user whose history holds every item has no candidates: such
    users are counted (`unranked_users`), named in a warning and left out of the metrics. The warning also says how many targets stand in
    their own history, where no model can find them.

    Example:
        >>> class MyTrainer(RankingEvaluation): ...
    """

    _said: str | None = None

    def _ranked_items(self) -> tuple[Any, np.ndarray | None]:
        """The items that are ranked, and (items,) which of them are active."""
        raise NotImplementedError

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        self._say_seen(self.eval_dataset[dataset] if isinstance(dataset, str) else dataset)  # pyright: ignore
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset, *args, **kwargs):
        self._say_seen(test_dataset)
        return super().predict(test_dataset, *args, **kwargs)

    def _say_seen(self, dataset: Any) -> None:
        """Says once per dataset what leaving out seen items does to its users."""
        args: Any = self.args
        if not (
            args.eval_exclude_seen
            and isinstance(dataset, Dataset)
            and {"history", "session"} <= set(dataset.column_names)
        ):
            return
        if dataset._fingerprint != self._said:
            self._said = dataset._fingerprint
            if args.process_index == 0 and (text := str(seen_items(dataset, *self._ranked_items()))):
                logger.warning(text)

    def _ranking_metrics(self, prediction: EvalPrediction, num_items: int) -> dict[str, float]:
        args: Any = self.args
        relevant = np.maximum(np.asarray(prediction.label_ids), -1)  # -100 pads results of ranks with unequal width
        return metrics_of_ranked(np.asarray(prediction.predictions), relevant, tuple(args.eval_top_k), num_items)
