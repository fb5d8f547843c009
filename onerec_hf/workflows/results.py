"""What a workflow returns: the folder, the trainer and the result rows; and the rows as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from onerec_hf.evaluation.results import table

if TYPE_CHECKING:
    from transformers import Trainer

    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.workflows.verdict import Verdict

BASELINES = ("popularity", "item_knn", "sasrec")


@dataclass(frozen=True)
class Result:
    """
    What a workflow measured.

    Args:
        rows: result rows as in `results.json`; under torchrun only the first rank has them.

    Example:
        >>> Result([{"name": "onerec/recall@10", "value": 0.25, "unit": "share"}]).metrics
        {'onerec/recall@10': 0.25}
    """

    rows: list[dict[str, Any]] = field(repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        """The values of the rows by name, of the model and of the baselines."""
        return metrics_of(self.rows)


@dataclass(frozen=True)
class GeneratorResult(Result):
    """
    A trained or aligned generator.

    Args:
        folder: the saved model, with catalogue, `results.json` and card.
        trainer: with the model in memory.
        verdict: the model against the baselines, in words; None where they were not ranked.
    """

    folder: Path
    trainer: Trainer = field(repr=False)
    verdict: Verdict | None = None

    @property
    def model(self) -> OneRecForConditionalGeneration:
        """The trained model."""
        return cast("OneRecForConditionalGeneration", self.trainer.model)

    @property
    def processor(self) -> OneRecProcessor:
        """The processor with the catalogue, as saved with the model."""
        return cast("OneRecProcessor", self.trainer.processing_class)


@dataclass(frozen=True)
class RewardResult(Result):
    """
    A trained session reward model.

    Args:
        folder: the saved model, with `results.json` and card.
        trainer: with the model in memory.
    """

    folder: Path
    trainer: Trainer = field(repr=False)

    @property
    def model(self) -> OneRecForSessionReward:
        """The trained model."""
        return cast("OneRecForSessionReward", self.trainer.model)


def metrics_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """
    Result rows as one dict.

    Example:
        >>> metrics_of([{"name": "popularity/recall@10", "value": 0.1, "unit": "share"}])
        {'popularity/recall@10': 0.1}
    """
    return {row["name"]: row["value"] for row in rows}


def ranking_table(rows: list[dict[str, Any]]) -> str:
    """
    The ranking metrics as text, a model per line.

    Example:
        >>> rows = [{"name": f"{model}/recall@10", "value": value} for model, value in (("onerec", 0.2), ("popularity", 0.1))]
        >>> print(ranking_table(rows))
                    recall@10
        popularity     0.1000
        onerec         0.2000
    """
    values = metrics_of(rows)
    ranked = dict.fromkeys(name.split("/")[0] for name in values if "@" in name)
    models = [*(name for name in BASELINES if name in ranked), *(name for name in ranked if name not in BASELINES)]
    metrics = [name.split("/")[1] for name in values if name.startswith(f"{models[-1]}/")]
    return table(
        [[name, *(f"{values[f'{name}/{metric}']:.4f}" for metric in metrics)] for name in models], ["", *metrics]
    )


def before_and_after_table(rows: list[dict[str, Any]]) -> str:
    """
    The ranking metrics of an alignment as text: the baselines, the model before, the aligned model.

    Example:
        >>> names = ("popularity/recall@10", "item_knn/recall@10", "before/onerec/recall@10", "onerec/recall@10")
        >>> print(before_and_after_table([{"name": name, "value": 0.1} for name in names]))
                    recall@10
        popularity     0.1000
        item_knn       0.1000
        before         0.1000
        aligned        0.1000
    """
    values = metrics_of(rows)
    metrics = [name.split("/")[1] for name in values if name.startswith("onerec/")]
    models = {"popularity": "popularity", "item_knn": "item_knn", "before": "before/onerec", "aligned": "onerec"}
    return table(
        [[name, *(f"{values[f'{model}/{metric}']:.4f}" for metric in metrics)] for name, model in models.items()],
        ["", *metrics],
    )


def reward_table(rows: list[dict[str, Any]], objectives: list[str], metrics: list[str]) -> str:
    """
    The metrics of a reward model as text, a line per objective and model.

    Example:
        >>> rows = [{"name": f"{model}/vtr/auc", "value": 0.5} for model in ("base_rate", "onerec_reward")]
        >>> print(reward_table(rows, ["vtr"], ["auc"]))
                                auc
        vtr      base_rate  0.5000
        vtr  onerec_reward  0.5000
    """
    values = metrics_of(rows)
    models = [
        name
        for name in ("base_rate", "logistic_regression", "onerec_reward")
        if f"{name}/{objectives[0]}/{metrics[0]}" in values
    ]
    lines = [
        [objective, name, *(f"{values[f'{name}/{objective}/{metric}']:.4f}" for metric in metrics)]
        for objective in objectives
        for name in models
    ]
    return table(lines, ["", "", *metrics])
